"""The norm of all gradients and the factor that clips them, left on their device."""

from __future__ import annotations

from torch import Tensor


def clip_factor(square_sum: Tensor, max_norm: float, grad_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Norm and clip factor as torch.nn.utils.clip_grad_norm_ computes them, without waiting for the device.

    The update operators and `accumulate_` take the factor as `clip`. A norm that is not finite makes the factor 0 or
    NaN, as torch's.

    Args:
        square_sum: float64 [1], what `torch.ops.pins_ext.sum_of_squares` returns; of several devices or ranks, the sum.
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
