"""Where each tensor of a list lies among all weights, and the work list that kernels walk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from pins_ext.ops.transfer import to_device

CHUNK = 16384
"""Weights per row of a work list; csrc/layout.inl kChunk and triton_kernels/criterion.py say the same."""


GROUP = 32
"""Weights of a row that share a scale in 8-bit storage; csrc/layout.inl kGroup."""


@dataclass(frozen=True)
class Shard:
    """Where a local tensor lies in its full, unsharded tensor.

    Args:
        full: sizes of the full tensor.
        start: first index of the local tensor in each dimension.
    """

    full: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The places of a list of tensors among all weights: the `places` and `chunks` arguments of every list operator.

    Attributes:
        places: int64 [n, 14]: global base, full sizes [4], local sizes [4], start per dimension [4], weights of a row
            of the local tensor (ops.coded_shape).
        chunks: int64 [m, 2]: (tensor, local offset).
        total: number of weights of all full tensors: the global index of the end.
    """

    places: Tensor
    chunks: Tensor
    total: int
    _host_places: Tensor = field(repr=False, compare=False)

    @staticmethod
    def of(tensors: Sequence[Tensor], shards: Sequence[Shard | None] | None = None, base: int = 0) -> Layout:
        """Lay the tensors out one after another from global index `base`.

        Args:
            tensors: local tensors, contiguous, in parameter order, all on one device.
            shards: per tensor, where it lies in its full tensor; None where it is whole.
            base: global index of the first weight of the first full tensor.

        Raises:
            ValueError: a shard that needs more than four dimensions or does not fit its full tensor.
        """
        device = tensors[0].device if tensors else torch.device("cpu")
        rows = [_row(tuple(tensor.shape), shards[i] if shards else None) for i, tensor in enumerate(tensors)]
        ends = list(accumulate((math.prod(row[1:5]) for row in rows), initial=base))
        places = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 14)
        places[:, 0] = torch.tensor(ends[:-1], dtype=torch.int64, device="cpu")
        return _laid_out(places, ends[-1], device)

    def subset(self, indices: Sequence[int]) -> Layout:
        """The layout of some of the tensors, in this order, at their own global indices.

        Args:
            indices: places in the whole list.
        """
        if list(indices) == list(range(len(self._host_places))):
            return self
        return _laid_out(self._host_places[list(indices)], self.total, self.places.device)

    def on(self, device: torch.device) -> Layout:
        """The same places for operators of another device."""
        if self.places.device == device:
            return self
        return _laid_out(self._host_places, self.total, device)

    def within(self, begin: int, end: int) -> list[int]:
        """The tensors that have weights, whole or cut, in this range of global indices."""
        first = self._host_places[:, 0]
        last = first + self._host_places[:, 1:5].prod(1)
        return ((first < end) & (last > begin)).nonzero().flatten().tolist()

    def numel(self, i: int) -> int:
        """Weights of the local part of one tensor."""
        return int(self._host_places[i, 5:9].prod())

    def span(self, i: int) -> tuple[int, int]:
        """Lowest and highest global index of one full tensor; of an empty one, the highest is lower."""
        base, *sizes = self._host_places[i, :5].tolist()
        return base, base + math.prod(sizes) - 1

    def global_index(self, i: int, offset: Tensor) -> Tensor:
        """Where weights lie among all weights.

        Args:
            i: the tensor.
            offset: int64, flat indices in its local part.
        """
        base, *sizes, _ = self._host_places[i].tolist()
        full, local, start = sizes[:4], sizes[4:8], sizes[8:]
        index, stride = torch.full_like(offset, base), 1
        for f, n, s in zip(reversed(full), reversed(local), reversed(start), strict=True):
            index += (offset % n + s) * stride
            offset, stride = offset // n, stride * f
        return index


class Subsets:
    """Layouts of parts of one list: each is built once, and kept while every step asks for it.

    Which tensors have a gradient may change from step to step, so what one step did not ask for is forgotten.

    Args:
        layout: of the whole list.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._before: dict[tuple[int, ...], Layout] = {}
        self._now: dict[tuple[int, ...], Layout] = {}

    def of(self, indices: Sequence[int]) -> Layout:
        """The layout of the tensors at these places in the whole list, as `Layout.subset`."""
        key = tuple(indices)
        if key not in self._now:
            self._now[key] = self._before.get(key) or self.layout.subset(key)
        return self._now[key]

    def next_step(self) -> None:
        """A step has ended: forget what it did not ask for."""
        self._before, self._now = self._now, {}


def _laid_out(places: Tensor, total: int, device: torch.device) -> Layout:
    """A layout whose table is on the host so far."""
    chunks = (places[:, 5:9].prod(1) + (CHUNK - 1)) // CHUNK
    tensors = torch.arange(len(places), device="cpu").repeat_interleave(chunks)
    first = (chunks.cumsum(0) - chunks)[tensors]
    work = torch.stack([tensors, (torch.arange(len(tensors), device="cpu") - first) * CHUNK], dim=1)
    return Layout(to_device(places, device), to_device(work, device), total, places)


def columns_of(local: Sequence[int], shard: Shard | None = None) -> int:
    """Weights of a row of a local tensor: groups of 8-bit storage lie inside it.

    Args:
        local: its shape.
        shard: where it lies in its full tensor; None where it is whole.
    """
    return math.prod(local[row_dims(shard.full if shard else local) :])


def row_dims(full: Sequence[int]) -> int:
    """How many leading dimensions of a full tensor count its rows.

    A row is what the last dimension counts, or as many of the last ones as hold a group of 8-bit storage, but the first
    is left out. A tensor of one dimension is one row.
    """
    first = max(len(full) - 1, 0)
    while first > 1 and math.prod(full[first:]) < GROUP:
        first -= 1
    return first


@lru_cache(maxsize=4096)
def _row(local: tuple[int, ...], shard: Shard | None) -> tuple[int, ...]:
    """A row of `Layout.places` without its base. Of thousands of tensors few shapes differ."""
    full, part, start = _collapse(local, shard)
    return 0, *full, *part, *start, columns_of(local, shard)


def _collapse(local: tuple[int, ...], shard: Shard | None) -> tuple[tuple[int, ...], ...]:
    """Full sizes, local sizes and starts in four right-aligned dimensions, whole trailing dimensions merged."""
    full = shard.full if shard else local
    start = shard.start if shard else (0,) * len(local)
    if not len(full) == len(start) == len(local) or any(s + n > f for f, n, s in zip(full, local, start, strict=True)):
        raise ValueError(f"a local tensor of shape {local} at {start} does not fit a full tensor of shape {full}")
    dims: list[list[int]] = [[1, 1, 0]]
    for f, n, s in zip(reversed(full), reversed(local), reversed(start), strict=True):
        f_in, n_in, _ = dims[-1]
        if f_in == n_in:
            dims[-1] = [f * f_in, n * n_in, s * f_in]
        else:
            dims.append([f, n, s])
    if len(dims) > 4:
        raise ValueError(
            f"a shard of shape {local} of {full} is split in {len(dims)} dimensions; at most 4 are supported"
        )
    dims += [[1, 1, 0]] * (4 - len(dims))
    return tuple(tuple(column) for column in zip(*reversed(dims), strict=True))
