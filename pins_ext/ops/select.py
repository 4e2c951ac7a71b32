"""The exact n-th smallest score over all tensors, by counting passes driven from here: ranks can sum the counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 65536
"""Bins of a counting pass: two passes resolve any bracket of 32-bit keys to one key."""

SAMPLES = 16384
"""Keys drawn to bracket the threshold before the first counting pass: about 4 % of the weights then fall inside it.

65536 would halve that, but sorting them takes torch's parallel sort, whose many barriers cost 0.1 to 0.5 s wherever
another process wants a core.
"""

CANDIDATES = 16384
"""Weights ordered one by one at the end of a selection. The threshold's bin holds fewer, some ten of 85 M and some
thousand of 7 G, unless many are tied.
"""

MAX_KEY = 0xFFFFFFFF
MAX_INDEX = torch.iinfo(torch.int64).max


def _bracket(lo: Tensor, hi: Tensor, rank: Tensor, resolved: Tensor) -> Tensor:
    """int64 [5]: lowest and highest key, bin width as a shift, rank of the target from `lo`, 1 once it is one key."""
    width = hi - lo
    steps = torch.arange(17, device=lo.device)
    shift = ((width >> steps) >= BINS).sum()
    return torch.stack([lo, hi, shift, rank, resolved.to(torch.int64)])


def bracket_of(keys: Tensor, n_prune: Tensor, total: Tensor | int) -> Tensor:
    """Bracket the key of rank `n_prune` among `total` weights by six standard deviations of a sample's rank.

    Args:
        keys: int64 [m], a sample of the order keys. n_prune, total: int64 scalars.
    """
    m = keys.numel()
    ordered = keys.sort().values
    share = n_prune.double() / total
    spread = 6 * (share * (1 - share) * m).clamp(min=1).sqrt() + 2
    first = (share * m - spread).floor().clamp(0, m - 1).long()
    last = (share * m + spread).ceil().clamp(0, m - 1).long()
    zero = torch.zeros((), dtype=torch.int64, device=keys.device)
    return _bracket(ordered[first], ordered[last], zero, zero)


def bracket_around(threshold: Tensor, octaves: float = 0.125) -> Tensor:
    """Bracket the keys within this many octaves of an earlier threshold, for a score that moves slowly."""
    reach = int(octaves * (1 << 23))
    key = threshold[..., 0].reshape(())
    zero = torch.zeros((), dtype=torch.int64, device=key.device)
    return _bracket((key - reach).clamp(min=0), (key + reach).clamp(max=MAX_KEY), zero, zero)


def narrow(bracket: Tensor, counts: Tensor, position: Tensor) -> Tensor:
    """The bracket after a counting pass: the bin that holds `position`, or, on a miss, all keys on the missed side."""
    lo, hi, shift, _, resolved = bracket.unbind()
    ends = counts[1:].cumsum(0)
    rank = position - counts[0]
    chosen = torch.searchsorted(ends, rank.clamp(min=0), right=True).clamp(max=BINS - 1)
    before = ends[chosen] - counts[1:][chosen]
    bin_lo = lo + (chosen << shift)
    bin_hi = torch.minimum(bin_lo + (torch.ones_like(shift) << shift) - 1, hi)
    low, high = rank < 0, rank >= ends[-1]
    new_lo = torch.where(low, 0, torch.where(high, hi + 1, bin_lo))
    new_hi = torch.where(low, lo - 1, torch.where(high, MAX_KEY, bin_hi))
    new_rank = torch.where(low, position, torch.where(high, rank - ends[-1], rank - before))
    hit = ~(low | high)
    return torch.where(resolved == 1, bracket, _bracket(new_lo, new_hi, new_rank, hit & (new_lo == new_hi)))


@dataclass(frozen=True)
class Scored:
    """The operands of a selection, and the operators that read them.

    Attributes:
        a: operands of the score, see the operators.
        b: its second operands, where it has two.
        places, chunks: layout of the tensors.
        score: kind of the score.
        pointers: addresses of the tensors, for a GPU.
        position: int64 [], rank of the weight that is looked for, in the order of (score, global index).
        total: how many weights compete.
        scratch: int64 [1 + BINS], for counts.
        factors: float32 [n], of the score fisher.
    """

    a: list[Tensor]
    b: list[Tensor]
    places: Tensor
    chunks: Tensor
    score: str
    pointers: Tensor | None
    position: Tensor
    total: int
    scratch: Tensor
    factors: Tensor | None

    @property
    def _operands(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, str]:
        return self.a, self.b, self.places, self.chunks, self.score

    @property
    def _keywords(self) -> dict[str, Tensor | None]:
        return {"factors": self.factors, "pointers": self.pointers}

    def looked(self, flag: Tensor) -> bool:
        """Whether the flag is set and the host knows: on the CPU, where looking is free."""
        return flag.is_cpu and bool(flag)

    def summed(self, counts: Tensor) -> Tensor:
        """The counts of all weights that compete, from those of a pass over the operands."""
        return counts

    def begun(self, missed: Tensor | None = None) -> Tensor:
        """A bracket to begin with, from a sample.

        Args:
            missed: the side on which the target lies of a bracket that was counted before.
        """
        size = min(SAMPLES, self.total)
        keys = torch.ops.pins_ext.sample(*self._operands, size, **self._keywords)
        return bracket_of(keys, self.position, self.total)

    def counted(self, bracket: Tensor) -> Tensor:
        """The bracket after a counting pass; one key is left as it is, and no weight is read for it."""
        if self.looked(bracket[4]):
            return bracket
        torch.ops.pins_ext.count_(self.scratch, *self._operands, bracket, **self._keywords)
        return narrow(bracket, self.summed(self.scratch), self.position)

    def candidates(self, bracket: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and global indices of the weights inside the bracket, int64 [2, m], in any order, and how many they are.

        Past these weights both are MAX_INDEX; where more are found than fit, they are not all there.
        """
        candidates = self.places.new_full((2, CANDIDATES), MAX_INDEX)
        found = self.places.new_zeros(1)
        torch.ops.pins_ext.collect_(found, candidates, *self._operands, bracket, **self._keywords)
        if found.is_cpu:
            candidates = candidates[:, : max(1, int(found))]
        return candidates, found[0]

    def collected(self, bracket: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Key and tie index of the weight at the bracket's rank, and whether there were few enough to tell."""
        candidates, found = self.candidates(bracket)
        keys, index = candidates[:, candidates[1].argsort()]
        keys, order = keys.sort(stable=True)
        rank = bracket[3].clamp(0, keys.numel() - 1)
        key, tied = keys[rank], (rank > 0) & (keys[rank - 1] == keys[rank])
        return key, torch.where(tied, index[order[rank]], 0), (found > 0) & (found <= CANDIDATES)

    def tie_index(self, bracket: Tensor) -> Tensor:
        """Of the weight at the bracket's rank among those of its one key."""
        return torch.ops.pins_ext.tie_index(*self._operands, bracket, **self._keywords).reshape(())


def _bin_of(scored: Scored, bracket: Tensor | None, counts: Tensor | None) -> Tensor:
    """A bracket of one bin around the threshold.

    From the bracket that is given, whose counts may have ridden on the fold; where the threshold has left it, or
    without one, from another and one pass more.
    """
    if bracket is None:
        return scored.counted(scored.begun())
    found = scored.counted(bracket) if counts is None else narrow(bracket, scored.summed(counts), scored.position)
    hit = (found[0] >= bracket[0]) & (found[1] <= bracket[1])
    if scored.looked(hit):
        return found
    begun = scored.begun(found)
    # Marked as one key, a bracket costs no pass.
    begun[4] = hit
    return torch.where(hit, found, scored.counted(begun))


def choose(scored: Scored, n_prune: Tensor, exact: bool, bracket: Tensor | None, counts: Tensor | None) -> Tensor:
    """The cutoff below which `n_prune` weights lie, see `select`.

    A bin around the threshold, then its few weights one by one. Only where they are many, because most are tied or the
    bracket misled, further counting passes follow, which else return at once: two resolve anything to one key. The host
    looks at results only where that is free, and leaves out what they make needless.
    """
    bracket = _bin_of(scored, bracket, counts)
    key, tie, few = scored.collected(bracket)
    if not scored.looked(few):
        one = torch.stack([key, key, torch.zeros_like(key), torch.zeros_like(key), torch.ones_like(key)])
        bracket = torch.where(few, one, bracket)
        for _ in range(2):
            bracket = scored.counted(bracket)
        key, tie = bracket[0], torch.where(few, tie, scored.tie_index(bracket))
    nothing = n_prune.reshape(()) <= 0
    if exact:
        everything = n_prune.reshape(()) >= scored.total
        key = torch.where(everything, MAX_KEY, key)
        tie = torch.where(everything, MAX_INDEX, tie)
    else:
        tie = torch.zeros_like(tie)
        nothing = nothing | (key == MAX_KEY)
    return torch.where(nothing, 0, torch.stack([key, tie]))


def position_of(n_prune: Tensor, total: int, exact: bool) -> Tensor:
    """Rank, int64 [], of the weight that a selection looks for: the first that is kept, or the released rule's."""
    return (n_prune if exact else n_prune - 1).reshape(()).clamp(0, total - 1)


def select(
    a: list[Tensor],
    b: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    n_prune: Tensor,
    exact: bool = True,
    *,
    factors: Tensor | None = None,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    pointers: Tensor | None = None,
) -> Tensor:
    """`pins_ext::select` on every device, without a host sync on a GPU."""
    total = sum(tensor.numel() for tensor in a)
    if total == 0:
        return torch.zeros(2, dtype=torch.int64, device=places.device)
    scratch = torch.empty(1 + BINS, dtype=torch.int64, device=places.device)
    position = position_of(n_prune, total, exact)
    scored = Scored(a, b, places, chunks, score, pointers, position, total, scratch, factors)
    return choose(scored, n_prune, exact, bracket, counts)


def score_of_key(threshold: Tensor) -> Tensor:
    """The score, float32, whose order key is `threshold[..., 0]`."""
    key = threshold[..., 0]
    bits = torch.where(key >> 31 == 1, key ^ 0x80000000, key ^ MAX_KEY)
    return torch.where(bits >= 0x80000000, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
