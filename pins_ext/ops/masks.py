"""Packed masks: one bit a weight."""

from __future__ import annotations

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
