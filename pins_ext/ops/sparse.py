"""Sparse × dense on the CPU: a weight matrix packed once, multiplied by one to thousands of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PackedWeight(NamedTuple):
    """A matrix without its zeros, as csrc/cpu/sparse.h lays it out.

    Attributes:
        values: float32, bfloat16 or int8 [n]: the weights, filled up with zeros to whole slices.
        columns: uint8 [n]: column of each within its block of 256.
        rows: uint8 [slices, 16]: rows of each slice within its block.
        counts: int16 [slices]: steps of each slice.
        starts: int64 [blocks + 1, 2]: first slice and first step of each block.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor
    counts: Tensor
    starts: Tensor


def sparse_pack(weight: Tensor) -> PackedWeight:
    """Pack a pruned weight matrix for `sparse_linear`.

    Args:
        weight: float32, bfloat16 or int8 [out, in], contiguous, on the CPU.

    Raises:
        RuntimeError: another dtype, number of dimensions or device, or not contiguous.
    """
    return PackedWeight(*torch.ops.pins_ext.sparse_pack(weight))


def sparse_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out_features: int) -> Tensor:
    """x · weightᵀ + bias, summed in float32.

    Args:
        x: float32, bfloat16 or float16 [..., in], contiguous, on the CPU.
        weight: packed from a float32 or bfloat16 matrix [out, in].
        bias: float32 [out], or None.
        out_features: out.

    Returns:
        [..., out] in the dtype of x.

    Raises:
        RuntimeError: arguments that don't fit each other.
    """
    return torch.ops.pins_ext.sparse_linear(x, *weight, bias, out_features)


def sparse_linear_int8(
    x: Tensor,
    weight: PackedWeight,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    vnni: bool = True,
) -> Tensor:
    """x · (codes · scales)ᵀ + bias, with x rounded to 255 steps for each token; integer sums are exact.

    Args:
        x: float32, bfloat16 or float16 [..., in], contiguous, on the CPU, in at most 32768.
        weight: packed from int8 codes [out, in].
        scales: float32 [out]: weight = code * scale of its row.
        sums: int32 [out]: sum of the codes of each row.
        bias: float32 [out], or None.
        vnni: use the CPU's instructions for sums of bytes, where it has them; the result is the same without.

    Returns:
        [..., out] in the dtype of x; NaN for a token that holds NaN or an infinity.

    Raises:
        RuntimeError: arguments that don't fit each other.
    """
    return torch.ops.pins_ext.sparse_linear_int8(x, *weight, scales, sums, bias, vnni)
