"""One safetensors file that is whole or absent: named tensors and plain data, checked by hash on reading."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pins_ext.files.atomic import file_aside


def write(
    path: str | Path, kind: str, data: Any, tensors: Mapping[str, Tensor], origin: Mapping[str, Any] | None = None
) -> None:
    """Write aside, flush to disk, rename: `path` holds the old file or the new one, never a part.

    Args:
        path: where to.
        kind: what the file is, asked for again by `read`.
        data: anything JSON can hold.
        tensors: none sharing memory.
        origin: what the file belongs to, such as a run and a step of it; plain data, see `read`.
    """
    path = Path(path)
    contents = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {"format": kind, "data": json.dumps(data)}
    if origin is not None:
        metadata["origin"] = json.dumps(origin, sort_keys=True)
    metadata["sha256"] = _digest(metadata["data"], contents)
    metadata["header"] = _header_digest(metadata, contents)
    with file_aside(path) as aside:
        try:
            save_file(contents, aside, metadata)
        except SafetensorError as error:
            raise OSError(f"could not write {path}: {error}") from error


def read(path: str | Path, kind: str, origin: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Data and tensors of a file that `write` wrote.

    Args:
        path: the file.
        kind: what it must be.
        origin: what it must belong to; it warns of a file that doesn't say, as earlier versions wrote them.

    Raises:
        ValueError: the file cannot be read, is of another kind or origin, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise ValueError(f"{path} is no {kind} file (format {metadata.get('format')!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a reader, not a dict)
        whole = _digest(metadata.get("data", ""), tensors) == metadata.get("sha256")
        # Without the second digest it is a file of an earlier version.
        whole &= metadata.get("header") in (None, _header_digest(metadata, tensors))
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a {kind} file: {error}") from error
    if not whole:
        raise ValueError(f"{path} is damaged: its contents do not match the hash stored with them")
    try:
        data, found = (json.loads(metadata.get(key, "null")) for key in ("data", "origin"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a {kind} file: {error}") from error
    if origin is not None and found is None:
        warnings.warn(f"{path} doesn't say what it belongs to: an earlier version wrote it", stacklevel=3)
    elif origin is not None and found != origin:
        raise ValueError(f"{path} belongs to {found}, not to {dict(origin)}")
    return data, tensors


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over data, names and contents: integrity, not authenticity; safetensors itself has no checksum."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _header_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the rest: kind, origin, and how the contents are to be read."""
    kinds = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)]
    about = [metadata.get("format"), metadata.get("origin"), metadata.get("sha256"), kinds]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
