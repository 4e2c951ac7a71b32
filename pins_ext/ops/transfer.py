"""The one way by which host data reaches the device within a step."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to a device without waiting for it.

    Args:
        values: tensor on the host. On a GPU it goes through pinned memory, which torch's allocator keeps until the copy
            has been made.
        device: where it is needed.

    Returns:
        The copy; `values` itself where `device` is the CPU.
    """
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
