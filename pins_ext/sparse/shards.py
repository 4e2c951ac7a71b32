"""Safetensors files written and read array by array: never more than one tensor in memory.

The header of a safetensors file comes first and says where each array lies. It is reserved at its largest possible
size, padded with spaces as the format allows, and filled in when the arrays have been written.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pins_ext.sparse.encoding import DTYPES, NAMES

METADATA = {"format": "pins_sparse", "version": "1"}

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_HEADER_PER_ARRAY = 256


class ShardWriter:
    """A safetensors file that grows array by array.

    Args:
        path: the file to write.
        names: all arrays that are going to be written.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        self._names = set(names)
        self._header: dict[str, Any] = {"__metadata__": METADATA}
        # Names are escaped to ASCII, so their length in bytes is known.
        reserved = sum(len(json.dumps(name)) + _HEADER_PER_ARRAY for name in names) + len(json.dumps(self._header))
        self._reserved = -(-reserved // 8) * 8
        self._at = 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(bytes(8 + self._reserved))

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, name: str, array: Tensor) -> None:
        """Append one array.

        Args:
            name: one of the announced names.
            array: contiguous, on the CPU.
        """
        self._names.remove(name)
        size = array.numel() * array.element_size()
        # Aligned arrays can be mapped as they are; the hole belongs to a filler, since the format allows none.
        fill = -self._at % 8
        if fill:
            self._header[f"pins_fill.{self._at}"] = {
                "dtype": "U8",
                "shape": [fill],
                "data_offsets": [self._at, self._at + fill],
            }
            self._file.write(bytes(fill))
            self._at += fill
        self._header[name] = {
            "dtype": _CODES[NAMES[array.dtype]],
            "shape": list(array.shape),
            "data_offsets": [self._at, self._at + size],
        }
        if size:
            self._file.write(array.reshape(-1).view(torch.uint8).numpy().data)
        self._at += size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self._names, f"announced and not written: {sorted(self._names)}"
                text = json.dumps(self._header, separators=(",", ":")).encode()
                assert len(text) <= self._reserved, "the header outgrew its place"
                self._file.seek(0)
                self._file.write(struct.pack("<Q", self._reserved) + text.ljust(self._reserved))
        finally:
            self._file.close()


class ShardReader:
    """The arrays of one shard.

    Args:
        path: the file.

    Raises:
        ValueError: no safetensors file, or one of another format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._file.__enter__()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}") from error
        metadata = self._file.metadata() or {}
        if {key: metadata.get(key) for key in METADATA} != METADATA:
            raise ValueError(f"{path} is no shard of a sparse checkpoint: its metadata is {metadata}")

    @property
    def names(self) -> set[str]:
        """Names of the arrays, fillers left out."""
        return {name for name in self._file.keys() if not name.startswith("pins_fill.")}  # noqa: SIM118

    def read(self, name: str, dtype: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One array; it may share the file's mapped memory.

        Args:
            name: of the array.
            dtype: what it must be, a key of `DTYPES`.
            shape: what it must be; None for any.

        Raises:
            ValueError: it is not.
        """
        try:
            array = self._file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._path} has no readable array {name!r}: {error}") from error
        if array.dtype != DTYPES[dtype] or shape not in (None, tuple(array.shape)):
            raise ValueError(
                f"{name!r} in {self._path} is {array.dtype} {tuple(array.shape)}, not {dtype} {shape or '(any)'}"
            )
        return array

    def close(self) -> None:
        """Let go of the file."""
        self._file.__exit__(None, None, None)
