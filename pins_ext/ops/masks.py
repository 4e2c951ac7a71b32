"""Packed masks: one bit a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean mask (True = keep) as bits: uint8 [mask_bytes]."""
    bits = torch.zeros(8 * mask_bytes(mask.numel()), dtype=torch.uint8, device=mask.device)
    bits[: mask.numel()] = mask.flatten()
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean mask of this shape whose bits these are."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).flatten()[: math.prod(shape)].view(tuple(shape)).bool()
