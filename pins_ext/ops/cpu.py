"""What the CPU kernels run on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cpu_capability() -> str:
    """The instruction set of the CPU kernels: default, avx2 or avx512.

    It is the widest that this CPU has, or the one that PINS_EXT_CPU_CAPABILITY named when the extension was loaded.
    """
    return torch.ops.pins_ext.cpu_capability()


def stream_(written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """Move what a kernel must move that updates some tensors in place and reads others, without any arithmetic.

    No kernel over the same tensors can be quicker: a benchmark's floor. On the CPU.

    Args:
        written: float32, bfloat16 or float16 tensors of one size; read, and written back as they are.
        read: float32, bfloat16 or float16 tensors of that size; with those written at most 16.

    Raises:
        RuntimeError: more tensors, another dtype, size or device, not contiguous, outputs that autograd records.
    """
    torch.ops.pins_ext.stream_(written, read)
