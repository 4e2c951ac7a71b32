"""What a gradient scaler and clipping leave on an optimizer for the step under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pins_ext.distributed.shards import is_dtensor


@dataclass(frozen=True)
class Scaling:
    """Device scalars, float32 [1], that make the gradient to use of the stored one; None where there is none.

    Attributes:
        grad_scale: torch.amp.GradScaler's: what gradients are divided by.
        found_inf: torch.amp.GradScaler's: when it is not 0, every kernel leaves weights and states alone.
        clip: FusedOptimizer.clip_grad_norm_'s: what gradients are multiplied by after that.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip: Tensor | None = None

    @staticmethod
    def of(optimizer: torch.optim.Optimizer, device: torch.device | None = None) -> Scaling:
        """What was set on this optimizer, on this device if one is named."""
        names = ("grad_scale", "found_inf", "grad_clip")
        values = (_whole(getattr(optimizer, name, None)) for name in names)
        return Scaling(*(v.reshape(1).to(device or v.device) if isinstance(v, Tensor) else None for v in values))


def _whole(value: Any) -> Any:
    """A DTensor's value, with what the ranks have still to sum."""
    return value.full_tensor() if is_dtensor(value) else value
