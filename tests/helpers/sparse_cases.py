"""Pruned matrices, and what their products may differ by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pruned(rows: int, columns: int, sparsity: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    # Rows of very different density, an empty one and a full one.
    share = torch.rand(rows, 1, generator=generator) * 2 * (1 - sparsity)
    weight[torch.rand(weight.shape, generator=generator) >= share.clamp(max=1)] = 0
    if rows > 4 and sparsity < 1:
        weight[1] = 0
        weight[3] = 1
    return weight


def tolerance(x: Tensor, weight: Tensor) -> Tensor:
    """Of a sum of n products in float32, in any order: n roundings of the sum of magnitudes (Higham 2002, §3.1)."""
    magnitudes = F.linear(x.abs().double(), weight.abs().double())
    return magnitudes * torch.finfo(torch.float32).eps * (weight != 0).sum(dim=1) / 2 + 1e-30


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y is x · weightᵀ + bias, summed in float32 in any order and rounded to the dtype of x."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    bound = tolerance(x, weight) + (0 if bias is None else 2e-7 * (bias.abs() + exact.abs()))
    if x.dtype != torch.float32:
        # Rounded once more, into 16 bits.
        bound = bound + exact.abs() * torch.finfo(x.dtype).eps + 1e-7
    assert ((y.double() - exact).abs() <= bound).all()
