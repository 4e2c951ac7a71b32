"""The steps of a selection between its passes over the weights: one program each, so that the host need not look.

pins_ext/ops/bracket.py says what a bracket is; there are the same steps for CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .count import BINS
from .table import check_shape, launch

SHIFTS = tl.constexpr(17)
"""Widths of a bin: 2^0 to 2^16 keys."""

LAST_BIN = tl.constexpr(BINS - 1)
STEPS = tl.constexpr(BINS.bit_length())
"""Steps of a binary search over the ends of all bins."""

MAX_KEY = tl.constexpr(0xFFFFFFFF)
MAX_INDEX = tl.constexpr((1 << 63) - 1)


@triton.jit
def _store_bracket(bracket_ptr, lo, hi, rank, resolved):
    """Write (lo, hi, shift, rank, resolved), all int64, with bins so wide that all keys fit."""
    shift = tl.full([], 0, tl.int64)
    for step in tl.static_range(SHIFTS - 1):
        shift += (((hi - lo) >> step) > LAST_BIN).to(tl.int64)
    tl.store(bracket_ptr, lo)
    tl.store(bracket_ptr + 1, hi)
    tl.store(bracket_ptr + 2, shift)
    tl.store(bracket_ptr + 3, rank)
    tl.store(bracket_ptr + 4, resolved.to(tl.int64))


@triton.jit(do_not_specialize=["size", "total"])
def _bracket_of_kernel(bracket_ptr, ordered_ptr, position_ptr, size, total):
    """The keys within four standard deviations of a sample's rank; ordered_ptr: int64 [size], sorted keys."""
    m = size.to(tl.float32)
    share = tl.div_rn(tl.load(position_ptr).to(tl.float32), total.to(tl.float32))
    spread = 4 * tl.sqrt_rn(tl.maximum(share * (1 - share) * m, 1.0)) + 2
    first = tl.minimum(tl.maximum((share * m - spread).to(tl.int32), 0), size - 1)
    last = tl.minimum(tl.maximum((share * m + spread).to(tl.int32) + 1, 0), size - 1)
    rank = tl.full([], 0, tl.int64)
    _store_bracket(bracket_ptr, tl.load(ordered_ptr + first), tl.load(ordered_ptr + last), rank, rank)


def bracket_of(keys: Tensor, position: Tensor, total: int) -> Tensor:
    """`pins_ext::bracket_of`: a bracket from a sample of the order keys, int64 [m], around the weight of this rank."""
    check_shape("keys", keys, torch.int64, (keys.numel(),), keys)
    check_shape("position", position, torch.int64, (), keys)
    bracket = keys.new_empty(5)
    launch(_bracket_of_kernel, keys, 1, bracket, keys.sort().values, position, keys.numel(), total)
    return bracket


@triton.jit
def _narrow_kernel(narrowed_ptr, bracket_ptr, ends_ptr, position_ptr):
    """The bin that holds the position, or all keys on the missed side; a single key as it is.

    ends_ptr: int64 [1 + BINS], running sum of the keys below the bracket and in its bins.
    """
    lo, hi = tl.load(bracket_ptr), tl.load(bracket_ptr + 1)
    rank = tl.load(position_ptr)
    # Below the bracket (0), in bin i (1 + i), above it (1 + BINS): the first end past the position.
    chosen = tl.full([], 0, tl.int32)
    end = tl.full([], LAST_BIN + 2, tl.int32)
    for _ in tl.static_range(STEPS):
        middle = (chosen + end) // 2
        before = tl.load(ends_ptr + tl.minimum(middle, LAST_BIN + 1)) <= rank
        open = chosen < end
        chosen = tl.where(open & before, middle + 1, chosen)
        end = tl.where(open & ~before, middle, end)
    new_rank = rank - tl.load(ends_ptr + tl.maximum(chosen - 1, 0), mask=chosen > 0, other=0)
    shift = tl.load(bracket_ptr + 2)
    first = lo + ((chosen - 1).to(tl.int64) << shift)
    width = tl.full([], 1, tl.int64) << shift
    below, above = chosen == 0, chosen == LAST_BIN + 2
    new_lo = tl.where(below, 0, tl.where(above, hi + 1, first))
    new_hi = tl.where(below, lo - 1, tl.where(above, MAX_KEY, tl.minimum(first + width - 1, hi)))
    resolved = tl.load(bracket_ptr + 4) == 1
    is_key = (new_lo == new_hi) & ~below & ~above
    _store_bracket(
        narrowed_ptr,
        tl.where(resolved, lo, new_lo),
        tl.where(resolved, hi, new_hi),
        tl.where(resolved, tl.load(bracket_ptr + 3), new_rank),
        resolved | is_key,
    )


