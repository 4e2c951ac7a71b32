"""Counting order keys against a bracket: shared by `fold`, which counts what it stores, and by the counting passes.

A key below the bracket, and a key equal to one of its ends or to one special key within, is counted in registers; only
the others inside the bracket, a few percent, take an atomic. So heavy ties do not queue at one address: a tie that a
sampled bracket cannot hold inside is at one of its ends, the commonest tie of all is zero, and the middle of a bracket
around an earlier threshold is that threshold.
"""

import triton
import triton.language as tl

from .criterion import score_of
from .layout import GROUP, GROUPS, load_float

BINS = 65536
"""Bins of a counting pass; pins_ext/ops/select.py says the same."""

THREADS = tl.constexpr(128)
"""Threads of a program: every kernel is launched with four warps."""

REORDERS = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9))
"""Whether the compiler finds an order that moves no key by itself; later ones are told of it, and move none either."""

NOWHERE = tl.constexpr(0xFFFFFFFF)
ZERO_KEY = tl.constexpr(0x80000000)


@triton.jit
def load_bracket(bracket_ptr):
    """(lo, width, special, shift) of a bracket, uint32: lowest key, highest and special key from lo, log2 of a bin.

    A resolved bracket counts nothing: it becomes the key 0, which is no score's.
    """
    resolved = tl.load(bracket_ptr + 4) == 1
    lo = tl.where(resolved, 0, tl.load(bracket_ptr)).to(tl.uint32)
    width = tl.where(resolved, 0, tl.load(bracket_ptr + 1)).to(tl.uint32) - lo
    zero = tl.full([], ZERO_KEY, tl.uint32) - lo
    special = tl.where(zero < width, zero, width >> 1)
    return lo, width, special, tl.load(bracket_ptr + 2).to(tl.uint32)


@triton.jit
def factor_of(factors_ptr, tensor):
    """The factor of a tensor's scores; 1, which nobody reads, where they have none."""
    return 1.0 if factors_ptr is None else tl.load(factors_ptr + tensor)


@triton.jit
def load_score(
    operands, first, left,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Scores, float32 [BLOCK_SIZE], of stored states; B is None where the score has no b.

    `operands`: addresses of a and b, weights of a row, factor.
    """
    a, b, columns, factor = operands
    x = load_float(a, first, left, columns, A, BLOCK_SIZE, VECTOR)
    if B is None:
        return score_of(x, x, factor, SCORE)
    else:
        return score_of(x, load_float(b, first, left, columns, B, BLOCK_SIZE, VECTOR), factor, SCORE)


@triton.jit
def no_tally():
    """Tally of no keys, int32: below the bracket, at its lowest, special and highest key."""
    zero = tl.full([], 0, tl.int32)
    return zero, zero, zero, zero


@triton.jit
def count_block(key, left, bracket, counts_ptr, BLOCK_SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Count the keys inside the bracket by atomics; return the others as one unit in a byte each, int32 [BLOCK_SIZE].

    Bytes from the lowest: below, at lo, at the special key, at hi. Sums over a chunk's blocks fit: 16384 / BLOCK_SIZE.

    `DTYPE`: of what was loaded 16 bytes at a time; None: of a block or tile of which only what is `left` counts.
    """
    SIZE: tl.constexpr = GROUPS * GROUP if BLOCK_SIZE is None else BLOCK_SIZE
    lo, width, special, shift = bracket
    # Distance past lo + 1: the keys inside are those below `width - 1`, and lo itself wraps around.
    past = key - lo - 1
    is_special = past == special - 1
    unit = tl.where(past == width - 1, 1 << 24, 0)
    unit = tl.where(is_special, 1 << 16, unit)
    unit = tl.where(past == NOWHERE, 1 << 8, unit)
    unit = tl.where(key < lo, 1, unit)
    past = tl.where(is_special, NOWHERE, past)
    if DTYPE is None:
        # A tile of groups comes with what is there.
        valid = left if BLOCK_SIZE is None else tl.arange(0, SIZE) < left
        unit = tl.where(valid, unit, 0)
        past = tl.where(valid, past, NOWHERE)
    # Any order will do: each thread counts what it has loaded, and no key moves to another thread.
    EACH: tl.constexpr = SIZE // THREADS
    if REORDERS:
        past = tl.reshape(past, [EACH, THREADS], can_reorder=True)
    else:
        LOADED: tl.constexpr = 4 if DTYPE == "float32" else 8 if DTYPE == "bfloat16" or DTYPE == "float16" else 1
        RUN: tl.constexpr = LOADED if LOADED < EACH else EACH
        past = tl.permute(tl.reshape(past, [EACH // RUN, THREADS, RUN]), [0, 2, 1])
        past = tl.reshape(past, [EACH, THREADS])
    bins = ((past + 1) >> shift).to(tl.int32)
    one = tl.full(bins.shape, 1, tl.int64)
    tl.atomic_add(counts_ptr + 1 + bins, one, mask=past < tl.maximum(width, 1) - 1, sem="relaxed")
    return unit


@triton.jit
def add_units(tally, units):
    """A tally with the units of a chunk, at most 16384 weights, added."""
    below, at_lo, at_special, at_hi = tally
    even = tl.sum(units & 0x00FF00FF)
    odd = tl.sum((units >> 8) & 0x00FF00FF)
    return below + (even & 0xFFFF), at_lo + (odd & 0xFFFF), at_special + (even >> 16), at_hi + (odd >> 16)


@triton.jit
def commit(tally, bracket, counts_ptr):
    """Add a program's tally to counts int64 [1 + bins]."""
    below, at_lo, at_special, at_hi = tally
    _, width, special, shift = bracket
    tl.atomic_add(counts_ptr, below.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + 1, at_lo.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + 1 + (special >> shift).to(tl.int32), at_special.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + 1 + (width >> shift).to(tl.int32), at_hi.to(tl.int64), sem="relaxed")
