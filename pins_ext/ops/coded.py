"""8-bit storage on the CPU: a byte for each weight and a bfloat16 scale for every 32 of them, in one flat tensor.

pins_ext/reference.py `encode` says what a byte means. uint8 stores what is never negative, int8 has a sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
"""Weights that share a scale; csrc/layout.inl kGroup."""

CODED = (torch.uint8, torch.int8)


def coded_bytes(numel: int) -> int:
    """Bytes of this many weights: whole groups, and 2 for the scale of each."""
    return -(-numel // GROUP) * (GROUP + 2)


def new_state(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros that store something of each weight.

    Args:
        parameter: the weights.
        dtype: a floating dtype, or one of CODED.
    """
    if dtype in CODED:
        return torch.zeros(coded_bytes(parameter.numel()), dtype=dtype, device=parameter.device)
    return torch.zeros_like(parameter, dtype=dtype)


def is_coded(state: Tensor, numel: int) -> bool:
    """Whether a tensor stores this many weights in 8 bits."""
    return state.dtype in CODED and state.shape == (coded_bytes(numel),)


def encode(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Store values in 8 bits, rounded to the nearest code.

    Args:
        values: any shape and floating dtype, on the CPU.
        dtype: torch.uint8 for values that are never negative, torch.int8 for others.

    Returns:
        [coded_bytes], of that dtype.
    """
    signed, x = dtype == torch.int8, values.detach().float().flatten()
    odd = ~x.isfinite() | ((x < 0) & (not signed))
    magnitude = x.abs().masked_fill_(odd, 0.0)
    magnitude = magnitude if signed else magnitude.double().sqrt().float()
    groups = magnitude.new_zeros(-(-x.numel() // GROUP) * GROUP)
    groups[: x.numel()] = magnitude
    # Up to the next bfloat16, but never to infinity.
    largest = groups.view(-1, GROUP).amax(1).view(torch.int32)
    scales = ((largest + 0xFFFF) >> 16).clamp_(max=0x7F7F).to(torch.int16).view(torch.bfloat16)
    q = groups.view(-1, GROUP) / torch.where(scales > 0, scales.float(), 1.0)[:, None]
    levels = 127 if signed else 254
    level = ((2.0 * levels * q) / (1.0 + q) + 0.5).int().clamp_(max=levels).flatten()[: x.numel()]
    level = level if signed else torch.where((level == 0) & (x > 0), 1, level)
    code = torch.where(x < 0, -level, level).masked_fill_(odd, -128 if signed else 255)
    packed = torch.zeros(coded_bytes(x.numel()), dtype=dtype)
    packed[: x.numel()] = code
    packed[len(groups) :] = scales.view(dtype)
    return packed


def decode(packed: Tensor, numel: int) -> Tensor:
    """The values of this many weights that `encode`, or an operator, stored: float32 [numel].

    Args:
        packed: [coded_bytes], one of CODED.
        numel: how many.
    """
    signed, end = packed.dtype == torch.int8, -(-numel // GROUP) * GROUP
    code, levels = packed[:numel].int(), 127 if signed else 254
    # A copy, which begins at whole bfloat16 numbers wherever the state does.
    scale = packed[end:].clone().view(torch.bfloat16).float().repeat_interleave(GROUP)[:numel]
    x = (code.float() / (2 * levels - code.abs()).float()) * scale
    return (x if signed else x * x).masked_fill_(code == (-128 if signed else 255), torch.nan)
