"""The operators: `torch.ops.pins_ext.*` for CPU and CUDA, their fake versions, and typed wrappers.

Schemas are defined in csrc/ops.cpp, CPU kernels in csrc/cpu, the CUDA update in csrc/cuda; the other CUDA kernels are
Triton's and are registered here. Every operator works on a list of tensors of any size in one call, and knows each
tensor's place in the concatenation of all full, unsharded tensors (its global index), which decides ties and seeds
stochastic rounding; so results depend neither on sharding nor on launch order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pins_ext import _C  # noqa: F401  (loads the library; its operators register themselves)
from pins_ext.triton_kernels import register as register_triton

CRITERIA = ("pins", "pins-signed", "pins-update", "platon", "movement", "precomputed")
SCORES = ("product", "identity", "deviation", "magnitude")

CHUNK = 16384
"""Weights per row of a work list; csrc/layout.h kChunk and triton_kernels/criterion.py say the same."""

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


@dataclass(frozen=True)
class Shard:
    """Where a local tensor lies in its full, unsharded tensor.

    Args:
        full: sizes of the full tensor. start: first index of the local tensor in each dimension.
    """

    full: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The places of a list of tensors among all weights: the `layout` and `chunks` arguments of every list operator.

    Attributes:
        rows: int64 [n, 13]: global base, full sizes [4], local sizes [4], start per dimension [4].
        chunks: int64 [m, 2]: (tensor, local offset).
        total: number of weights of all full tensors: the global index of the end.
    """

    rows: Tensor
    chunks: Tensor
    total: int

    @staticmethod
    def of(tensors: Sequence[Tensor], shards: Sequence[Shard | None] | None = None, base: int = 0) -> Layout:
        """Lay the tensors out one after another from global index `base`.

        Args:
            tensors: local tensors, contiguous, in parameter order, all on one device.
            shards: per tensor, where it lies in its full tensor; None where it is whole.

        Raises:
            ValueError: a shard that needs more than four dimensions or does not fit its full tensor.
        """
        device = tensors[0].device if tensors else torch.device("cpu")
        rows = torch.zeros(len(tensors), 13, dtype=torch.int64)
        chunks = []
        for i, tensor in enumerate(tensors):
            shard = shards[i] if shards else None
            full, local, start = _collapse(tuple(tensor.shape), shard)
            rows[i] = torch.tensor([base, *full, *local, *start])
            base += full[0] * full[1] * full[2] * full[3]
            offsets = torch.arange(0, tensor.numel(), CHUNK)
            chunks.append(torch.stack([torch.full_like(offsets, i), offsets], dim=1))
        work = torch.cat(chunks) if chunks else torch.zeros(0, 2, dtype=torch.int64)
        return Layout(rows.to(device), work.to(device), base)


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


def mask_bytes(numel: int) -> int:
    """Bytes of the packed mask of this many weights: one bit each, least significant first, whole 64-bit words."""
    return -(-numel // 64) * 8


def new_mask(tensor: Tensor) -> Tensor:
    """A packed mask that keeps every weight of `tensor`: uint8 [mask_bytes]; padding bits are zero."""
    n = tensor.numel()
    bits = torch.full((mask_bytes(n),), 255, dtype=torch.uint8, device=tensor.device)
    bits[n // 8 :] = 0
    if n % 8:
        bits[n // 8] = (1 << n % 8) - 1
    return bits


# ---- select: counting passes, driven from here so that a process group can sum the counts ---------------------------


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
    layout: Tensor
    chunks: Tensor
    score: str
    pointers: Tensor | None
    position: Tensor
    total: int
    scratch: Tensor

    @property
    def _operands(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, str]:
        return self.a, self.b, self.layout, self.chunks, self.score

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
        candidates = self.layout.new_full((2, CANDIDATES), MAX_INDEX)
        found = self.layout.new_zeros(1)
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


def _select(
    a: list[Tensor],
    b: list[Tensor],
    layout: Tensor,
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
        return torch.zeros(2, dtype=torch.int64, device=layout.device)
    position = (n_prune if exact else n_prune - 1).reshape(()).clamp(0, total - 1)
    scratch = torch.empty(1 + BINS, dtype=torch.int64, device=layout.device)
    scored = _Scored(a, b, layout, chunks, score, pointers, position, total, scratch)
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


_library = torch.library.Library("pins_ext", "IMPL")
for _key in ("CPU", "CUDA"):
    _library.impl("select", _select, _key)
# Triton itself is imported when the first CUDA tensor arrives.
register_triton(_library)


# ---- fakes: what torch.compile and opcheck need to know --------------------------------------------------------------


@torch.library.register_fake("pins_ext::sample")
def _(a, b, layout, chunks, score, size, *, pointers=None):  # type: ignore[no-untyped-def]
    return layout.new_empty(size)


@torch.library.register_fake("pins_ext::tie_index")
def _(a, b, layout, chunks, score, bracket, *, pointers=None):  # type: ignore[no-untyped-def]
    return layout.new_empty(1)


@torch.library.register_fake("pins_ext::select")
def _(a, b, layout, chunks, score, n_prune, exact=True, *, bracket=None, counts=None, pointers=None):  # type: ignore[no-untyped-def]
    return layout.new_empty(2)


def _no_output(*args: object, **kwargs: object) -> None:
    return None


for _name in ("accumulate_", "fold_", "count_", "collect_", "pack_", "masked_adamw_", "masked_sgd_", "apply_mask_"):
    torch.library.register_fake(f"pins_ext::{_name}", _no_output)
