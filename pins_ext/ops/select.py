"""The exact n-th smallest score over all tensors, by passes over them driven from here.

On a GPU one pass counts and another writes down the few weights of the threshold's bin; the host never waits for what
a pass has found: further passes are launched and return at once where they are not needed. On the CPU, where looking
is free, they are left out, and one pass writes down all weights that a sample takes to be near the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pins_ext.ops.bracket import BINS, MAX_INDEX, MAX_KEY
from pins_ext.triton_kernels.table import pointer_table

SAMPLES = 16384
"""Keys drawn to bracket the threshold: some 3 % of the weights then fall inside. On the CPU more, see `samples_of`."""

INSIDE = 2_500_000
"""Weights that fall inside a sample's bracket at most, about, where the CPU selects in one pass and lists them."""

LISTED = 1 << 22
"""Weights that it has room for, 6 bytes each; csrc/cpu/settle.cpp kMostInside says the same."""

ONE_PASS = 400_000_000
"""Weights up to which the CPU does so; beyond, drawing enough keys for that would take longer than a second pass."""

CANDIDATES = 16384
"""Weights ordered one by one at the end of a selection. The threshold's bin holds fewer, some ten of 85 M and some
thousand of 7 G, unless many are tied.
"""

pins = torch.ops.pins_ext


