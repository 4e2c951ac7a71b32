"""What the CPU kernels run on."""

from __future__ import annotations

import torch


def cpu_capability() -> str:
    """The instruction set of the CPU kernels: default, avx2 or avx512.

    It is the widest that this CPU has, or the one that PINS_EXT_CPU_CAPABILITY named when the extension was loaded.
    """
    return torch.ops.pins_ext.cpu_capability()
