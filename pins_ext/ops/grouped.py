"""Sparse × dense on a GPU for a few tokens: a weight matrix in groups of eight, which stays packed in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GroupedWeight(NamedTuple):
    """A matrix without its zeros, as csrc/cuda/grouped.cuh lays it out: 26 bytes for eight 16-bit weights.

    Attributes:
        values: float32, bfloat16 or float16 [groups, 8]: weights of one row within 256 columns, filled up with zeros.
        columns: uint8 [groups, 8]: their columns from the group's base on.
        bases: int16 [groups], whose bits are unsigned: the column of the group's first weight.
        starts: int64 [out + 1]: first group of each row.
    """

    values: Tensor
    columns: Tensor
    bases: Tensor
    starts: Tensor


def grouped_pack(weight: Tensor) -> GroupedWeight:
    """Pack a pruned weight matrix for `grouped_linear`.

    Args:
        weight: float32, bfloat16 or float16 [out, in], contiguous, on the CPU, in at most 65536.

    Raises:
        RuntimeError: another dtype, number of dimensions or device, not contiguous, or too many columns.
    """
    return GroupedWeight(*torch.ops.pins_ext.grouped_pack(weight))


def grouped_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, summed in float32; made for one to four tokens.

    Args:
        x: float32, bfloat16 or float16 [..., in], contiguous.
        weight: a packed matrix [out, in] on the device of x.
        bias: float32 [out], or None.

    Returns:
        [..., out] in the dtype of x.

    Raises:
        RuntimeError: arguments that don't fit each other, or more columns than a GPU's shared memory holds.
    """
    return torch.ops.pins_ext.grouped_linear(x, *weight, bias)


def grouped_expand(weight: GroupedWeight, in_features: int) -> Tensor:
    """The matrix [out, in] again, in the dtype of its values; both zeros become +0.

    Args:
        weight: a packed matrix [out, in].
        in_features: in.

    Raises:
        RuntimeError: arguments that don't fit each other.
    """
    return torch.ops.pins_ext.grouped_expand(*weight, in_features)


def expand(values: Tensor, columns: Tensor, bases: Tensor, starts: Tensor, in_features: int) -> Tensor:
    """`pins_ext::grouped_expand` in plain torch, on any device: what the kernels are held against."""
    rows = torch.arange(starts.numel() - 1, device=starts.device)
    row = rows.repeat_interleave(starts.diff(), output_size=bases.numel())
    # A group may be filled up with zeros at the column after the last one.
    weight = values.new_zeros(rows.numel(), in_features + 1)
    column = (bases.long() & 0xFFFF)[:, None] + columns.long()
    # A column is written twice by zeros alone.
    weight[row[:, None].expand_as(column), column] = values
    return weight[:, :in_features].clone()


def linear(x: Tensor, values: Tensor, columns: Tensor, bases: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    """`pins_ext::grouped_linear` on the CPU, in plain torch: what the kernels are held against."""
    weight = expand(values, columns, bases, starts, x.shape[-1]).float()
    return F.linear(x.float(), weight, bias).type_as(x)
