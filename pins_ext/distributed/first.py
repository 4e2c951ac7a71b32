"""What one of several processes does for all: writing files that all of them read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_first(action: Callable[[], T]) -> T:
    """Wait for every process, let the first one act, and tell all what it returned; alone, act.

    Args:
        action: returns something that can be pickled.

    Returns:
        What it returned on the first process.

    Raises:
        Exception: what it raised there, on every process; where that can't be sent, on the others a RuntimeError.
    """
    if not several():
        return action()
    dist.barrier()
    answer: list[Any] = [None, None]
    failed: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except Exception as error:
            failed, answer[1] = error, _sendable(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise failed or answer[1]
    return answer[0]


def _sendable(error: Exception) -> Exception:
    """The error, or where a copy of it can't be made by pickling, one that says the same."""
    try:
        # It is copied as it is received: made again from its arguments.
        pickle.dumps(copy.copy(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave() -> None:
    """Part from the other processes, at the end."""
    if several():
        dist.destroy_process_group()
