"""What competes in tensors that have a pattern, weights of groups N:M or blocks, and the masks that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.shards import local, shard_of
from pins_ext.patterns import Fit
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.scores import Operands

BATCH = 1 << 22
"""Weights whose scores are written out at a time where no selection needs all of them; in groups N:M a larger tensor is
one batch."""

_FLOAT32 = 4


class Units:
    """Places of what competes in a list of tensors of which some have a pattern.

    Args:
        parameters: the pruned tensors, DTensors or plain.
        names: theirs.
        fits: the pattern of each, None where it has none.
        weights: the places of their weights.

    Attributes:
        layout: the places of blocks among all blocks, and of weights of other tensors among all weights.
        plain: places in the list of the tensors without a pattern.
        grouped: of those in groups N:M.
        blocked: of those in blocks.
    """

    def __init__(
        self, parameters: Sequence[Tensor], names: Sequence[str], fits: Sequence[Fit | None], weights: ops.Layout
    ) -> None:
        self.fits, self.weights = list(fits), weights
        self.layout = _layout(parameters, names, fits).on(weights.places.device)
        self.plain = [i for i, fit in enumerate(fits) if fit is None]
        self.grouped = [i for i, fit in enumerate(fits) if fit is not None and fit.pattern.grouped]
        self.blocked = [i for i, fit in enumerate(fits) if fit is not None and not fit.pattern.grouped]
        self._shapes = [local(p).shape for p in parameters]
        self._groups = [_group(fit, shape) for fit, shape in zip(fits, self._shapes, strict=True)]
        self._places: dict[tuple[int, ...], tuple[Tensor, Tensor, ops.Layout]] = {}

    def scored(self, score: Operands) -> ScoredUnits:
        """The scores of the units, from those of the weights."""
        return ScoredUnits(self, score)

    def at(self, members: Sequence[int]) -> tuple[Tensor, Tensor, ops.Layout]:
        """Of some tensors, on the device: their places in the list, rows of `eligible_`'s groups, places of weights."""
        key = tuple(members)
        if key not in self._places:
            device = self.weights.places.device
            indices = ops.to_device(torch.tensor(key, dtype=torch.int64, device="cpu"), device)
            groups = ops.to_device(
                torch.tensor([self._groups[i] for i in key], dtype=torch.int64, device="cpu"), device
            )
            self._places[key] = indices, groups, self.weights.subset(key)
        return self._places[key]

    def batches(self) -> Iterator[list[int]]:
        """The tensors in groups N:M, some at a time."""
        batch: list[int] = []
        for i in self.grouped:
            if batch and sum(self._shapes[j].numel() for j in [*batch, i]) > BATCH:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def shape(self, i: int) -> torch.Size:
        """Of this rank's part of a tensor."""
        return self._shapes[i]


