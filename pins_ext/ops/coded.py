"""8-bit storage: of every 32 weights of a row a byte each and a bfloat16 scale, in a tensor [.., groups of a row, 34].

pins_ext/reference.py `encode` says what a byte means. uint8 stores what is never negative, int8 has a sign. A tensor is
cut into shards as the weights are, dimension by dimension: see `check_cut`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pins_ext.ops.layout import GROUP, Shard, columns_of, row_dims

CODED = (torch.uint8, torch.int8)


def coded_shape(shape: Sequence[int], shard: Shard | None = None) -> tuple[int, ...]:
    """Shape of a tensor in 8 bits.

    Args:
        shape: of the weights that are here.
        shard: where they lie in their full tensor; None where that is whole.
    """
    rows = row_dims(shard.full if shard else shape)
    return (*shape[:rows], -(-math.prod(shape[rows:]) // GROUP), GROUP + 2)


def coded_bytes(shape: Sequence[int]) -> int:
    """Bytes of a tensor in 8 bits, scales included.

    Args:
        shape: of the weights that it stores.
    """
    return math.prod(coded_shape(shape))


def coded_box(shape: Sequence[int], shard: Shard) -> tuple[slice, ...]:
    """Where a shard of a tensor in 8 bits lies in the full one.

    Args:
        shape: of the weights that are here.
        shard: where they lie in their full tensor.
    """
    rows = row_dims(shard.full)
    *sizes, groups, _ = coded_shape(shape, shard)
    first = shard.start[rows] * math.prod(shard.full[rows + 1 :]) // GROUP if shard.full else 0
    boxes = [slice(begin, begin + n) for begin, n in zip(shard.start[:rows], sizes, strict=True)]
    return (*boxes, slice(first, first + groups))


def check_cut(name: str, shape: Sequence[int], shard: Shard) -> None:
    """Raise ValueError where a shard cuts a group of 8-bit storage.

    Args:
        name: what to call the tensor.
        shape: of the local tensor.
        shard: where it lies in its full tensor.
    """
    rows, full = row_dims(shard.full), shard.full
    inside = [(begin, n, f) for begin, n, f in zip(shard.start, shape, full, strict=True)][rows:]
    inner = math.prod(full[rows + 1 :])
    ends = [end * inner for begin, n, f in inside[:1] if n for end in (begin, begin + n) if end < f]
    if any(n != f for _, n, f in inside[1:]) or any(end % GROUP for end in ends):
        raise ValueError(
            f"{name} is cut inside its rows of {math.prod(full[rows:]):,} weights: {tuple(shape)} of {tuple(full)} "
            f"from {shard.start} on. 8-bit storage keeps {GROUP} weights of a row together: cut between rows or at "
            f"multiples of {GROUP} weights, or use bfloat16"
        )


def new_state(
    parameter: Tensor, dtype: torch.dtype, shard: Shard | None = None, device: torch.device | None = None
) -> Tensor:
    """Zeros that store something of each weight.

    Args:
        parameter: the weights that are here.
        dtype: a floating dtype, or one of CODED.
        shard: where they lie in their full tensor; None where that is whole.
        device: where the zeros are to be; None: where the weights are.
    """
    if dtype in CODED:
        return torch.zeros(coded_shape(parameter.shape, shard), dtype=dtype, device=device or parameter.device)
    return torch.zeros_like(parameter, dtype=dtype, device=device)


def is_coded(state: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor stores weights in 8 bits.

    Args:
        state: any tensor.
        shape: of the weights.
    """
    return state.dtype in CODED and tuple(state.shape) == coded_shape(shape)


def by_group(x: Tensor, shard: Shard | None = None) -> Tensor:
    """Values of each weight as [.., groups of a row, 32]: a copy, rows filled up with zeros.

    Args:
        x: of the shape of the weights that are here.
        shard: where they lie in their full tensor; None where that is whole.
    """
    *rows, groups, _ = coded_shape(x.shape, shard)
    columns = columns_of(x.shape, shard)
    filled = x.new_zeros(math.prod(rows), groups * GROUP)
    filled[:, :columns] = x.reshape(math.prod(rows), columns)
    return filled.view(*rows, groups, GROUP)


def encode(values: Tensor, dtype: torch.dtype, shard: Shard | None = None) -> Tensor:
    """Store values in 8 bits, rounded to the nearest code.

    Args:
        values: of the shape of the weights that are here, any floating dtype.
        dtype: torch.uint8 for values that are never negative, torch.int8 for others.
        shard: where the weights lie in their full tensor; None where that is whole.

    Returns:
        [coded_shape], of that dtype.
    """
    signed, x = dtype == torch.int8, by_group(values.detach().float(), shard)
    odd = ~x.isfinite() | ((x < 0) & (not signed))
    magnitude = x.abs().masked_fill_(odd, 0.0)
    magnitude = magnitude if signed else magnitude.double().sqrt().float()
    # Up to the next bfloat16, but never to infinity.
    largest = magnitude.amax(-1, keepdim=True).view(torch.int32)
    scales = ((largest + 0xFFFF) >> 16).clamp_(max=0x7F7F).to(torch.int16).view(torch.bfloat16)
    q = magnitude / torch.where(scales > 0, scales.float(), 1.0)
    levels = 127 if signed else 254
    level = ((2.0 * levels * q) / (1.0 + q) + 0.5).int().clamp_(max=levels)
    level = level if signed else torch.where((level == 0) & (x > 0), 1, level)
    code = torch.where(x < 0, -level, level).masked_fill_(odd, -128 if signed else 255)
    return torch.cat([code.char() if signed else code.byte(), scales.view(torch.uint8).view(dtype)], -1)


def decode(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The values that `encode`, or an operator, stored of the weights: float32, of their shape.

    Args:
        packed: [coded_shape], one of CODED.
        shape: of the weights that are here.
    """
    signed = packed.dtype == torch.int8
    code, levels = packed[..., :GROUP].int(), 127 if signed else 254
    # A copy, which begins at whole bfloat16 numbers wherever the state does.
    scale = packed[..., GROUP:].clone().view(torch.bfloat16).float()
    x = (code.float() / (2 * levels - code.abs()).float()) * scale
    x = (x if signed else x * x).masked_fill_(code == (-128 if signed else 255), torch.nan)
    *rows, groups, _ = packed.shape
    return x.view(math.prod(rows), groups * GROUP)[:, : math.prod(shape[len(rows) :])].reshape(tuple(shape))
