"""Selection over the order keys of a whole model's states: draw a sample, count, collect the last few, break a tie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..criteria import SCORES
from .count import BINS, add_units, commit, count_block, factor_of, load_bracket, load_score, no_tally
from .criterion import order_key, random_bits, score_of
from .layout import (
    GROUP,
    GROUP_BYTES,
    ROW,
    TAIL,
    address_of,
    chunk_of,
    columns_of,
    decoded,
    float_from,
    place_of,
    run_of,
    vector_end,
)
from .table import (
    FLOATS,
    STATES,
    check_like,
    check_list,
    check_option,
    check_outputs,
    check_shape,
    check_tables,
    launch,
    launch_chunks,
    pointer_table,
)

BLOCK_SIZE = 1024
"""Weights of the VECTOR path at a time, as in importance.py."""

SAMPLE_BLOCK = 256


def check_scores(
    a: list[Tensor], b: list[Tensor], score: str, places: Tensor, factors: Tensor | None
) -> tuple[str, str | None]:
    """Check the lists that a score reads; their dtypes' names, None for `b` where it is not read."""
    check_option("score", score, SCORES)
    if (factors is not None) != (score == "fisher"):
        raise RuntimeError(f"factors must be {'given' if factors is None else 'left out'} for the score '{score}'")
    if score == "fisher":
        check_shape("factors", factors, torch.float32, (len(places),), places)
        dtypes = check_list("a", a, FLOATS, places), check_list("b", b, (*FLOATS, torch.uint8), places)
        check_like("b", b, "a", a, dtype=False)
        return dtypes
    if score in ("product", "deviation"):
        dtype_a, dtype_b = check_list("a", a, STATES, places), check_list("b", b, STATES, places)
        check_like("b", b, "a", a)
        return dtype_a, dtype_b
    if b:
        raise RuntimeError(f"b must be empty for the score '{score}', got {len(b)} tensors")
    return check_list("a", a, (*FLOATS, torch.uint8) if score == "identity" else FLOATS, places), None


# ---- sample --------------------------------------------------------------------------------------


