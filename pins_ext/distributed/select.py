"""The exact n-th smallest score of weights that lie on many ranks: each reads its own, counts are summed.

A selection costs one all-reduce of 65,537 counts and one all-gather of a bin's candidates. A threshold that has left
the bracket around the last one costs one more of the first; so many candidates that they don't fit, because most are
tied, one more of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.ops.bracket import BINS, MAX_INDEX, MAX_KEY
from pins_ext.ops.select import Scored, choose, position_of

ROOM = 1024
"""Least candidates that a rank can send: 64 ranks then gather 1 MB. A bin holds some hundred per rank of 70 G."""

_SLICE = 1 << 19
"""Bytes of a mask whose ties are listed at a time."""


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
    scored = _Spread(
        a, b, layout.places, layout.chunks, score, None, position, total, scratch, factors, ranks=ranks, layout=layout
    )
    return choose(scored, n_prune, exact, bracket, counts)


@dataclass(frozen=True)
class _Spread(Scored):
    """Operands of which this rank holds a part."""

    ranks: Ranks
    layout: ops.Layout

    def looked(self, flag: Tensor) -> bool:
        """See Scored: every rank looks, and sees the same."""
        return bool(flag)

    def summed(self, counts: Tensor) -> Tensor:
        """See Scored."""
        return self.ranks.sum(counts)

    def begun(self, missed: Tensor | None = None) -> Tensor:
        """See Scored: a sample would be another collective, so the side that was missed, or all keys."""
        if missed is not None:
            return missed
        return torch.tensor([0, MAX_KEY, 16, 0, 0]).to(self.places.device)

    def candidates(self, bracket: Tensor) -> tuple[Tensor, Tensor]:
        """See Scored."""
        room = max(ROOM, ops.CANDIDATES // self.ranks.size)
        own = self.places.new_full((2, room + 1), MAX_INDEX)
        candidates = self.places.new_full((2, room), MAX_INDEX)
        found = self.places.new_zeros(1)
        torch.ops.pins_ext.collect_(found, candidates, *self._operands, bracket, factors=self.factors)
        own[:, 0], own[:, 1:] = found, candidates
        every = self.ranks.gather(own)
        fits = (every[:, 0, 0] <= room).all()
        together = every[:, :, 1:].movedim(0, 1).reshape(2, -1)
        # Too many for one of the ranks are too many.
        return together, torch.where(fits, every[:, 0, 0].sum(), MAX_INDEX)

    def tie_index(self, bracket: Tensor) -> Tensor:
        """See Scored: counts of ties by ever smaller bins of the global index, until a bin is one index."""
        key, rank = int(bracket[0]), int(bracket[3])
        if rank <= 0:
            return torch.zeros_like(bracket[0])
        begin, end = 0, self.layout.total
        while end - begin > 1:
            width = -(-(end - begin) // BINS)
            counts = torch.zeros(BINS, dtype=torch.int64, device=self.places.device)
            for index in self._ties(key):
                inside = index[(index >= begin) & (index < end)]
                counts += torch.bincount((inside - begin) // width, minlength=BINS)
            ends = self.summed(counts).cumsum(0)
            chosen = int(torch.searchsorted(ends, rank, right=True))
            rank -= int(ends[chosen - 1]) if chosen else 0
            begin += chosen * width
            end = min(begin + width, end)
        return torch.full_like(bracket[0], begin)

    def _ties(self, key: int) -> Iterator[Tensor]:
        """Global indices of this rank's weights of one key, int64, some at a time."""
        first, last = torch.tensor([[[key, 0]], [[key, MAX_INDEX]]]).to(self.places.device)
        for i, a in enumerate(self.a):
            layout, b = self.layout.subset([i]), self.b[i : i + 1]
            stats = self.places.new_empty(1, 3)
            own = None if self.factors is None else self.factors[i : i + 1]
            kept = []
            for cutoff in (first, last):
                kept.append(torch.zeros(ops.mask_bytes(layout.numel(0)), dtype=torch.uint8, device=a.device))
                torch.ops.pins_ext.pack_(
                    [kept[-1]], stats, [a], b, layout.places, layout.chunks, self.score, cutoff, factors=own
                )
            ties = kept[0] ^ kept[1]
            for begin in range(0, len(ties), _SLICE):
                part = ties[begin : begin + _SLICE]
                flat = ops.unpack_bits(part, (8 * len(part),)).nonzero().flatten()
                yield layout.global_index(0, flat + 8 * begin)
