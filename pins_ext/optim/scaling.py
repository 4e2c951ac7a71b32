"""What a gradient scaler leaves on an optimizer for the step under way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """Device scalars of torch.amp.GradScaler, float32 [1]; None where there is none.

    Attributes:
        grad_scale: what the gradients are to be divided by.
        found_inf: when it is not 0, every kernel leaves weights and states alone.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @staticmethod
    def of(optimizer: torch.optim.Optimizer, device: torch.device | None = None) -> Scaling:
        """What was set on this optimizer, on this device if one is named."""
        values = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        return Scaling(*(v.reshape(1).to(device or v.device) if isinstance(v, Tensor) else None for v in values))
