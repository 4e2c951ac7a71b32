"""Calls as CUDA graphs: what Python spends on launching kernels is none of the kernels' time."""

from __future__ import annotations

from collections.abc import Callable

import torch


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph, after it ran once; as it is on the CPU.

    Args:
        call: launches kernels, always over the same memory.
        device: where they run.

    Raises:
        RuntimeError: torch can't capture it, for example because it asks for a number on the host.
    """
    call()
    if device.type != "cuda":
        return call
    torch.cuda.synchronize(device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            call()
    except BaseException:
        torch.cuda.set_stream(stream)  # torch leaves its own where a capture fails
        raise
    return graph.replay
