"""Eligible: of every group N:M the N best, and the scores by which the others compete, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .count import factor_of, load_score
from .criterion import eligible_score, order_key, score_of
from .layout import address_of, chunk_of, columns_of, store
from .select import check_scores, gather
from .table import check_like, check_list, check_outputs, check_shape, check_tables, launch_chunks, pointer_table

BLOCK_SIZE = 512
"""Four weights a thread. The others of their groups are read again from the cache, whatever M and the dimension."""


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def _eligible_kernel(
    nans_ptr, groups_ptr, factors_ptr, pointers_ptr, places_ptr, chunks_ptr, n_tensors, n_chunks,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """score = eligible_score(score, fewer than N of its group have a higher (key, position)). Rows: scores, a, b.

    nans[tensor] += scores that are NaN.
    """
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, offset, length = chunk_of(chunks_ptr, places_ptr, chunk)
        scores = address_of(pointers_ptr, n_tensors, 0, tensor)
        a = address_of(pointers_ptr, n_tensors, 1, tensor)
        b = address_of(pointers_ptr, n_tensors, 2, tensor)
        keep = tl.load(groups_ptr + 3 * tensor).to(tl.int32)
        of = tl.load(groups_ptr + 3 * tensor + 1)
        stride = tl.load(groups_ptr + 3 * tensor + 2)
        columns = columns_of(places_ptr, tensor)
        factor = factor_of(factors_ptr, tensor)
        operands = a, b, columns, factor
        nans = tl.zeros([BLOCK_SIZE], tl.int32)
        for start in range(0, length, BLOCK_SIZE):
            lane = tl.arange(0, BLOCK_SIZE)
            valid = lane < length - start
            at = offset + start + lane
            position = at // stride % of
            first = at - position * stride
            score = load_score(operands, offset + start, length - start, SCORE, A, B, BLOCK_SIZE, False)
            key = order_key(score)
            above = tl.zeros([BLOCK_SIZE], tl.int32)
            for i in range(of.to(tl.int32)):
                x = gather(a, first + i * stride, columns, valid, A)
                y = x
                if B is not None:
                    y = gather(b, first + i * stride, columns, valid, B)
                other = order_key(score_of(x, y, factor, SCORE))
                above += ((other > key) | ((other == key) & (i > position))).to(tl.int32)
            store(scores, offset + start, length - start, eligible_score(score, above < keep), BLOCK_SIZE, False)
            nans += ((score != score) & valid).to(tl.int32)
        tl.atomic_add(nans_ptr + tensor, tl.sum(nans).to(tl.int64), sem="relaxed")


def eligible(
    scores: list[Tensor],
    nans: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    groups: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`pins_ext::eligible_`: overwrite the scores and nans, int64 [n]; what `groups` holds is not checked."""
    check_tables(places, chunks)
    dtype_a, dtype_b = check_scores(a, b, score, places, factors)
    check_shape("groups", groups, torch.int64, (len(places), 3), places)
    check_list("scores", scores, (torch.float32,), places)
    check_like("scores", scores, "a", a, dtype=False)
    check_shape("nans", nans, torch.int64, (len(places),), places)
    check_outputs(
        {"places": places, "chunks": chunks, "groups": groups, "factors": factors}, {"scores": scores, "nans": nans}
    )
    table = pointer_table(pointers, places, scores, a, b)
    nans.zero_()
    launch_chunks(
        _eligible_kernel, places, chunks, nans, groups, factors, table, places, chunks,
        SCORE=score, A=dtype_a, B=dtype_b, BLOCK_SIZE=BLOCK_SIZE,
    )  # fmt: skip