def samples_of(total: int, on_host: bool) -> int:
    """How many keys are drawn of this many weights, so that at most INSIDE of them fall between the ones chosen."""
    # Four standard deviations to either side, the widest where half is pruned.
    enough = (4 * total // INSIDE) ** 2 if on_host and total <= ONE_PASS else 0
    return min(max(SAMPLES, enough), total)


def listed_bytes(total: int) -> int:
    """Transient memory of a selection on the CPU beside its counts: samples, as drawn and as ordered, and a list.

    Beyond ONE_PASS weights the list is that of one bin, which is long only where thousands of scores are equal.
    """
    most = LISTED if total <= ONE_PASS else CANDIDATES
    return 3 * 8 * samples_of(total, on_host=True) + 6 * min(total, most)


@dataclass(frozen=True)
class Scored:
    """The operands of a selection, and the operators that read them.

    Attributes:
        a: operands of the score, see the operators.
        b: its second operands, where it has two.
        places: where each tensor lies, see Layout.
        chunks: how work is cut, see Layout.
        score: kind of the score.
        pointers: addresses of the tensors, for a GPU.
        position: int64 [], rank of the weight that is looked for, in the order of (score, global index).
        total: how many weights compete.
        scratch: int64 [1 + BINS], for counts.
        factors: float32 [n], of the score fisher.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    places: Tensor
    chunks: Tensor
    score: str
    pointers: Tensor | None
    position: Tensor
    total: int
    scratch: Tensor
    factors: Tensor | None

    @property
    def operands(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor, str]:
        """What every operator that reads scores takes first."""
        return self.a, self.b, self.places, self.chunks, self.score

    @property
    def _keywords(self) -> dict[str, Tensor | None]:
        return {"factors": self.factors, "pointers": self.pointers}

    @property
    def on_host(self) -> bool:
        """Whether the host may look at what a pass has found: on the CPU, where that is free."""
        return self.places.is_cpu

    def looked(self, flag: Tensor) -> bool:
        """Whether the flag is set and the host knows."""
        return self.on_host and bool(flag)

    def begun(self) -> Tensor:
        """A bracket to begin with, from a sample."""
        size = samples_of(self.total, self.on_host)
        keys = pins.sample(*self.operands, size, **self._keywords)
        return pins.bracket_of(keys, self.position, self.total)

    def likely(self) -> Tensor:
        """A bracket that likely holds the threshold, for `settled`: a sample's, or where that is wide one bin of it."""
        begun = self.begun()
        return begun if self.on_host and self.total <= ONE_PASS else self.counted(begun)

    def counted(self, bracket: Tensor) -> Tensor:
        """The bracket after a counting pass; one key is left as it is, and no weight is read for it."""
        if self.looked(bracket[4]):
            return bracket
        pins.count_(self.scratch, *self.operands, bracket, **self._keywords)
        return pins.narrow(bracket, self.scratch, self.position)

    def settled(self, bracket: Tensor) -> tuple[Tensor, Tensor]:
        """The bracket of one key and its tie index, see `settle`; where that can't be told, a bracket as wide or wider.

        On a GPU of a bracket with few weights; on the CPU, also of a sample's.
        """
        if self.on_host:
            return pins.settle_around(*self.operands, bracket, self.position, factors=self.factors)
        candidates = self.places.new_full((2, CANDIDATES), MAX_INDEX)
        found = self.places.new_zeros(1)
        pins.collect_(found, candidates, *self.operands, bracket, **self._keywords)
        return pins.settle(bracket, candidates, found)

    def tie_index(self, bracket: Tensor) -> Tensor:
        """The tie index of the weight at the bracket's rank among those of its one key."""
        return pins.tie_index(*self.operands, bracket, **self._keywords)


def _bin_of(scored: Scored, bracket: Tensor | None, counts: Tensor | None) -> Tensor:
    """A bracket around the threshold that `settled` settles: one bin, or on the CPU what a sample says.

    From the bracket that is given, whose counts may have ridden on the fold; where the threshold has left it, or
    without one, from a sample.
    """
    if bracket is None:
        return scored.likely()
    return _bin_found(scored, *_bin_inside(scored, bracket, counts))


def _bin_inside(scored: Scored, bracket: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The bin of this bracket that holds the threshold, and whether it does: bool []."""
    found = scored.counted(bracket) if counts is None else pins.narrow(bracket, counts, scored.position)
    return found, (found[0] >= bracket[0]) & (found[1] <= bracket[1])


def _bin_found(scored: Scored, found: Tensor, hit: Tensor) -> Tensor:
    """This bin; where the threshold is not in it, what a sample says."""
    if scored.on_host:
        return found if bool(hit) else scored.likely()
    begun = scored.begun()
    # Marked as one key, a bracket costs no pass.
    begun[4] = hit
    return torch.where(hit, found, scored.counted(begun))


def choose(scored: Scored, n_prune: Tensor, exact: bool, bracket: Tensor | None, counts: Tensor | None) -> Tensor:
    """The cutoff below which `n_prune` weights lie, see `select`.

    A bracket around the threshold, then its weights one by one. Only where they are many, because most are tied or the
    bracket misled, further counting passes follow: two resolve anything to one key.
    """
    return _choose_inside(scored, n_prune, exact, _bin_of(scored, bracket, counts))


def _choose_inside(scored: Scored, n_prune: Tensor, exact: bool, bracket: Tensor) -> Tensor:
    """The cutoff, from a bracket around it."""
    bracket, tie = scored.settled(bracket)
    # One key, and none of its weights is pruned.
    if not scored.looked(bracket[4] > bracket[3]):
        for _ in range(2):
            bracket = scored.counted(bracket)
        # One of them is zero: a settled bracket asks for no tie.
        tie = torch.maximum(tie, scored.tie_index(bracket).reshape(1))
    return pins.cutoff(bracket, tie, n_prune, scored.total, exact)


def position_of(n_prune: Tensor, total: int, exact: bool) -> Tensor:
    """Rank, int64 [], of the weight that a selection looks for: the first that is kept, or the released rule's."""
    return (n_prune if exact else n_prune - 1).reshape(()).clamp(0, total - 1)


def select(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
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
    total: int | None = None,
) -> Tensor:
    """`pins_ext::select` on every device, without a host sync on a GPU."""
    if total is None:
        total = weights_in(a, places)
    if total == 0:
        return torch.zeros(2, dtype=torch.int64, device=places.device)
    if pointers is None and not places.is_cpu:
        pointers = pointer_table(None, places, a, b)
    scratch = torch.empty(1 + BINS, dtype=torch.int64, device=places.device)
    position = position_of(n_prune, total, exact)
    scored = Scored(a, b, places, chunks, score, pointers, position, total, scratch, factors)
    return choose(scored, n_prune, exact, bracket, counts)


def weights_in(states: Sequence[Tensor], places: Tensor) -> int:
    """How many weights these tensors are the states of.

    Of 8-bit ones, with more bytes than weights, and of a kept list the table says it; a GPU is waited for.
    """
    if states and not states[0].is_floating_point():
        if places.dim() != 2 or places.shape[1] != 14:
            raise RuntimeError(f"places must have 14 columns, got shape {tuple(places.shape)}")
        return int(places[:, 5:9].prod(1).sum())
    return sum(tensor.numel() for tensor in states)


def _bin_on_host(scored: Scored, bracket: Tensor | None, counts: Tensor | None) -> tuple[Tensor, int]:
    """What `_bin_of` finds, and at most how many weights are inside; on the CPU."""
    if bracket is None or counts is None:
        bracket, counts = scored.begun(), scored.scratch
        pins.count_(counts, *scored.operands, bracket, **scored._keywords)
        more = False
    else:
        more = True
    found = pins.narrow(bracket, counts, scored.position)
    lo, hi, shift = bracket[:3].tolist()
    if not lo <= int(found[0]) <= int(found[1]) <= hi:
        return _bin_on_host(scored, None, None) if more else (found, scored.total)
    return found, int(counts[1 + ((int(found[0]) - lo) >> shift)])


def bin_of(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    n_prune: Tensor,
    *,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor | None:
    """A bracket around the threshold that `pack_around_` can settle, of CPU tensors; no weight is written.

    Args:
        a, b, places, chunks, score, n_prune, bracket, counts: see `select`; ties are broken by index.

    Returns:
        int64 [5]; None where none or all are pruned, or more than CANDIDATES weights are inside.
    """
    operands, total = (a, b, places, chunks, score), weights_in(a, places)
    if not 0 < int(n_prune) < total:
        return None
    position = position_of(n_prune, total, exact=True)
    scored = Scored(*operands, None, position, total, places.new_empty(1 + BINS), None)
    found, inside = _bin_on_host(scored, bracket, counts)
    return found if inside <= CANDIDATES else None


def bin_or_cutoff(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    n_prune: Tensor,
    known: Tensor,
    total: int,
    *,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    pointers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What an optimizer's pass prunes by, where the host looks at nothing; no weight is written.

    The bin of the counts that holds the threshold, where few weights are inside, for the pass to settle. Elsewhere the
    threshold itself, by passes that only read; a bin of few weights launches them, too, and they return at once.

    Args:
        a, b, places, chunks, score, n_prune, bracket, counts, pointers: see `select`; ties are broken by index.
        known: bool [1], whether scores are known yet; until then nothing is pruned.
        total: how many weights compete, more than `n_prune`, which is not 0.

    Returns:
        `around`, int64 [5], and `threshold`, int64 [1, 2], of boundary_adamw_.
    """
    position, scratch = position_of(n_prune, total, exact=True), places.new_empty(1 + BINS)
    scored = Scored(a, b, places, chunks, score, pointers, position, total, scratch, None)
    few = torch.zeros_like(known)
    if bracket is None or counts is None:
        found = left = scored.likely()
    else:
        found, hit = _bin_inside(scored, bracket, counts)
        inside = counts.take(((found[:1] - bracket[:1]) >> bracket[2]).clamp_(0, BINS - 1) + 1)
        few = known & hit & (inside <= CANDIDATES)
        left = _bin_found(scored, found, hit).clone()
        # One key, of whose weights none is pruned, costs no pass.
        left[3:4].mul_(~few)
        left[4:5].logical_or_(few)
    threshold = _choose_inside(scored, n_prune, True, left) * known
    key, rest = threshold[:1], threshold.new_zeros(2)
    exact = torch.cat([key, key, rest[:1], rest[:1] - 1, rest[1:]])
    return torch.where(few, found, exact), threshold.reshape(1, 2)


def pack_lowest_(
    masks: Sequence[Tensor],
    stats: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    n_prune: Tensor,
    *,
    factors: Tensor | None = None,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """`select` and `pack_` of CPU tensors in one pass fewer: weights are ordered while the masks are written.

    Args:
        masks, stats: see `pack_`; written.
        a, b, places, chunks, score, n_prune, factors, bracket, counts: see `select`; ties are broken by index.

    Returns:
        int64 [1, 2], the threshold that `select` returns.
    """
    operands, total, wanted = (a, b, places, chunks, score), weights_in(a, places), int(n_prune)
    if not 0 < wanted < total:
        threshold = select(*operands, n_prune, factors=factors, bracket=bracket, counts=counts).reshape(1, 2)
        pins.pack_(masks, stats, *operands, threshold, factors=factors)
        return threshold
    scratch = places.new_empty(1 + BINS)
    position = position_of(n_prune, total, exact=True)
    scored = Scored(*operands, None, position, total, scratch, factors)
    found, inside = _bin_on_host(scored, bracket, counts)
    if inside > CANDIDATES:
        threshold = _choose_inside(scored, n_prune, True, found).reshape(1, 2)
        pins.pack_(masks, stats, *operands, threshold, factors=factors)
        return threshold
    threshold = places.new_empty(1, 2)
    pins.pack_around_(masks, stats, threshold, *operands, found, factors=factors)
    return threshold


def score_of_key(threshold: Tensor) -> Tensor:
    """The score of a threshold, float32 [...].

    Args:
        threshold: int64 [..., 2], order key and tie index, as from `select`.
    """
    key = threshold[..., 0]
    bits = torch.where(key >> 31 == 1, key ^ 0x80000000, key ^ MAX_KEY)
    return torch.where(bits >= 0x80000000, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
