"""Bytes that torch tensors hold, on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn


def storages() -> dict[int, int]:
    """Bytes by address of all memory that torch tensors hold."""
    found = {}
    for thing in gc.get_objects():
        # Subclasses are left out: a compiler's fake tensors have no memory.
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu" and thing.layout == torch.strided:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            if thing.is_leaf and thing.grad is not None:
                found[thing.grad.untyped_storage().data_ptr()] = thing.grad.untyped_storage().nbytes()
    return found


def allocated(f: Callable[[], object]) -> int:
    """The most bytes that tensors made inside hold at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
