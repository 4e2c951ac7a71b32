"""A few tokens times a grouped matrix (csrc/cuda/grouped.cuh), for builds without CUDA C++: a program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import float_from
from .table import launch

GROUP = tl.constexpr(8)
BLOCK_SIZE = 128
"""Groups at a time: one for each thread of four warps, whose eight values are one or two 16-byte loads."""

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@triton.jit(do_not_specialize=["in_features", "out_features"])
def _grouped_linear_kernel(
    x_ptr, values_ptr, columns_ptr, bases_ptr, starts_ptr, bias_ptr, y_ptr, in_features, out_features,
    VALUES: tl.constexpr, TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """y[token, row] = sum of weight × x[token, column] + bias[row]; x and y are float32."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(starts_ptr + row + 1)
    lane = tl.arange(0, GROUP)
    for token in tl.static_range(TOKENS):
        products = tl.zeros([BLOCK_SIZE, GROUP], tl.float32)
        for first in range(tl.load(starts_ptr + row), end, BLOCK_SIZE):
            group = first + tl.arange(0, BLOCK_SIZE)
            there = group < end
            at = group[:, None] * GROUP + lane[None, :]
            value = float_from(tl.load(values_ptr + at, mask=there[:, None], other=0), VALUES)
            base = tl.load(bases_ptr + group, mask=there, other=0).to(tl.int32) & 0xFFFF
            column = base[:, None] + tl.load(columns_ptr + at, mask=there[:, None], other=0).to(tl.int32)
            # The zeros that fill up a group may lie one column behind the last.
            inside = there[:, None] & (column < in_features)
            products += value * tl.load(x_ptr + token * in_features.to(tl.int64) + column, mask=inside, other=0.0)
        total = tl.sum(tl.sum(products, 1), 0)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + row)
        tl.store(y_ptr + token * out_features.to(tl.int64) + row, total)


def grouped_linear(
    x: Tensor, values: Tensor, columns: Tensor, bases: Tensor, starts: Tensor, bias: Tensor | None
) -> Tensor:
    """`pins_ext::grouped_linear`."""
    rows, in_features = starts.numel() - 1, x.shape[-1]
    if x.dtype not in _NAMES or values.dtype not in _NAMES:
        raise RuntimeError(f"x and values must be float32, bfloat16 or float16, got {x.dtype} and {values.dtype}")
    for name, tensor, dtype, shape in (
        ("columns", columns, torch.uint8, values.shape),
        ("bases", bases, torch.int16, values.shape[:1]),
        ("starts", starts, torch.int64, (rows + 1,)),
        ("bias", bias, torch.float32, (rows,)),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape or tensor.device != x.device):
            raise RuntimeError(f"{name} must be {dtype} {tuple(shape)} on {x.device}, got {tensor.dtype} "
                               f"{tuple(tensor.shape)} on {tensor.device}")  # fmt: skip
    flat = x.reshape(-1, in_features).float()
    y = flat.new_empty(flat.shape[0], rows)
    # 16-bit floats cross memory as integers: the interpreter's own bfloat16 is inexact.
    bits = values if values.dtype == torch.float32 else values.view(torch.uint16)
    for first in range(0, flat.shape[0] if rows else 0, 4):
        tokens = min(4, flat.shape[0] - first)
        launch(
            _grouped_linear_kernel, starts, rows,
            flat[first:], bits, columns, bases, starts, bias, y[first:], in_features, rows,
            VALUES=_NAMES[values.dtype], TOKENS=tokens, BLOCK_SIZE=BLOCK_SIZE,
        )  # fmt: skip
    return y.type_as(x).reshape(*x.shape[:-1], rows)
