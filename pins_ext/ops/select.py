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
class _Scored:
    """The operands of a selection, and the operators that read them. scratch: int64 [1 + BINS], for counts."""

    a: list[Tensor]
    b: list[Tensor]
    places: Tensor
    chunks: Tensor
    score: str
    pointers: Tensor | None
    position: Tensor
    total: int
    scratch: Tensor

    @property
    def _operands(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, str]:
        return self.a, self.b, self.places, self.chunks, self.score

    def drawn(self) -> Tensor:
        """A bracket from a sample."""
        size = min(SAMPLES, self.total)
        keys = torch.ops.pins_ext.sample(*self._operands, size, pointers=self.pointers)
        return bracket_of(keys, self.position, self.total)

    def counted(self, bracket: Tensor) -> Tensor:
        """The bracket after a counting pass; one key is left as it is, and no weight is read for it."""
        if bracket.is_cpu and bracket[4]:
            return bracket
        torch.ops.pins_ext.count_(self.scratch, *self._operands, bracket, pointers=self.pointers)
        return narrow(bracket, self.scratch, self.position)

    def collected(self, bracket: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Key and tie index of the weight at the bracket's rank, and whether there were few enough to tell."""
        candidates = self.places.new_full((2, CANDIDATES), MAX_INDEX)
        found = self.places.new_zeros(1)
        torch.ops.pins_ext.collect_(found, candidates, *self._operands, bracket, pointers=self.pointers)
        if found.is_cpu:
            candidates = candidates[:, : max(1, int(found))]
        keys, index = candidates[:, candidates[1].argsort()]
        keys, order = keys.sort(stable=True)
        rank = bracket[3].clamp(0, keys.numel() - 1)
        key, tied = keys[rank], (rank > 0) & (keys[rank - 1] == keys[rank])
        return key, torch.where(tied, index[order[rank]], 0), (found[0] > 0) & (found[0] <= CANDIDATES)

    def tie_index(self, bracket: Tensor) -> Tensor:
        """Of the weight at the bracket's rank among those of its one key."""
        return torch.ops.pins_ext.tie_index(*self._operands, bracket, pointers=self.pointers).reshape(())


def _bin_of(scored: _Scored, bracket: Tensor | None, counts: Tensor | None) -> Tensor:
    """A bracket of one bin around the threshold.

    From the counts that rode on the fold; where the threshold has left their bracket, or without any, from a sample and
    a pass. The host looks at results on the CPU only, where that is free, and leaves out what they make needless.
    """
    if bracket is None or counts is None:
        return scored.counted(scored.drawn())
    found = narrow(bracket, counts, scored.position)
    hit = (found[0] >= bracket[0]) & (found[1] <= bracket[1])
    if hit.is_cpu and hit:
        return found
    drawn = scored.drawn()
    # Marked as one key, a bracket costs no pass.
    drawn[4] = hit
    return torch.where(hit, found, scored.counted(drawn))


def select(
    a: list[Tensor],
    b: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    n_prune: Tensor,
    exact: bool = True,
    *,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    pointers: Tensor | None = None,
) -> Tensor:
    """`pins_ext::select` on every device, without a host sync on a GPU.

    A bin around the threshold, then its few weights one by one. Only where they are many, because most are tied or the
    sample misled, further counting passes follow, which else return at once: two resolve anything to one key.
    """
    total = sum(tensor.numel() for tensor in a)
    if total == 0:
        return torch.zeros(2, dtype=torch.int64, device=places.device)
    position = (n_prune if exact else n_prune - 1).reshape(()).clamp(0, total - 1)
    scratch = torch.empty(1 + BINS, dtype=torch.int64, device=places.device)
    scored = _Scored(a, b, places, chunks, score, pointers, position, total, scratch)
    bracket = _bin_of(scored, bracket, counts)
    key, tie, few = scored.collected(bracket)
    if not (few.is_cpu and few):
        one = torch.stack([key, key, torch.zeros_like(key), torch.zeros_like(key), torch.ones_like(key)])
        bracket = torch.where(few, one, bracket)
        for _ in range(2):
            bracket = scored.counted(bracket)
        key, tie = bracket[0], torch.where(few, tie, scored.tie_index(bracket))
    nothing = n_prune.reshape(()) <= 0
    if exact:
        everything = n_prune.reshape(()) >= total
        key = torch.where(everything, MAX_KEY, key)
        tie = torch.where(everything, MAX_INDEX, tie)
    else:
        tie = torch.zeros_like(tie)
        nothing = nothing | (key == MAX_KEY)
    return torch.where(nothing, 0, torch.stack([key, tie]))


def score_of_key(threshold: Tensor) -> Tensor:
    """The score, float32, whose order key is `threshold[..., 0]`."""
    key = threshold[..., 0]
    bits = torch.where(key >> 31 == 1, key ^ 0x80000000, key ^ MAX_KEY)
    return torch.where(bits >= 0x80000000, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