@triton.jit
def gather(addresses, local, columns, active, DTYPE: tl.constexpr):
    """float32 of one weight of each address."""
    if DTYPE == "uint8":
        row, column = local // columns, local % columns
        group = row * ((columns + (GROUP - 1)) // GROUP) + (column >> 5)
        return decoded(addresses, group * GROUP_BYTES, column & (GROUP - 1), active, DTYPE)
    else:
        ELEMENT: tl.constexpr = tl.float32 if DTYPE == "float32" else tl.uint16
        return float_from(tl.load(addresses.to(tl.pointer_type(ELEMENT)) + local, mask=active, other=0), DTYPE)


@triton.jit(do_not_specialize=["n_tensors", "size"])
def _sample_kernel(
    keys_ptr, pointers_ptr, places_ptr, ends_ptr, factors_ptr, n_tensors, size,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys int64 [size] of the weights at hashed places in `size` equal strata of all local weights.

    ends_ptr: int64 [n_tensors], running sum of the tensors' local weights.
    """
    stratum = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE).to(tl.int64)
    active = stratum < size
    total = tl.load(ends_ptr + n_tensors - 1)
    first = stratum * total // size
    span = (stratum + 1) * total // size - first
    jitter = (random_bits(stratum, 0x243F6A88, 0x85A308D3) >> 8).to(tl.int64)
    position = first + ((jitter * span) >> 24)
    # The first tensor that ends past the position.
    low = tl.zeros([BLOCK_SIZE], tl.int64)
    high = low + n_tensors
    while tl.max(high - low) > 0:
        middle = (low + high) // 2
        open = active & (low < high)
        before = tl.load(ends_ptr + middle, mask=open, other=0) <= position
        low = tl.where(open & before, middle + 1, low)
        high = tl.where(open & before, high, middle)
    local = position - tl.load(ends_ptr + low - 1, mask=active & (low > 0), other=0)
    columns = tl.load(places_ptr + ROW * low + 13, mask=active, other=1)
    x = gather(tl.load(pointers_ptr + low, mask=active, other=0), local, columns, active, A)
    y = x
    if B is not None:
        y = gather(tl.load(pointers_ptr + n_tensors + low, mask=active, other=0), local, columns, active, B)
    factor = None if factors_ptr is None else tl.load(factors_ptr + low, mask=active, other=0)
    tl.store(keys_ptr + stratum, order_key(score_of(x, y, factor, SCORE)).to(tl.int64), mask=active)


def sample(
    a: list[Tensor],
    b: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    size: int,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> Tensor:
    """`pins_ext::sample`: int64 [size], keys of a stratified sample of the local weights; zeros if there are none."""
    check_tables(places, chunks)
    dtype_a, dtype_b = check_scores(a, b, score, places, factors)
    table = pointer_table(pointers, places, a, b)
    if size < 1:
        raise RuntimeError(f"size must be at least 1, got {size}")
    if not sum(x.numel() for x in a):
        return places.new_zeros(size)
    keys = places.new_empty(size)
    ends = places[:, 5:9].prod(1).cumsum(0)
    launch(
        _sample_kernel, places, triton.cdiv(size, SAMPLE_BLOCK), keys, table, places, ends, factors, len(places), size,
        SCORE=score, A=dtype_a, B=dtype_b, BLOCK_SIZE=SAMPLE_BLOCK,
    )  # fmt: skip
    return keys


# ---- count ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def _count_kernel(
    counts_ptr, bracket_ptr, factors_ptr, pointers_ptr, places_ptr, chunks_ptr, n_tensors, n_chunks,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """counts[0] += #{key < lo}, counts[1 + ((key - lo) >> shift)] += 1 for lo <= key <= hi. Rows: a, b."""
    bracket = load_bracket(bracket_ptr)
    end = tl.where(tl.load(bracket_ptr + 4) == 1, 0, n_chunks)
    tally = no_tally()
    for chunk in range(tl.program_id(0), end, tl.num_programs(0)):
        tensor, offset, length = chunk_of(chunks_ptr, places_ptr, chunk)
        a = address_of(pointers_ptr, n_tensors, 0, tensor)
        b = address_of(pointers_ptr, n_tensors, 1, tensor)
        operands = a, b, columns_of(places_ptr, tensor), factor_of(factors_ptr, tensor)
        vectors = vector_end(a | b, length, BLOCK_SIZE)
        units = tl.zeros([BLOCK_SIZE], tl.int32)
        for start in range(0, vectors, BLOCK_SIZE):
            key = order_key(load_score(operands, offset + start, length - start, SCORE, A, B, BLOCK_SIZE, True))
            units += count_block(key, length - start, bracket, counts_ptr, BLOCK_SIZE, A)
        tally = add_units(tally, units)
        for start in range(vectors, length, TAIL):
            key = order_key(load_score(operands, offset + start, length - start, SCORE, A, B, TAIL, False))
            tally = add_units(tally, count_block(key, length - start, bracket, counts_ptr, TAIL, None))
    commit(tally, bracket, counts_ptr)


def count(
    counts: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    bracket: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`pins_ext::count_`: one counting pass; a resolved bracket leaves `counts` as they are."""
    check_tables(places, chunks)
    dtype_a, dtype_b = check_scores(a, b, score, places, factors)
    check_shape("counts", counts, torch.int64, (1 + BINS,), places)
    check_shape("bracket", bracket, torch.int64, (5,), places)
    check_outputs({"places": places, "chunks": chunks, "bracket": bracket, "factors": factors}, {"counts": counts})
    table = pointer_table(pointers, places, a, b)
    counts.mul_(bracket[4])
    launch_chunks(
        _count_kernel, places, chunks, counts, bracket, factors, table, places, chunks,
        SCORE=score, A=dtype_a, B=dtype_b, BLOCK_SIZE=BLOCK_SIZE,
    )  # fmt: skip


# ---- collect -------------------------------------------------------------------------------------


@triton.jit
def _inside_chunk(
    operands, offset, length, lo, hi,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """How many keys of a chunk lie from lo to hi, both uint32; int32."""
    vectors = vector_end(operands[0] | operands[1], length, BLOCK_SIZE)
    inside = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, vectors, BLOCK_SIZE):
        key = order_key(load_score(operands, offset + start, length - start, SCORE, A, B, BLOCK_SIZE, True))
        inside += (key - lo <= hi - lo).to(tl.int32)
    total = tl.sum(inside)
    for start in range(vectors, length, TAIL):
        key = order_key(load_score(operands, offset + start, length - start, SCORE, A, B, TAIL, False))
        total += tl.sum(((key - lo <= hi - lo) & (tl.arange(0, TAIL) < length - start)).to(tl.int32))
    return total


@triton.jit(do_not_specialize=["size", "n_tensors", "n_chunks"])
def _collect_kernel(
    found_ptr, candidates_ptr, size, bracket_ptr, factors_ptr, pointers_ptr, places_ptr, chunks_ptr,
    n_tensors, n_chunks,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """candidates[:, j] = (key, global index) of the weights with lo <= key <= hi, in any order; found[0] = how many.

    candidates_ptr: int64 [2, size]. Rows: a, b.
    """
    lo, hi = tl.load(bracket_ptr).to(tl.uint32), tl.load(bracket_ptr + 1).to(tl.uint32)
    end = tl.where(tl.load(bracket_ptr + 4) == 1, 0, n_chunks)
    for chunk in range(tl.program_id(0), end, tl.num_programs(0)):
        tensor, offset, length = chunk_of(chunks_ptr, places_ptr, chunk)
        a = address_of(pointers_ptr, n_tensors, 0, tensor)
        b = address_of(pointers_ptr, n_tensors, 1, tensor)
        operands = a, b, columns_of(places_ptr, tensor), factor_of(factors_ptr, tensor)
        total = _inside_chunk(operands, offset, length, lo, hi, SCORE, A, B, BLOCK_SIZE)
        # Few chunks hold candidates, few of them each: those chunks are read a second time, and walked one by one.
        if total > 0:
            slot = tl.atomic_add(found_ptr, total.to(tl.int64), sem="relaxed")
            if slot + total <= size:
                run = run_of(places_ptr, tensor)
                for start in range(0, length, TAIL):
                    lane = tl.arange(0, TAIL)
                    key = order_key(load_score(operands, offset + start, length - start, SCORE, A, B, TAIL, False))
                    left = tl.where((key - lo <= hi - lo) & (lane < length - start), lane, TAIL)
                    first = tl.min(left)
                    while first < TAIL:
                        tl.store(candidates_ptr + slot, tl.max(tl.where(lane == first, key, 0)).to(tl.int64))
                        index = place_of(places_ptr, tensor, run, offset + start + first)[0]
                        tl.store(candidates_ptr + size + slot, index)
                        slot += 1
                        left = tl.where(lane == first, TAIL, left)
                        first = tl.min(left)


def collect(
    found: Tensor,
    candidates: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    bracket: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`pins_ext::collect_`: the weights inside a bracket; with more than fit, found[0] says so and some are missing."""
    check_tables(places, chunks)
    dtype_a, dtype_b = check_scores(a, b, score, places, factors)
    size = candidates.shape[-1]
    check_shape("found", found, torch.int64, (1,), places)
    check_shape("candidates", candidates, torch.int64, (2, size), places)
    check_shape("bracket", bracket, torch.int64, (5,), places)
    inputs = {"places": places, "chunks": chunks, "bracket": bracket, "factors": factors}
    check_outputs(inputs, {"found": found, "candidates": candidates})
    table = pointer_table(pointers, places, a, b)
    found.zero_()
    launch_chunks(
        _collect_kernel, places, chunks, found, candidates, size, bracket, factors, table, places, chunks,
        SCORE=score, A=dtype_a, B=dtype_b, BLOCK_SIZE=BLOCK_SIZE,
    )  # fmt: skip


# ---- tie_index -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def _tie_count_kernel(
    ties_ptr, bracket_ptr, factors_ptr, pointers_ptr, places_ptr, chunks_ptr, n_tensors, n_chunks,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """ties[chunk] = #{key == lo}, unless the rank asks for no tie. Rows: a, b."""
    tie = tl.load(bracket_ptr).to(tl.uint32)
    end = tl.where(tl.load(bracket_ptr + 3) <= 0, 0, n_chunks)
    for chunk in range(tl.program_id(0), end, tl.num_programs(0)):
        tensor, offset, length = chunk_of(chunks_ptr, places_ptr, chunk)
        a = address_of(pointers_ptr, n_tensors, 0, tensor)
        b = address_of(pointers_ptr, n_tensors, 1, tensor)
        operands = a, b, columns_of(places_ptr, tensor), factor_of(factors_ptr, tensor)
        total = _inside_chunk(operands, offset, length, tie, tie, SCORE, A, B, BLOCK_SIZE)
        tl.store(ties_ptr + chunk, total.to(tl.int64))


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def _tie_locate_kernel(
    index_ptr, at_ptr, ends_ptr, bracket_ptr, factors_ptr, pointers_ptr, places_ptr, chunks_ptr, n_tensors, n_chunks,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """index[0] = global index of the tie of this rank, which is in chunk at[0]; left as it is if there is none.

    ends_ptr: int64 [n_chunks], running sum of the ties. Rows: a, b. One program.
    """
    tie = tl.load(bracket_ptr).to(tl.uint32)
    rank = tl.load(bracket_ptr + 3)
    chunk = tl.load(at_ptr)
    if rank > 0 and chunk < n_chunks:
        tensor, offset, length = chunk_of(chunks_ptr, places_ptr, chunk)
        a = address_of(pointers_ptr, n_tensors, 0, tensor)
        b = address_of(pointers_ptr, n_tensors, 1, tensor)
        operands = a, b, columns_of(places_ptr, tensor), factor_of(factors_ptr, tensor)
        before = tl.load(ends_ptr + chunk - 1, mask=chunk > 0, other=0)
        found = tl.full([], -1, tl.int64)
        for start in range(0, length, BLOCK_SIZE):
            lane = tl.arange(0, BLOCK_SIZE)
            key = order_key(load_score(operands, offset + start, length - start, SCORE, A, B, BLOCK_SIZE, False))
            ties = ((key == tie) & (lane < length - start)).to(tl.int64)
            is_it = (ties == 1) & (before + tl.cumsum(ties) == rank + 1)
            found = tl.maximum(found, tl.max(tl.where(is_it, offset + start + lane, -1)))
            before += tl.sum(ties)
        tl.store(index_ptr, place_of(places_ptr, tensor, run_of(places_ptr, tensor), found)[0])


def tie_index(
    a: list[Tensor],
    b: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    bracket: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> Tensor:
    """`pins_ext::tie_index`: int64 [1], global index of the weight of rank bracket[3] among those with key bracket[0].

    Ranks go by global index. 0 if the rank is not positive; the largest int64 if there are no more ties than that.
    """
    check_tables(places, chunks)
    dtype_a, dtype_b = check_scores(a, b, score, places, factors)
    check_shape("bracket", bracket, torch.int64, (5,), places)
    table = pointer_table(pointers, places, a, b)
    rank = bracket[3:4]
    index = torch.where(rank <= 0, 0, torch.iinfo(torch.int64).max)
    ties = places.new_zeros(len(chunks))
    constants = {"SCORE": score, "A": dtype_a, "B": dtype_b, "BLOCK_SIZE": BLOCK_SIZE}
    launch_chunks(_tie_count_kernel, places, chunks, ties, bracket, factors, table, places, chunks, **constants)
    ends = ties.cumsum(0)
    at = torch.searchsorted(ends, rank, right=True)
    launch(
        _tie_locate_kernel, places, 1, index, at, ends, bracket, factors, table, places, chunks,
        len(places), len(chunks),
        **constants,
    )  # fmt: skip
    return index
