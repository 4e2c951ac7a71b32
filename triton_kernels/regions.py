"""Counting passes over regions of tensors, each against a bracket of its own, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .count import ZERO_KEY, add_units, commit, count_block, factor_of, load_score, no_tally
from .criterion import order_key
from .layout import TAIL, address_of, chunk_of, columns_of, place_of, run_index, run_of, vector_end, walk_block
from .select import BLOCK_SIZE, check_scores
from .table import check_outputs, check_shape, check_tables, launch_chunks, pointer_table

KEYS, TIES = tl.constexpr(0), tl.constexpr(1)
"""Stages of a bracket: it counts order keys, or global indices of the weights of one key; above, it is settled."""

NOWHERE = tl.constexpr(-1)


@triton.jit
def _count_keys(
    counts_ptr, row, operands, offset, length,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Add a chunk's keys to the counts of its region, int64 [1 + bins]."""
    lo = tl.load(row).to(tl.uint32)
    width = tl.load(row + 1).to(tl.uint32) - lo
    zero = tl.full([], ZERO_KEY, tl.uint32) - lo
    bracket = lo, width, tl.where(zero < width, zero, width >> 1), tl.load(row + 2).to(tl.uint32)
    vectors = vector_end(operands[0] | operands[1], length, BLOCK_SIZE)
    units = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, vectors, BLOCK_SIZE):
        key = order_key(load_score(operands, offset + start, length - start, SCORE, A, B, BLOCK_SIZE, True))
        units += count_block(key, length - start, bracket, counts_ptr, BLOCK_SIZE, A)
    tally = add_units(no_tally(), units)
    for start in range(vectors, length, TAIL):
        key = order_key(load_score(operands, offset + start, length - start, SCORE, A, B, TAIL, False))
        tally = add_units(tally, count_block(key, length - start, bracket, counts_ptr, TAIL, None))
    commit(tally, bracket, counts_ptr)


@triton.jit
def _count_ties(
    counts_ptr, row, places_ptr, tensor, operands, offset, length,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Add the weights of the region's key in a chunk, by global index, to the counts of the region."""
    lo, hi, shift = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    tie = tl.load(row + 3).to(tl.uint32)
    run = run_of(places_ptr, tensor)
    place = place_of(places_ptr, tensor, run, offset)
    below = tl.full([], 0, tl.int64)
    for start in range(0, length, TAIL):
        key = order_key(load_score(operands, offset + start, length - start, SCORE, A, B, TAIL, False))
        equal = (key == tie) & (tl.arange(0, TAIL) < length - start)
        index, place = walk_block(places_ptr, tensor, place)
        if run >= 0:
            index = run_index(run, offset + start, TAIL)
        below += tl.sum((equal & (index < lo)).to(tl.int64))
        inside = equal & (index >= lo) & (index <= hi)
        bins = tl.where(inside, (index - lo) >> shift, NOWHERE)
        last = tl.max(bins)
        # Indices ascend: most blocks lie in one bin, and their ties don't queue for it.
        one = bins == last
        if last >= 0:
            tl.atomic_add(counts_ptr + 1 + last, tl.sum((inside & one).to(tl.int64)), sem="relaxed")
        tl.atomic_add(counts_ptr + 1 + bins, tl.full([TAIL], 1, tl.int64), mask=inside & ~one, sem="relaxed")
    tl.atomic_add(counts_ptr, below, sem="relaxed")


@triton.jit(do_not_specialize=["columns", "n_tensors", "n_chunks"])
def _count_regions_kernel(
    counts_ptr, columns, brackets_ptr, regions_ptr, factors_ptr, pointers_ptr, places_ptr, chunks_ptr,
    n_tensors, n_chunks,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """counts_ptr: int64 [regions, columns]; brackets_ptr: int64 [regions, 5]; regions_ptr: int64 [n]. Rows: a, b."""
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, offset, length = chunk_of(chunks_ptr, places_ptr, chunk)
        region = tl.load(regions_ptr + tensor)
        row = brackets_ptr + 5 * region
        stage = tl.load(row + 4)
        if stage <= TIES:
            a = address_of(pointers_ptr, n_tensors, 0, tensor)
            b = address_of(pointers_ptr, n_tensors, 1, tensor)
            operands = a, b, columns_of(places_ptr, tensor), factor_of(factors_ptr, tensor)
            own = counts_ptr + region * columns
            if stage == KEYS:
                _count_keys(own, row, operands, offset, length, SCORE, A, B, BLOCK_SIZE)
            else:
                _count_ties(own, row, places_ptr, tensor, operands, offset, length, SCORE, A, B)


def count_regions(
    counts: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    regions: Tensor,
    brackets: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`pins_ext::count_regions_`: one counting pass; the counts of a settled bracket are 0."""
    check_tables(places, chunks)
    dtype_a, dtype_b = check_scores(a, b, score, places, factors)
    size, columns = (*brackets.shape[:1], 0)[0], (*counts.shape[1:2], 0)[0]
    check_shape("regions", regions, torch.int64, (len(places),), places)
    check_shape("brackets", brackets, torch.int64, (size, 5), places)
    check_shape("counts", counts, torch.int64, (size, columns), places)
    if columns < 2:
        raise RuntimeError(f"counts must have a column of what lies below and one for each bin, got {columns}")
    inputs = {"places": places, "chunks": chunks, "regions": regions, "brackets": brackets, "factors": factors}
    check_outputs(inputs, {"counts": counts})
    table = pointer_table(pointers, places, a, b)
    counts.zero_()
    launch_chunks(
        _count_regions_kernel, places, chunks, counts, columns, brackets, regions, factors, table, places, chunks,
        SCORE=score, A=dtype_a, B=dtype_b, BLOCK_SIZE=BLOCK_SIZE,
    )  # fmt: skip
