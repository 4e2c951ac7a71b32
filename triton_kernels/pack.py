"""Pack: the bit mask of a whole model from its scores and a threshold, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .count import factor_of, load_score
from .criterion import order_key
from .layout import CHUNK, TAIL, address_of, chunk_of, columns_of, load, local_rank, store, vector_end
from .select import check_scores
from .table import CODED, check_list, check_outputs, check_shape, check_tables, launch_chunks, pointer_table

BLOCK_SIZE = 1024
"""Weights of the VECTOR path at a time, as in importance.py: 32 words of mask."""


@triton.jit
def set_bits(word):
    """Number of set bits of each uint32."""
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _pack_block(masks, first, left, keep, BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Write the keep flags of a block as words of BITS; kept + (flipped << 16), int32 [BLOCK_SIZE // BITS]."""
    WORDS: tl.constexpr = BLOCK_SIZE // BITS
    ELEMENT: tl.constexpr = tl.uint32 if BITS == 32 else tl.uint8
    bit = tl.full([], 1, tl.uint32) << tl.arange(0, BITS).to(tl.uint32)
    word = tl.sum(tl.where(tl.reshape(keep, [WORDS, BITS]), bit[None, :], 0), 1).to(tl.uint32)
    # Masks are whole 64-bit words; the padding bits of both are zero.
    words_left = (left + 63) // 64 * (64 // BITS)
    old = load(masks, first // BITS, words_left, ELEMENT, WORDS, VECTOR).to(tl.uint32)
    store(masks, first // BITS, words_left, word.to(ELEMENT), WORDS, VECTOR)
    return set_bits(word) + (set_bits(word ^ old) << 16)


@triton.jit(do_not_specialize=["threshold_stride", "n_tensors", "n_chunks"])
def _pack_kernel(
    stats_ptr, threshold_ptr, threshold_stride, factors_ptr, pointers_ptr, places_ptr, chunks_ptr, n_tensors, n_chunks,
    SCORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """bit = not (key < t or key == t and global_index < tie), with the tensor's threshold (t, tie). Rows: masks, a, b.

    stats[tensor] += (kept, flipped, keys of NaN).
    """
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, offset, length = chunk_of(chunks_ptr, places_ptr, chunk)
        masks = address_of(pointers_ptr, n_tensors, 0, tensor)
        a = address_of(pointers_ptr, n_tensors, 1, tensor)
        b = address_of(pointers_ptr, n_tensors, 2, tensor)
        threshold = tl.load(threshold_ptr + tensor * threshold_stride).to(tl.uint32)
        tie = tl.load(threshold_ptr + tensor * threshold_stride + 1)
        # Ties before this weight of the chunk are pruned.
        pruned = local_rank(places_ptr, tensor, tie) - offset
        first_kept = tl.where(pruned <= 0, 0, tl.where(pruned >= CHUNK, CHUNK, pruned.to(tl.int32)))
        # After the divisions, where registers are few: before them ptxas spills for 16-bit operands on sm_90.
        operands = a, b, columns_of(places_ptr, tensor), factor_of(factors_ptr, tensor)
        vectors = vector_end(masks | a | b, length, BLOCK_SIZE)
        changes = tl.zeros([BLOCK_SIZE // 32], tl.int32)
        nans = tl.zeros([BLOCK_SIZE], tl.int32)
        for start in range(0, vectors, BLOCK_SIZE):
            score = load_score(operands, offset + start, length - start, SCORE, A, B, BLOCK_SIZE, True)
            key = order_key(score)
            keep = (key > threshold) | ((key == threshold) & (tl.arange(0, BLOCK_SIZE) >= first_kept - start))
            changes += _pack_block(masks, offset + start, length - start, keep, 32, BLOCK_SIZE, True)
            nans += (score != score).to(tl.int32)
        total_changes = tl.sum(changes)
        total_nans = tl.sum(nans)
        for start in range(vectors, length, TAIL):
            lane = tl.arange(0, TAIL)
            valid = lane < length - start
            score = load_score(operands, offset + start, length - start, SCORE, A, B, TAIL, False)
            key = order_key(score)
            keep = (key > threshold) | ((key == threshold) & (lane >= first_kept - start))
            changes8 = _pack_block(masks, offset + start, length - start, keep & valid, 8, TAIL, False)
            total_changes += tl.sum(changes8)
            total_nans += tl.sum(((score != score) & valid).to(tl.int32))
        row = stats_ptr + 3 * tensor
        tl.atomic_add(row, (total_changes & 0xFFFF).to(tl.int64), sem="relaxed")
        tl.atomic_add(row + 1, (total_changes >> 16).to(tl.int64), sem="relaxed")
        tl.atomic_add(row + 2, total_nans.to(tl.int64), sem="relaxed")


def pack(
    masks: list[Tensor],
    stats: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    threshold: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`pins_ext::pack_`: overwrite the masks, one bit per weight, and stats int64 [n, 3] (kept, flipped, NaN)."""
    check_tables(places, chunks)
    dtype_a, dtype_b = check_scores(a, b, score, places, factors)
    check_list("masks", masks, (torch.uint8,), places)
    for i, (mask, x) in enumerate(zip(masks, a, strict=True)):
        if x.dtype in CODED:
            # Of how many weights it is the places say, on the device.
            if x.dim() < 2 or x.shape[-1] != 34 or mask.numel() > -(-x.numel() // 34 * 32 // 64) * 8:
                raise RuntimeError(f"masks[{i}] has {mask.numel()} bytes, too many for {tuple(x.shape)} in 8 bits")
            continue
        size = -(-x.numel() // 64) * 8
        if mask.numel() != size:
            raise RuntimeError(f"masks[{i}] must have {size} bytes for {x.numel()} weights, got {mask.numel()}")
    check_shape("stats", stats, torch.int64, (len(places), 3), places)
    rows = len(places) if threshold.dim() and len(threshold) == len(places) else 1
    check_shape("threshold", threshold, torch.int64, (rows, 2), places)
    check_outputs(
        {"places": places, "chunks": chunks, "threshold": threshold, "factors": factors},
        {"masks": masks, "stats": stats},
    )
    table = pointer_table(pointers, places, masks, a, b)
    stats.zero_()
    launch_chunks(
        _pack_kernel, places, chunks, stats, threshold, 2 * (rows > 1), factors, table, places, chunks,
        SCORE=score, A=dtype_a, B=dtype_b, BLOCK_SIZE=BLOCK_SIZE,
    )  # fmt: skip