def narrow(bracket: Tensor, counts: Tensor, position: Tensor) -> Tensor:
    """`pins_ext::narrow`: the bracket after a counting pass."""
    check_shape("bracket", bracket, torch.int64, (5,), bracket)
    check_shape("counts", counts, torch.int64, (1 + BINS,), bracket)
    check_shape("position", position, torch.int64, (), bracket)
    narrowed = torch.empty_like(bracket)
    launch(_narrow_kernel, bracket, 1, narrowed, bracket, counts.cumsum(0), position)
    return narrowed


@triton.jit(do_not_specialize=["size"])
def _settle_kernel(settled_ptr, tie_ptr, bracket_ptr, found_ptr, keys_ptr, order_ptr, index_ptr, size):
    """The key at the bracket's rank among the candidates, where they are all there, and its tie index.

    keys_ptr, order_ptr: int64 [size], keys sorted by (key, index), and their places in index_ptr, the sorted indices.
    """
    found = tl.load(found_ptr)
    few = (found > 0) & (found <= size)
    rank = tl.minimum(tl.maximum(tl.load(bracket_ptr + 3), 0), tl.where(few, found, 1) - 1)
    key = tl.load(keys_ptr + rank)
    tied = few & (rank > 0) & (tl.load(keys_ptr + tl.maximum(rank - 1, 0)) == key)
    index = tl.load(index_ptr + tl.load(order_ptr + rank))
    lo, hi = tl.load(bracket_ptr), tl.load(bracket_ptr + 1)
    rank_before, resolved = tl.load(bracket_ptr + 3), tl.load(bracket_ptr + 4) == 1
    _store_bracket(
        settled_ptr,
        tl.where(few, key, lo),
        tl.where(few, key, hi),
        tl.where(few, 0, rank_before),
        few | resolved,
    )
    tl.store(tie_ptr, tl.where(tied, index, 0))


def settle(bracket: Tensor, candidates: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """`pins_ext::settle`: the single key of the weight looked for, and its tie index, if all candidates are there."""
    size = candidates.shape[-1]
    check_shape("bracket", bracket, torch.int64, (5,), bracket)
    check_shape("candidates", candidates, torch.int64, (2, size), bracket)
    check_shape("found", found, torch.int64, (1,), bracket)
    settled, tie = torch.empty_like(bracket), torch.empty_like(found)
    index, by_index = candidates[1].sort()
    keys, order = candidates[0].take(by_index).sort(stable=True)
    launch(_settle_kernel, bracket, 1, settled, tie, bracket, found, keys, order, index, size)
    return settled, tie


@triton.jit(do_not_specialize=["total"])
def _cutoff_kernel(cutoff_ptr, bracket_ptr, tie_ptr, n_prune_ptr, total, EXACT: tl.constexpr):
    """(key, tie index) of a single key; (0, 0) prunes nothing, (MAX_KEY, MAX_INDEX) everything."""
    key, tie = tl.load(bracket_ptr), tl.load(tie_ptr)
    wanted = tl.load(n_prune_ptr)
    nothing = wanted <= 0
    if EXACT:
        everything = wanted >= total
        key = tl.where(everything, MAX_KEY, key)
        tie = tl.where(everything, MAX_INDEX, tie)
    else:
        nothing |= key == MAX_KEY
        tie = tl.full([], 0, tl.int64)
    tl.store(cutoff_ptr, tl.where(nothing, 0, key))
    tl.store(cutoff_ptr + 1, tl.where(nothing, 0, tie))


def cutoff(bracket: Tensor, tie: Tensor, n_prune: Tensor, total: int, exact: bool) -> Tensor:
    """`pins_ext::cutoff`: (order key, tie index), int64 [2], below which `n_prune` of `total` weights lie."""
    check_shape("bracket", bracket, torch.int64, (5,), bracket)
    check_shape("tie", tie, torch.int64, (1,), bracket)
    check_shape("n_prune", n_prune.reshape(1), torch.int64, (1,), bracket)
    result = bracket.new_empty(2)
    launch(_cutoff_kernel, bracket, 1, result, bracket, tie, n_prune, total, EXACT=exact)
    return result