class ScoredUnits:
    """The scores of what competes in tensors that have a pattern, float32, made when they are asked for.

    Of N:M, the shape of the tensor, see `ops.eligible_`: the N best of a group can't be pruned. Of blocks, one score
    each: the sum.

    Args:
        units: places of the units.
        score: of the weights.
    """

    def __init__(self, units: Units, score: Operands) -> None:
        self.units, self.score = units, score
        self._held: dict[int, Tensor] = {}
        self._nans: dict[int, Tensor] = {}

    def hold(self, members: Sequence[int]) -> list[Tensor]:
        """Scores of the units of these tensors, all in groups N:M or all in blocks, kept for `pack`."""
        if not members:
            return []
        fit = self.units.fits[members[0]]
        assert fit is not None
        if not fit.pattern.grouped:
            summed = [self._sums(i) for i in members]
            found, nans = [sums for sums, _ in summed], [count for _, count in summed]
        else:
            found, of_all = self._eligible(members)
            nans = list(of_all.split(1))
        self._nans |= dict(zip(members, nans, strict=True))
        self._held |= dict(zip(members, found, strict=True))
        return found

    def pack(self, bits: list[Tensor], stats: Tensor, cutoff: Tensor) -> None:
        """Write masks.

        Args:
            bits: packed masks of all tensors; written.
            stats: int64 [n, 3], see `ops.pack_`; written.
            cutoff: int64 [n, 2], of the units of each tensor.
        """
        units = self.units
        if units.plain:
            kind, a, b, factors = self._operands(units.plain)
            self._pack(units.plain, bits, stats, cutoff, kind, a, b, factors)
        for batch in [[i for i in units.grouped if i in self._held], *self._batches()]:
            if not batch:
                continue
            if batch[0] in self._held:
                scores, nans = [self._held[i] for i in batch], torch.cat([self._nans[i] for i in batch])
            else:
                scores, nans = self._eligible(batch)
            self._pack(batch, bits, stats, cutoff, "identity", scores, [], nans=nans)
        for i in units.blocked:
            self._pack_blocks(i, bits, stats, cutoff)

    def _batches(self) -> Iterator[list[int]]:
        for batch in self.units.batches():
            yield [i for i in batch if i not in self._held]

    def _operands(self, members: Sequence[int]) -> tuple[str, list[Tensor], list[Tensor], Tensor | None]:
        kind, a, b, factors = self.score[:4]
        own = None if factors is None else factors[self.units.at(members)[0]]
        return kind, [a[i] for i in members], [b[i] for i in members] if b else [], own

    def _eligible(self, members: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Scores of groups N:M, and how many of each tensor are NaN."""
        kind, a, b, factors = self._operands(members)
        _, groups, layout = self.units.at(members)
        # One piece of memory: a step asks for it and gives it back.
        whole = torch.empty(sum(self.units.shape(i).numel() for i in members), device=groups.device)
        parts = whole.split([self.units.shape(i).numel() for i in members])
        nans = torch.empty(len(members), dtype=torch.int64, device=groups.device)
        tables = (layout.places, layout.chunks)
        torch.ops.pins_ext.eligible_(list(parts), nans, a, b, *tables, kind, groups, factors=factors)
        return list(parts), nans

    def _pack(
        self,
        members: Sequence[int],
        bits: list[Tensor],
        stats: Tensor,
        cutoff: Tensor,
        kind: str,
        a: list[Tensor],
        b: list[Tensor],
        factors: Tensor | None = None,
        nans: Tensor | None = None,
    ) -> None:
        """Masks of some tensors from the scores of their weights."""
        indices, _, layout = self.units.at(members)
        rows = torch.empty(len(members), 3, dtype=torch.int64, device=cutoff.device)
        operands = (a, b, layout.places, layout.chunks, kind, cutoff[indices])
        torch.ops.pins_ext.pack_([bits[i] for i in members], rows, *operands, factors=factors)
        if nans is not None:
            rows[:, 2] = nans
        stats[indices] = rows

    def _pack_blocks(self, i: int, bits: list[Tensor], stats: Tensor, cutoff: Tensor) -> None:
        fit = self.units.fits[i]
        assert fit is not None
        sums, nans = (self._held[i], self._nans[i]) if i in self._held else self._sums(i)
        layout, above = self.units.layout.subset([i]), ops.new_mask(sums)
        tables = (layout.places, layout.chunks)
        torch.ops.pins_ext.pack_(
            [above], torch.empty_like(stats[:1]), [sums], [], *tables, "identity", cutoff[i : i + 1]
        )
        a, b = fit.cells
        kept = ops.unpack_bits(above, sums.shape).repeat_interleave(a, -2).repeat_interleave(b, -1)
        # Above zero is kept.
        one = ops.to_device(torch.tensor([[0x80000001, 0]], device="cpu"), cutoff.device).expand(len(stats), 2)
        self._pack([i], bits, stats, one, "identity", [kept.bfloat16()], [], nans=nans)

    def _sums(self, i: int) -> tuple[Tensor, Tensor]:
        """Scores of blocks, float32, and how many of their weights' are NaN, int64 [1]; some rows at a time."""
        fit, shape = self.units.fits[i], self.units.shape(i)
        assert fit is not None
        rows = fit.cells[0] * max(1, BATCH // max(1, fit.cells[0] * shape[-1]))
        sums, nans = [], torch.zeros(1, dtype=torch.int64, device=self.units.weights.places.device)
        for weights in _by_rows(self.score, i, shape, rows):
            sums.append(block_sums(weights, fit))
            nans += weights.isnan().sum()
        return torch.cat(sums).view(fit.divided(shape)), nans


def units_bytes(fits: Sequence[Fit | None], shapes: Sequence[Sequence[int]], config: PruneConfig) -> int:
    """Bytes that patterns ask for, at most, while a mask is chosen; between masks they hold nothing.

    Args:
        fits: the pattern of each tensor, None where it has none.
        shapes: of this rank's part of each.
        config: says how the scores are stored.
    """
    pairs = [(fit, math.prod(shape)) for fit, shape in zip(fits, shapes, strict=True) if fit is not None]
    held = sum(_FLOAT32 * n // math.prod(fit.pattern.block) for fit, n in pairs)
    # A batch of blocks: scores, the same in float64, half of that; then a tensor's mask, as bytes and bfloat16.
    largest = max([n for fit, n in pairs if not fit.pattern.grouped], default=0)
    working = max(4 * _FLOAT32 * min(largest, BATCH), _FLOAT32 * largest)
    # A tensor's states: one decoded, and what decoding the other takes.
    decoded = 6 * _FLOAT32 * largest if config.dtype in ops.CODED else 0
    return held + working + decoded


def _group(fit: Fit | None, shape: Sequence[int]) -> tuple[int, int, int]:
    """A row of the groups of `eligible_`; nothing where the pattern is not N:M."""
    if fit is None or not fit.pattern.grouped:
        return 0, 0, 0
    return fit.pattern.keep, fit.pattern.of, 1 if fit.axis == -1 else max(1, shape[-1])


def _layout(parameters: Sequence[Tensor], names: Sequence[str], fits: Sequence[Fit | None]) -> ops.Layout:
    """The places of blocks among all blocks, and of weights of other tensors among all weights."""
    tensors, shards = [], []
    for name, p, fit in zip(names, parameters, fits, strict=True):
        shard, part = shard_of(name, p), local(p)
        if fit is not None and not fit.pattern.grouped:
            part = part.new_empty(fit.divided(part.shape))
            shard = shard and ops.Shard(fit.divided(shard.full), fit.divided(shard.start))
        tensors.append(part)
        shards.append(shard)
    return ops.Layout.of(tensors, shards)


def _by_rows(score: Operands, i: int, shape: torch.Size, rows: int) -> Iterator[Tensor]:
    """`values` of some rows of one tensor at a time, [rows, columns]; stacks of matrices one after another."""
    if any(operand[i].dtype in ops.CODED for operand in (score.a, score.b) if operand):
        score = Operands("identity", [values(score, i)], [])
        i = 0
    matrix = math.prod(shape[:-1]), shape[-1]
    a = score.a[i].view(matrix).split(rows)
    b = score.b[i].view(matrix).split(rows) if score.b else a
    factors = None if score.factors is None else score.factors[i : i + 1]
    for x, y in zip(a, b, strict=True):
        yield values(Operands(score.kind, [x], [y] if score.b else [], factors), 0)


def values(score: Operands, i: int) -> Tensor:
    """Score of each weight of one tensor, float32: what the operators compute from the same operands."""
    kind, a, b = score.kind, _plain(score, score.a[i], i), _plain(score, score.b[i], i) if score.b else None
    if kind == "identity":
        return a
    if kind == "magnitude":
        return a.abs()
    assert b is not None
    if kind == "fisher":
        assert score.factors is not None
        return (a * a) * (b * score.factors[i])
    return a * b if kind == "product" else a * (b - a).abs()


def _plain(score: Operands, operand: Tensor, i: int) -> Tensor:
    """One tensor's operand in float32."""
    if operand.dtype not in ops.CODED:
        return operand.float()
    return ops.decode(operand, score.shapes[i])


def block_sums(weights: Tensor, fit: Fit) -> Tensor:
    """The sum of the scores of each block, float32: in float64 by halves onto halves, the same on every device.

    To first order the loss changes by the sum of what is pruned, so it is blocks with the lowest sums that go.
    """
    sums = fit.split(weights.double())
    for dim in (-1, -3):
        while (n := sums.shape[dim]) > 1:
            half = (n + 1) // 2
            low, high = sums.narrow(dim, 0, half), sums.narrow(dim, half, n - half)
            together = low.clone()
            together.narrow(dim, 0, n - half).add_(high)
            sums = together
    return sums.squeeze(-1).squeeze(-2).float()
