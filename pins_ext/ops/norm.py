"""The norm of all gradients and the factor that clips them, left on their device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_factor(square_sum: Tensor, max_norm: float, grad_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Norm and clip factor as torch.nn.utils.clip_grad_norm_ computes them, without waiting for the device.

    The update operators and `accumulate_` take the factor as `clip`. A norm that is not finite makes the factor 0 or
    NaN, as torch's.

    Args:
        square_sum: float64 [1], what `sum_of_squares` returns; of several devices or ranks, the sum.
        max_norm: largest norm that gradients keep.
        grad_scale: float32 [1], what the gradients were multiplied with; None for 1.

    Returns:
        norm: float32 [1], of the unscaled gradients, before clipping.
        factor: float32 [1], min(1, max_norm / (norm + 1e-6)).
    """
    norm = square_sum.sqrt().float()
    if grad_scale is not None:
        norm = norm / grad_scale
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


def sum_of_squares(
    tensors: Sequence[Tensor], places: Tensor, chunks: Tensor, *, pointers: Tensor | None = None
) -> Tensor:
    """The sum of the squares of all elements, in an order that depends on neither threads nor device.

    Args:
        tensors: float32, bfloat16 or float16 [n tensors].
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        pointers: int64 [1, n], on a GPU: addresses of the tensors; None to look them up, except while a CUDA graph is
            captured.

    Returns:
        float64 [1].

    Raises:
        RuntimeError: an argument of another dtype, shape or device, or not contiguous.
    """
    return torch.ops.pins_ext.sum_of_squares(tensors, places, chunks, pointers=pointers)
