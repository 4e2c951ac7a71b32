"""Packed masks: one bit a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mask_bytes(numel: int) -> int:
    """Bytes of a packed mask: one bit for each weight, least significant first, whole 64-bit words.

    Args:
        numel: number of weights.
    """
    return -(-numel // 64) * 8


def new_mask(tensor: Tensor) -> Tensor:
    """A packed mask that keeps every weight, uint8 [mask_bytes(numel)]; padding bits are zero.

    Args:
        tensor: of the weights, any shape; the mask is on its device.
    """
    n = tensor.numel()
    bits = torch.full((mask_bytes(n),), 255, dtype=torch.uint8, device=tensor.device)
    bits[n // 8 :] = 0
    if n % 8:
        bits[n // 8] = (1 << n % 8) - 1
    return bits


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean mask as bits, uint8 [mask_bytes(numel)].

    Args:
        mask: bool, any shape; True = keep.
    """
    bits = torch.zeros(8 * mask_bytes(mask.numel()), dtype=torch.uint8, device=mask.device)
    bits[: mask.numel()] = mask.flatten()
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean mask (True = keep) of a packed one.

    Args:
        bits: uint8 [mask_bytes(numel)].
        shape: of the weights.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).flatten()[: math.prod(shape)].view(tuple(shape)).bool()


def set_bits(bits: Tensor) -> Tensor:
    """How many weights a packed mask keeps, int64 [], on the mask's device.

    Args:
        bits: uint8 [mask_bytes(numel)], as from `new_mask`; padding bits zero.
    """
    words = bits.view(torch.int64)
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    # The product's highest byte is the sum of all bytes, at most 64.
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101) >> 56).sum()


def pack_(
    masks: Sequence[Tensor],
    stats: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    threshold: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """Write packed masks: a weight's bit is 0 where its (order key, global index) lies before the threshold.

    Args:
        masks: uint8 [n tensors of `mask_bytes`]; written.
        stats: int64 [n, 3], of each tensor: weights kept, bits that changed, scores that are NaN; written.
        a: [n tensors], first operand of the score: float32 or bfloat16 for product and deviation, otherwise also
            float16; also a state in 8 bits, see `encode`.
        b: [n tensors], its second operand: in the dtype of a for product and deviation, any of the three for fisher,
            otherwise empty.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        score: one of `SCORES`.
        threshold: int64 [1, 2] or [n, 2], (order key, tie index) for all tensors or for each, from `select`.
        factors: float32 [n], of the score fisher: 1 / (1 - beta2^t) of each tensor; None for the others.
        pointers: int64 [3, n], on a GPU: addresses of masks, a and b; None to look them up, except while a CUDA graph
            is captured.

    Raises:
        RuntimeError: an unknown score, an argument of another dtype, shape or device, not contiguous, on the CPU a
            threshold that is no 32-bit key, an output that shares memory with a table.
    """
    torch.ops.pins_ext.pack_(masks, stats, a, b, places, chunks, score, threshold, factors=factors, pointers=pointers)


def pack_around_(
    masks: Sequence[Tensor],
    stats: Tensor,
    threshold: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    bracket: Tensor,
    *,
    factors: Tensor | None = None,
) -> None:
    """Write packed masks from a bracket around the threshold, and find the threshold, in one pass; on the CPU.

    Weights below the bracket are pruned, those above it kept; the weights inside are ordered by (order key, global
    index), and as many of them as the bracket's rank says are pruned. They are held in memory, 40 bytes each: narrow
    the bracket first.

    Args:
        masks: uint8 [n tensors of `mask_bytes`]; written.
        stats: int64 [n, 3], of each tensor: weights kept, bits that changed, scores that are NaN; written.
        threshold: int64 [1, 2], (order key, tie index), as `select` returns it; written.
        a: [n tensors], first operand of the score: float32 or bfloat16 for product and deviation, otherwise also
            float16.
        b: [n tensors], its second operand: in the dtype of a for product and deviation, any of the three for fisher,
            otherwise empty.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        score: one of `SCORES`.
        bracket: int64 [5]: lowest and highest key, width of a bin as a shift, rank of the weight looked for among those
            from the lowest key on, 1 once it is a single key.
        factors: float32 [n], of the score fisher: 1 / (1 - beta2^t) of each tensor; None for the others.

    Raises:
        RuntimeError: an unknown score, an argument of another dtype, shape or device, not contiguous, a rank that lies
            outside the bracket, an output that shares memory with a table.
    """
    torch.ops.pins_ext.pack_around_(masks, stats, threshold, a, b, places, chunks, score, bracket, factors=factors)


def apply_mask_(
    params: Sequence[Tensor],
    masks: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    *,
    pointers: Tensor | None = None,
) -> None:
    """Set the weights whose bit is 0 to +0, in place; the others keep every bit.

    Args:
        params: float32, bfloat16 or float16 [n tensors], weights; written.
        masks: uint8 [n tensors of `mask_bytes`].
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        pointers: int64 [2, n], on a GPU: addresses of params and masks; None to look them up, except while a CUDA graph
            is captured.

    Raises:
        RuntimeError: an argument of another dtype, shape or device, not contiguous, params that autograd records or
            that share memory with a table.
    """
    torch.ops.pins_ext.apply_mask_(params, masks, places, chunks, pointers=pointers)
