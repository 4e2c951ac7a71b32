"""What zeros a checkpoint has: how many, in which patterns, and what they would save. Read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pins_ext.chance import EXPLAINED, GROUPS, Zeros
from pins_ext.sparse.attention_heads import HeadLayout, head_layout
from pins_ext.sparse.checkpoint import SparseCheckpoint
from pins_ext.sparse.encoding import DTYPES, NAMES, SPARSE_DTYPES, Entry
from pins_ext.sparse.index import SparseFormatError
from pins_ext.sparse.source import is_sparse

BLOCKS = (
    (4, 1), (1, 4), (8, 1), (1, 8), (16, 1), (1, 16), (4, 4), (32, 1), (1, 32), (8, 8), (16, 16), (32, 32), (64, 64),
)  # fmt: skip
"""Rows and columns of the blocks that are looked for, the smallest first."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_PRUNED = 0.01
"""Share of a tensor that must be zero for a pattern: the empty row of a padding token is none."""

_CHUNK_WEIGHTS = 1 << 23
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


class SurveyError(ValueError):
    """Something is no checkpoint that can be read; the message says what to do."""


@dataclass(frozen=True)
class TensorSurvey:
    """What was found in one tensor.

    Attributes:
        name: in the checkpoint.
        shape: its sizes.
        dtype: of its elements.
        weights: how many elements; 0 for what holds no weights, such as integers.
        zeros: elements that are 0, of either sign.
        not_finite: elements that are NaN or infinite.
        dead_rows: rows without a non-zero; a row is the last dimension.
        dead_columns: columns without a non-zero, over all leading dimensions.
        dead_heads: attention heads whose whole part of this matrix is zero, where a config.json tells the heads.
        patterns: in words, the tightest first; not those that as many zeros anywhere would make (see `chance`).
        dense_bytes: as it is stored in an ordinary file.
        packed_bytes: with a bit for each zero (`save_sparse`), where that is smaller.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: int = 0
    zeros: int = 0
    not_finite: int = 0
    dead_rows: int = 0
    dead_columns: int = 0
    dead_heads: int = 0
    patterns: tuple[str, ...] = ()
    dense_bytes: int = 0
    packed_bytes: int = 0

    @property
    def sparsity(self) -> float:
        """Share of the weights that is zero."""
        return self.zeros / self.weights if self.weights else 0.0


def survey(path: str | Path) -> Iterator[TensorSurvey]:
    """Look at every tensor of a checkpoint, one at a time.

    Args:
        path: a .safetensors file, a folder of such files as transformers and others write them, or a sparse checkpoint
            of `save_sparse`.

    Yields:
        What was found, in the order of the files.

    Raises:
        SurveyError: there is nothing that can be read.
    """
    try:
        yield from _survey(Path(path))
    except (SafetensorError, SparseFormatError, OSError) as error:
        raise SurveyError(f"{path} can't be read: {error}") from error


def _survey(path: Path) -> Iterator[TensorSurvey]:
    heads = head_layout(path)
    if path.is_dir() and is_sparse(path):
        for name, tensor in SparseCheckpoint(path).tensors():
            yield _look(name, tuple(tensor.shape), iter([tensor]), heads)
        return
    for file in files_of(path):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (a reader, not a dict)
                sliced = reader.get_slice(name)
                shape = tuple(sliced.get_shape())
                yield _look(name, shape, _slices(reader, sliced, name, shape), heads)


def files_of(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        SurveyError: there are none.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise SurveyError(
                f"{path} is no .safetensors file: a pickle (.bin, .pt) may run code when it is "
                "opened, so it is not; from_pretrained loads what you trust, and save_pretrained writes .safetensors"
            )
        return [path]
    if not path.is_dir():
        raise SurveyError(f"there is no {path}")
    if (path / _INDEX).is_file():
        return _shards(path)
    files = [path / _WHOLE] if (path / _WHOLE).is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise SurveyError(f"{path} holds no .safetensors file")
    return files


def _shards(folder: Path) -> list[Path]:
    try:
        names = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SurveyError(f"{folder / _INDEX} is no index of a checkpoint") from error
    files = [folder / str(name) for name in sorted(map(str, names))]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise SurveyError(f"{folder} lacks {file.name}, which {_INDEX} names")
    return files


def _slices(reader: Any, sliced: Any, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The tensor in parts of whole rows, so that one of any size fits into memory."""
    if len(shape) < 2 or not prod(shape):
        yield reader.get_tensor(name)
        return
    # Blocks and groups of rows must not be cut.
    unit = BLOCKS[-1][0] if len(shape) == 2 else 1
    rows = max(unit, _CHUNK_WEIGHTS // prod(shape[1:]) // unit * unit)
    for begin in range(0, shape[0], rows):
        yield sliced[begin : begin + rows]


@dataclass
class _Counts:
    """Sums over the parts of one tensor."""

    shape: tuple[int, ...]
    zeros: int = 0
    not_finite: int = 0
    live_rows: list[Tensor] = field(default_factory=list)
    live_columns: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = prod(self.shape[:-1]), self.shape[-1]
        matrix = len(self.shape) >= 2
        # Along a row, and down a column.
        self.along = {m: 0 for m in GROUPS if matrix and columns % m == 0}
        self.down = {m: 0 for m in GROUPS if matrix and self.shape[-2] % m == 0}
        self.empty = {(a, b): 0 for a, b in BLOCKS if matrix and columns % b == 0 and self.shape[-2] % a == 0}
        self.rows, self.columns = rows, columns

    def add(self, part: Tensor) -> None:
        """Count a part of whole rows."""
        zeros = part.numel() - int(torch.count_nonzero(part))
        self.zeros += zeros
        finite = torch.isfinite(part)
        self.not_finite += 0 if bool(finite.all()) else part.numel() - int(finite.sum())
        if not zeros:
            # A dense part ends the search: most tensors of most checkpoints are.
            self.along, self.down = {}, {}
            self.live_rows.append(torch.ones(part.numel() // max(1, self.columns), dtype=torch.bool))
            self.live_columns = torch.ones(self.columns, dtype=torch.bool)
            return
        live = (part != 0).reshape(-1, self.columns)
        self.live_rows.append(live.any(1))
        some = live.any(0)
        self.live_columns = some if self.live_columns is None else self.live_columns | some
        rows = len(live)
        for m, most in tuple(self.along.items()):
            self.along[m] = max(most, int(live.view(rows, -1, m).sum(-1, dtype=torch.uint8).max()))
        for m, most in tuple(self.down.items()):
            self.down[m] = max(most, int(live.view(-1, m, self.columns).sum(1, dtype=torch.uint8).max()))
        # A full group shows that there is no such pattern.
        self.along = {m: n for m, n in self.along.items() if n < m}
        self.down = {m: n for m, n in self.down.items() if n < m}
        for (a, b), empty in tuple(self.empty.items()):
            self.empty[a, b] = empty + int((~live.view(rows // a, a, -1, b).any(3).any(1)).sum())
        # More zeros outside of empty blocks than may be left over in the end show that there is no such pattern.
        room = (1 - EXPLAINED) * self.rows * self.columns
        self.empty = {(a, b): n for (a, b), n in self.empty.items() if self.zeros - n * a * b <= room}

    @property
    def dead_rows(self) -> int:
        return sum(int((~live).sum()) for live in self.live_rows)

    @property
    def dead_columns(self) -> int:
        return 0 if self.live_columns is None else self.columns - int(self.live_columns.sum())

    def dead_heads(self, name: str, heads: HeadLayout | None) -> int:
        axis = heads.axis(name) if heads is not None and len(self.shape) == 2 else None
        if heads is None or axis is None or self.live_columns is None:
            return 0
        live = torch.cat(self.live_rows) if axis == "rows" else self.live_columns
        return 0 if len(live) % heads.size else int((~live.view(-1, heads.size).any(1)).sum())

    def patterns(self) -> list[str]:
        """The patterns that hold, in words, and that zeros anywhere would not make."""
        weights = self.rows * self.columns
        if self.zeros == weights:
            return ["all zero"]
        if self.zeros < _PRUNED * weights:
            return []
        zeros = Zeros(self.rows, self.columns, self.zeros, self.dead_rows, self.dead_columns)
        found = _tightest(zeros, self.along, "rows") + _tightest(zeros, self.down, "columns")
        if zeros.are_lines():
            return found if zeros.lines_hold_by_chance() else [*found, "whole rows and columns"]
        blocks = [
            f"blocks of {a} x {b}"
            for (a, b), empty in self.empty.items()
            if zeros.are_blocks(a * b, self.zeros - empty * a * b)
        ]
        return [*found, *blocks[-1:]]


def _tightest(zeros: Zeros, most: dict[int, int], axis: str) -> list[str]:
    """The tightest N:M: of every M in a row, or column, at most N are not zero.

    Args:
        zeros: of the tensor.
        most: M -> N.
        axis: "rows" or "columns", along which the groups lie.
    """
    held = [(n / m, m, n) for m, n in most.items() if 0 < n < m and zeros.may_be_groups(n, m, axis == "rows")]
    return [f"{n}:{m} in {axis}" for _, m, n in sorted(held)[:1]]


def _look(name: str, shape: tuple[int, ...], parts: Iterator[Tensor], heads: HeadLayout | None) -> TensorSurvey:
    first = next(parts)
    dtype = NAMES.get(first.dtype, str(first.dtype).removeprefix("torch."))
    size = prod(shape) * first.element_size()
    if not first.dtype.is_floating_point or not prod(shape):
        return TensorSurvey(name, shape, dtype, dense_bytes=size, packed_bytes=size)
    counts = _Counts(shape if shape else (1,))
    present = 0
    for part in chain([first], parts):
        # Eight-bit floats know no comparison.
        readable = part if dtype in DTYPES else part.float()
        counts.add(readable)
        present += int(torch.count_nonzero(part.contiguous().view(_BITS[part.element_size()])))
    packed = size
    if dtype in SPARSE_DTYPES and len(shape) >= 2:
        packed = min(size, Entry(shape, dtype, "rows", dtype, present).bytes)
    patterns = tuple(counts.patterns()) if len(shape) >= 2 else ()
    return TensorSurvey(
        name, shape, dtype, prod(shape), counts.zeros, counts.not_finite, counts.dead_rows, counts.dead_columns,
        counts.dead_heads(name, heads), patterns, size, packed,
    )  # fmt: skip


def together(found: Sequence[TensorSurvey]) -> dict[str, Any]:
    """Sums over tensors: weights, zeros and sparsity of all and of the pruned matrices, and bytes on disk."""
    pruned = [each for each in found if len(each.shape) >= 2 and each.packed_bytes < each.dense_bytes]
    weights, zeros = sum(each.weights for each in found), sum(each.zeros for each in found)
    inside, gone = sum(each.weights for each in pruned), sum(each.zeros for each in pruned)
    return {
        "tensors": len(found),
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights if weights else 0.0,
        "pruned_tensors": len(pruned),
        "pruned_weights": inside,
        "pruned_zeros": gone,
        "pruned_sparsity": gone / inside if inside else 0.0,
        "not_finite": sum(each.not_finite for each in found),
        "dense_bytes": sum(each.dense_bytes for each in found),
        "packed_bytes": sum(each.packed_bytes for each in found),
    }
