"""The exact n-th smallest score of weights that lie on many ranks: each reads its own, counts are summed.

A selection costs one all-reduce of 65,537 counts and one all-gather of a bin's few weights. A threshold that has left
the bracket around the last one, or a bin that holds too many, costs one all-reduce more; a key that too many weights
share, two in place of the all-gather. Each rank lists its own weights of the bin at once: what follows reads the list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.ops.bracket import BINS, MAX_INDEX, MAX_KEY
from pins_ext.ops.select import Scored, position_of

GATHERED = 1 << 17
"""Most pairs of key and index that an all-gather brings to a rank, 2 MB: a bin's weights, times the ranks."""

ROOM = 1024
"""Weights of a bin that are gathered however many ranks there are: a bin holds some hundred per rank of 70 G."""

LISTED = 1 << 18
"""Most weights of a bin that a rank lists for itself, 4 MB; where there are more, it reads its scores again."""

_SLICE = 1 << 14
"""Bytes of a mask whose ties are listed at a time."""

_PAIR = 16
"""Bytes of a key and an index."""

_ALL_KEYS = (0, MAX_KEY, 16, 0, 0)

pins = torch.ops.pins_ext


def select(
    ranks: Ranks,
    a: list[Tensor],
    b: list[Tensor],
    layout: ops.Layout,
    score: str,
    n_prune: Tensor,
    total: int,
    exact: bool = True,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """`pins_ext::select` over the operands of all ranks; every rank calls it and gets the same cutoff.

    The host looks at what was found, on a GPU too: whether further collectives are needed must be known to all.

    Args:
        ranks: the processes.
        a: first operand of the score, the parts that this rank counts, see the operators.
        b: second operand, likewise.
        layout: theirs.
        score: kind of the score.
        n_prune: int64 [], how many weights of all are pruned.
        total: how many weights compete.
        exact: see the operator.
        bracket: to count in first, the same on every rank; None: all scores.
        counts: of the operands in this bracket, where a pass has made them already.
        factors: float32 [n], of the score fisher.

    Returns:
        The cutoff, int64 [2]: (order key, tie index).
    """
    scratch = torch.empty(1 + BINS, dtype=torch.int64, device=layout.places.device)
    position = position_of(n_prune, total, exact)
    scored = Scored(a, b, layout.places, layout.chunks, score, None, position, total, scratch, factors)
    key, tie = _Search(ranks, scored, layout).settled(bracket, counts, exact)
    return pins.cutoff(key, tie, n_prune, total, exact)


def most_bytes(size: int, parts: Sequence[int], total: int) -> int:
    """Bytes that a rank asks for in `select` where it asks for most: a key that very many weights share.

    Usually they are three times the counts, 1.6 MB.

    Args:
        size: how many ranks.
        parts: weights of each tensor on this rank.
        total: weights of all ranks.
    """
    counts, here = 8 * (1 + BINS), sum(parts)
    room = min(_room(size), total)
    # What every rank sent, once more as gloo sent it and as it is ordered; this rank's own, with and without padding.
    gathered = counts + _PAIR * (3 * size * room + room + min(room, here))
    # The list, and while it is narrowed to a key a flag and a place of each weight, and those that remain.
    listed = 2 * counts + (2 * _PAIR + 1 + 8) * min(LISTED, here)
    # Counts of a range of indices, two masks of a tensor, and what becomes of a slice's bits: indices by steps.
    indices = 3 * 8 * max(BINS, math.isqrt(total) + 1)
    read = counts + indices + 2 * ops.mask_bytes(max(parts, default=0)) + 64 * min(8 * _SLICE, here)
    return max(gathered, listed, read if here > LISTED else 0)


def _room(size: int) -> int:
    """How many weights of a bin are gathered at most."""
    return max(ROOM, GATHERED // size)


@dataclass(frozen=True)
class _Bin:
    """The weights between two keys, among which is the one that is looked for.

    Attributes:
        bracket: the keys, and its rank among these weights.
        everywhere: how many weights of all ranks.
        here: how many of this rank.
        listed: int64 [2, here], keys and global indices of this rank's; None: too many.
    """

    bracket: Tensor
    everywhere: int
    here: int
    listed: Tensor | None = None


class _Search:
    """One selection.

    Args:
        ranks: the processes.
        scored: operands of which this rank holds a part.
        layout: theirs.
    """

    def __init__(self, ranks: Ranks, scored: Scored, layout: ops.Layout) -> None:
        self._ranks, self._scored, self._layout = ranks, scored, layout
        self._room = _room(ranks.size)

    def settled(self, bracket: Tensor | None, counts: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
        """The bracket of one key, and the tie index, int64 [1], see `pins_ext::settle`."""
        found = self._listed(self._bin_of(bracket, counts))
        if found.everywhere > self._room:
            found = self._key_of(found)
            rank = int(found.bracket[3])
            if found.everywhere > self._room or rank <= 0 or not exact:
                index = self._tie_index(found, rank) if rank > 0 and exact else 0
                return found.bracket, found.bracket.new_full((1,), index)
        return self._gathered(found)

    def _bin_of(self, bracket: Tensor | None, counts: Tensor | None) -> _Bin:
        """A bin around the threshold; where it has left the bracket, from all keys on that side."""
        if bracket is None:
            # No sample to begin with, which would be another collective.
            bracket, counts = (
                ops.to_device(torch.tensor([0, MAX_KEY, 16, 0, 0], device="cpu"), self._scored.places.device),
                None,
            )
        position = self._scored.position
        found = self._narrowed(bracket, self._counts(bracket) if counts is None else counts, position)
        if isinstance(found, _Bin):
            return found
        found = self._narrowed(found, self._counts(found), position)
        assert isinstance(found, _Bin)
        return found

    def _key_of(self, found: _Bin) -> _Bin:
        """The key of the weight that is looked for, and the weights that share it."""
        if bool(found.bracket[0] == found.bracket[1]):
            return found
        counts = self._counts(found.bracket) if found.listed is None else _counted(found.listed[0], found.bracket)
        # The rank is one among the weights of the bin.
        counts[0] = 0
        key = self._narrowed(found.bracket, counts, found.bracket[3])
        assert isinstance(key, _Bin)
        if found.listed is None:
            return self._listed(key)
        return replace(key, listed=found.listed[:, found.listed[0] == key.bracket[0]])

    def _counts(self, bracket: Tensor) -> Tensor:
        """Of this rank's weights, see `pins_ext::count_`."""
        scored = self._scored
        pins.count_(scored.scratch, *scored.operands, bracket, factors=scored.factors)
        return scored.scratch

    def _narrowed(self, bracket: Tensor, counts: Tensor, position: Tensor) -> _Bin | Tensor:
        """The bin that holds a position; a bracket of the missed side where none does."""
        everywhere = self._ranks.sum(counts)
        found = _unresolved(pins.narrow(bracket, everywhere, position))
        if bool((found[0] < bracket[0]) | (found[1] > bracket[1])):
            return found
        place = 1 + ((found[0] - bracket[0]) >> bracket[2])
        return _Bin(found, int(everywhere[place]), int(counts[place]))

    def _listed(self, found: _Bin) -> _Bin:
        """The bin with this rank's weights, if they aren't too many."""
        if found.here > LISTED and found.everywhere > self._room:
            return found
        scored, number = self._scored, found.bracket.new_zeros(1)
        listed = found.bracket.new_empty(2, found.here)
        if found.here:
            pins.collect_(number, listed, *scored.operands, found.bracket, factors=scored.factors)
        return replace(found, listed=listed)

    def _gathered(self, found: _Bin) -> tuple[Tensor, Tensor]:
        """The key and the tie index, from the weights of all ranks."""
        assert found.listed is not None
        own = found.bracket.new_full((2, found.everywhere), MAX_INDEX)
        own[:, : found.here] = found.listed
        every = self._ranks.gather(own).movedim(0, 1).reshape(2, -1).contiguous()
        key, tie = pins.settle(found.bracket, every, found.bracket.new_tensor([found.everywhere]))
        return key, tie

    def _tie_index(self, found: _Bin, rank: int) -> int:
        """Of the weight of this rank among those of one key: counts by ever smaller bins of the global index."""
        begin, end = 0, self._layout.total
        bins = max(BINS, math.isqrt(end) + 1)
        while end - begin > 1:
            width = -(-(end - begin) // bins)
            counts = torch.zeros(bins, dtype=torch.int64, device=found.bracket.device)
            for index in self._ties(found, begin, end):
                inside = index[(index >= begin) & (index < end)]
                counts += torch.bincount((inside - begin) // width, minlength=bins)
            ends = self._ranks.sum(counts).cumsum(0)
            chosen = int(torch.searchsorted(ends, rank, right=True))
            rank -= int(ends[chosen - 1]) if chosen else 0
            begin += chosen * width
            end = min(begin + width, end)
        return begin

    def _ties(self, found: _Bin, begin: int, end: int) -> Iterator[Tensor]:
        """Global indices of this rank's weights of one key, int64, some at a time; at least those in a range."""
        if found.listed is not None:
            yield found.listed[1]
            return
        scored, key = self._scored, int(found.bracket[0])
        cutoffs = ops.to_device(torch.tensor([[[key, 0]], [[key, MAX_INDEX]]], device="cpu"), found.bracket.device)
        for i in self._layout.within(begin, end):
            layout, b = self._layout.subset([i]), scored.b[i : i + 1]
            stats = found.bracket.new_empty(1, 3)
            own = None if scored.factors is None else scored.factors[i : i + 1]
            kept = []
            for cutoff in cutoffs:
                kept.append(torch.zeros(ops.mask_bytes(layout.numel(0)), dtype=torch.uint8, device=cutoff.device))
                operands = (scored.a[i : i + 1], b, layout.places, layout.chunks, scored.score)
                pins.pack_([kept[-1]], stats, *operands, cutoff, factors=own)
            for first in range(0, len(kept[0]), _SLICE):
                part = kept[0][first : first + _SLICE] ^ kept[1][first : first + _SLICE]
                # Most bytes hold none.
                bytes_ = part.nonzero().flatten()
                bits = ops.unpack_bits(part[bytes_], (len(bytes_), 8)).nonzero()
                yield layout.global_index(0, 8 * (first + bytes_[bits[:, 0]]) + bits[:, 1])


def _counted(keys: Tensor, bracket: Tensor) -> Tensor:
    """Counts of keys inside a bracket, see `pins_ext::count_`."""
    counts = torch.bincount((keys - bracket[0]) >> bracket[2], minlength=BINS)
    return torch.nn.functional.pad(counts, (1, 0))


def _unresolved(bracket: Tensor) -> Tensor:
    """A bracket that passes read even where it is a single key."""
    found = bracket.clone()
    found[4] = 0
    return found
