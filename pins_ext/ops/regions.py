"""Cutoffs of many regions of tensors at once: operator calls don't grow with their number, and the host reads nothing.

They grow with the logarithm of the weights of a region, by one pass for every 12 bits beyond 24.

A region is a group of tensors whose weights compete with each other. Each has a bracket, int64 [5]: lowest and highest
value, width of a bin as a shift, key, stage. Stage 0 looks for the order key of the first weight that is kept, stage 1,
where a part of the weights of that key are pruned, for its global index; 2 is settled. A pass counts all regions
against their brackets, and of each the bin that holds the position is the next bracket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pins_ext.ops.bracket import MAX_INDEX, MAX_KEY
from pins_ext.ops.transfer import to_device

KEYS, TIES, SETTLED = 0, 1, 2
"""Stages of a bracket."""

MOST_BITS, COUNTS = 12, 1 << 22
"""Of a pass: log2 of the bins of a region, and counts of all regions, 32 MB."""

NEAR = 1 << 21
"""How far a cutoff is looked for around an earlier one, in keys: a quarter of the score."""

Count = Callable[[Tensor, Tensor], Tensor]
"""(counts int64 [r, 1 + bins], brackets int64 [r, 5]) -> the counts of all ranks, see `count_regions_`."""


def count_regions_(
    counts: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    regions: Tensor,
    brackets: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """Count the weights of each region against its bracket: what lies below it, and in each of its bins.

    Args:
        counts: int64 [r, 1 + bins]; written. The row of a settled bracket is zero.
        a: [n tensors], first operand of the score: float32 or bfloat16 for product and deviation, otherwise also
            float16; also a state in 8 bits, see `encode`.
        b: [n tensors], its second operand: in the dtype of a for product and deviation, any of the three for fisher,
            otherwise empty.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        score: one of `SCORES`.
        regions: int64 [n], region of each tensor, from 0 on.
        brackets: int64 [r, 5]: lowest and highest value, width of a bin as a shift, key, and stage: 0 counts order
            keys, 1 the global indices of the weights of the key, 2 nothing.
        factors: float32 [n], of the score fisher: 1 / (1 - beta2^t) of each tensor; None for the others.
        pointers: int64 [2, n], on a GPU: addresses of a and b; None to look them up, except while a CUDA graph is
            captured.

    Raises:
        RuntimeError: an unknown score, an argument of another dtype, shape or device, not contiguous, on the CPU a
            bracket that does not fit the bins or a region without one, an output that shares memory with a table.
    """
    torch.ops.pins_ext.count_regions_(
        counts, a, b, places, chunks, score, regions, brackets, factors=factors, pointers=pointers
    )


@dataclass(frozen=True)
class Regions:
    """Regions of one layout.

    Attributes:
        spans: int64 [2, r], lowest and highest global index of each.
        totals: how many weights each has.
        weights: the same, int64 [r] on the device.
        index_bits: of the widest span.
    """

    spans: Tensor
    totals: tuple[int, ...]
    weights: Tensor
    index_bits: int

    @staticmethod
    def of(spans: Sequence[tuple[int, int]], totals: Sequence[int], device: torch.device) -> Regions:
        """Lay out the tables of regions.

        Args:
            spans: lowest and highest global index of each region.
            totals: how many weights each has.
            device: where they are.
        """
        widest = max((last - first for first, last in spans), default=0)
        ends = torch.tensor(list(spans), dtype=torch.int64, device="cpu").reshape(-1, 2).t().contiguous()
        weights = torch.tensor(list(totals), dtype=torch.int64, device="cpu")
        # So that small models are stepped as large ones are.
        bits = max(2 * MOST_BITS, widest.bit_length())
        return Regions(to_device(ends, device), tuple(totals), to_device(weights, device), bits)


@dataclass(frozen=True)
class Bounds:
    """Least and most weights that are pruned of each tensor of a region.

    Attributes:
        owner: int64 [n], region of each tensor.
        low: int64 [n], least.
        high: int64 [n], most.
        sums: host values of (low, high), summed over each region.
        regions: the regions.
        tensors: each tensor as a region of its own.
    """

    owner: Tensor
    low: Tensor
    high: Tensor
    sums: tuple[tuple[int, int], ...]
    regions: Regions
    tensors: Regions

    def held(self, pruned: Tensor) -> Tensor:
        """Counts of pruned weights, int64 [n, ...], within the bounds."""
        shape = (-1,) + (1,) * (pruned.dim() - 1)
        return pruned.clamp(self.low.view(shape), self.high.view(shape))

    def summed(self, ends: Tensor) -> Tensor:
        """Weights that each region prunes, int64 [r, columns], from those below some ends of each tensor, [n, columns].

        Args:
            ends: without bounds.
        """
        return ends.new_zeros(len(self.sums), ends.shape[1]).index_add_(0, self.owner, self.held(ends))


def settled(brackets: Tensor) -> bool:
    """Whether no pass is needed any more and the host knows: on the CPU, where looking is free."""
    return brackets.is_cpu and _all_settled(brackets)


def _all_settled(brackets: Tensor) -> bool:
    return bool((brackets[:, 4] == SETTLED).all())


def search_bytes(counted: int, regions: int, bounded: bool, together: bool) -> int:
    """Bytes that a search asks for at most: counts, and what becomes of them.

    Args:
        counted: how many tensors or regions are counted; with bounds, tensors.
        regions: how many regions there are.
        bounded: whether tensors have bounds.
        together: whether several ranks count, so that their sums stand beside the counts.
    """
    row = 8 * (1 + (1 << _bits(counted)))
    # Counts, what lies below each bin, and with bounds the same held within them and summed over each region.
    return row * (counted * (2 + together + bounded) + (regions if bounded else 0))


def _bits(counted: int) -> int:
    """Log2 of the bins of each of so many rows of counts."""
    return max(4, min(MOST_BITS, (COUNTS // max(1, counted)).bit_length() - 1))


@dataclass(frozen=True)
class Search:
    """How to look for cutoffs.

    Attributes:
        count: a counting pass.
        exact: whether ties are broken by index; otherwise weights strictly below a key are pruned.
        together: whether several ranks count: all of them look at what is left to do, on a GPU, too.
    """

    count: Count
    exact: bool = True
    together: bool = False

    def cutoffs(self, regions: Regions, n_prune: Sequence[int], near: Tensor | None = None) -> Tensor:
        """The cutoff of each region, as `select` finds it for the region alone.

        Args:
            regions: the regions.
            n_prune: weights to prune in each.
            near: int64 [r, 2], earlier cutoffs, which the new ones are probably near.

        Returns:
            int64 [r, 2]: (order key, tie index).
        """
        rows = [self._row(n, total) for n, total in zip(n_prune, regions.totals, strict=True)]
        table = to_device(torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 6), regions.weights.device)
        brackets, position = table[:, :5], table[:, 5]
        found, _ = self._searched(regions, brackets, position, torch.zeros_like(position), near)
        if self.exact:
            return _cutoffs(found)
        key = found[:, 3]
        return torch.stack([torch.where(key == MAX_KEY, 0, key), torch.zeros_like(key)], 1)

    def bounded(
        self, bounds: Bounds, n_prune: Sequence[int], near: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cutoffs where each tensor keeps its own best, and then the best of the rest of a region up to its most.

        One level cuts through a region, and each tensor prunes what lies below it, but no less and no more than its
        bounds say. Tensors that the bounds hold have their own cutoff, the others that of the level.

        Args:
            bounds: of each tensor.
            n_prune: weights to prune in each region; as near to it as the bounds allow.
            near: earlier results of this.

        Returns:
            Cutoff of each tensor, int64 [n, 2], and of each region's level, int64 [r, 2].
        """
        rows = []
        for n, (least, most) in zip(n_prune, bounds.sums, strict=True):
            # Where the bounds leave no choice, no cutoff holds the position, and each tensor prunes its most.
            rows.append([0, MAX_KEY, 0, 0, KEYS, max(n, least)] if max(n, least) < most else _EVERYTHING)
        table = to_device(torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 6), bounds.owner.device)
        brackets, position = table[:, :5], table[:, 5]
        weights = bounds.tensors.weights
        base = torch.where(brackets[bounds.owner, 4] == SETTLED, weights, 0)
        before, own = near or (None, None)
        found, base = self._searched(bounds.regions, brackets, position, base, own, bounds)
        wanted = bounds.held(base)
        rows_of_tensors = _own_brackets(found[bounds.owner], wanted, base, weights)
        alone, _ = self._searched(bounds.tensors, rows_of_tensors, wanted, torch.zeros_like(base), before)
        return _cutoffs(alone), _cutoffs(found)

    def _row(self, n: int, total: int) -> list[int]:
        """A bracket of all keys, and the position that it is to hold; settled where no weight need be looked at."""
        if n <= 0 or total == 0:
            return [0, 0, 0, 0, SETTLED, 0]
        if self.exact and n >= total:
            return _EVERYTHING
        return [0, MAX_KEY, 0, 0, KEYS, min(n if self.exact else n - 1, total - 1)]

    def _searched(
        self,
        regions: Regions,
        brackets: Tensor,
        position: Tensor,
        base: Tensor,
        near: Tensor | None,
        bounds: Bounds | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Settled brackets, and weights below them of what is counted: [r], or with bounds [n].

        Args:
            regions: what competes.
            brackets: int64 [r, 5], to begin with.
            position: int64 [r], how many weights each cutoff prunes.
            base: weights below the brackets that are settled already.
            near: see `cutoffs`.
            bounds: tensors are counted, and summed within these.
        """
        counted = len(base)
        bits = _bits(counted)
        counts = base.new_empty(counted, 1 + (1 << bits))
        passes = -(-32 // bits) + -(-regions.index_bits // bits)
        if near is not None:
            brackets, passes = _around(near, brackets), passes + 1
        shape = _Shape(regions, bounds, bits, self.exact)
        brackets = shape.with_shifts(brackets)
        for _ in range(passes):
            if _all_settled(brackets) if self.together else settled(brackets):
                break
            rows = brackets if bounds is None else brackets[bounds.owner]
            brackets, base = shape.narrowed(brackets, self.count(counts, rows), position, base)
        return brackets, base


_EVERYTHING = [MAX_INDEX, 0, 0, MAX_KEY, SETTLED, 0]


def _cutoffs(brackets: Tensor) -> Tensor:
    """(order key, tie index), int64 [r, 2], of settled brackets; a list as an index would be an upload."""
    return torch.stack([brackets[:, 3], brackets[:, 0]], 1)


def _around(near: Tensor, brackets: Tensor) -> Tensor:
    """Brackets of keys around earlier cutoffs, but where there is nothing to look for."""
    key = near[:, 0]
    rest = brackets[:, 2:]
    found = torch.cat([(key - NEAR).clamp(min=0)[:, None], (key + NEAR - 1).clamp(max=MAX_KEY)[:, None], rest], 1)
    return torch.where(brackets[:, 4:] == KEYS, found, brackets)


def _own_brackets(level: Tensor, wanted: Tensor, below: Tensor, weights: Tensor) -> Tensor:
    """Of tensors that their bounds hold a bracket of all keys, of the others the settled one of the level.

    Args:
        level: int64 [n, 5], settled brackets.
        wanted: int64 [n], weights to prune of each tensor.
        below: int64 [n], weights below the level.
        weights: int64 [n], weights of each tensor.
    """
    held, none, every = wanted != below, wanted <= 0, wanted >= weights
    zero = torch.zeros_like(wanted)
    tie = torch.where(every, MAX_INDEX, zero)
    key = torch.where(every & ~none, MAX_KEY, zero)
    stage = torch.where(none | every, SETTLED, zero)
    own = torch.stack([tie * ~none, zero + MAX_KEY, zero, key, stage], 1)
    return torch.where(held[:, None], own, level)


@dataclass(frozen=True)
class _Shape:
    """How counts narrow brackets.

    Attributes:
        regions: what competes.
        bounds: of the tensors that are counted; None: regions are.
        bits: log2 of the bins.
        exact: see `Search`.
    """

    regions: Regions
    bounds: Bounds | None
    bits: int
    exact: bool

    def with_shifts(self, brackets: Tensor) -> Tensor:
        """The brackets with bins so wide that all values fit."""
        lo, hi, _, key, stage = brackets.unbind(1)
        return torch.stack([lo, hi, self._shift(lo, hi), key, stage], 1)

    def _shift(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Of a settled bracket, which may end below its beginning, anything."""
        # The exponent is the bit length, exact below 2^53.
        return ((hi - lo).double().frexp().exponent.long() - self.bits).clamp_(0, 62)

    def narrowed(self, brackets: Tensor, counts: Tensor, position: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """The bins that hold the positions, or, where none does, all keys on that side, and weights below them.

        Args:
            brackets: int64 [r, 5].
            counts: int64 [r or n, 1 + bins].
            position: int64 [r].
            base: int64 [r or n], weights of lower keys, in stage 1.
        """
        lo, hi, shift, key, stage = brackets.unbind(1)
        ends = counts.cumsum(1).add_(base[:, None])
        total = ends if self.bounds is None else self.bounds.summed(ends)
        chosen = torch.searchsorted(total, position[:, None].contiguous(), right=True)
        before = (chosen - 1).clamp_(min=0)
        begin = total.gather(1, before)[:, 0]
        own = ends.gather(1, before if self.bounds is None else before[self.bounds.owner])[:, 0]
        chosen = chosen[:, 0]
        missed_left, missed_right = chosen == 0, chosen == ends.shape[1]
        first = lo + ((chosen - 1) << shift)
        last = torch.minimum(first + (1 << shift) - 1, hi)
        lo = torch.where(missed_left, 0, torch.where(missed_right, hi + 1, first))
        hi = torch.where(missed_left, brackets[:, 0] - 1, torch.where(missed_right, MAX_KEY, last))
        one = (lo == hi) & ~missed_left & ~missed_right
        is_key = one & (stage == KEYS)
        tied = is_key & (begin < position) if self.exact else torch.zeros_like(is_key)
        key = torch.where(is_key, lo, key)
        # Of a key of which no weight is pruned the tie is 0.
        lo = torch.where(is_key, torch.where(tied, self.regions.spans[0], 0), lo)
        hi = torch.where(tied, self.regions.spans[1], hi)
        over = one & ~tied
        stage_after = stage + tied + over * (SETTLED - stage)
        done = stage == SETTLED
        found = torch.stack([lo, hi, self._shift(lo, hi), key, stage_after], 1)
        after = torch.where(done[:, None], brackets, found)
        moved = one & ~done
        return after, torch.where(moved if self.bounds is None else moved[self.bounds.owner], own, base)
