"""Learning rates of parameter groups, read on the host or left on the device that they live on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pins_ext import ops

Rate = float | Tensor


def host_rate(lr: Any) -> float | None:
    """The rate as a number; None for a tensor on another device, which reading would wait for."""
    return None if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def rates_on(rates: Sequence[Rate], device: torch.device) -> Tensor:
    """The rates as one tensor, without waiting for any device.

    Args:
        rates: numbers, or scalar tensors on any device.
        device: where they are needed.

    Returns:
        float64 [n].
    """
    known = [host_rate(lr) for lr in rates]
    column = ops.to_device(torch.tensor([lr or 0.0 for lr in known], dtype=torch.float64), device)
    for tensor in {id(lr): lr for lr, there in zip(rates, known, strict=True) if there is None}.values():
        assert isinstance(tensor, Tensor)
        its_own = ops.to_device(torch.tensor([lr is tensor for lr in rates]), device)
        column = torch.where(its_own, tensor.to(device, torch.float64), column)
    return column
