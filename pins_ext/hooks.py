"""Hooks of tensors that don't keep alive what they call: Python's garbage collector can't look inside a tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A function that calls a bound method as long as its object lives, and then nothing.

    Args:
        method: of an object that somebody else holds for as long as it is to be called.
    """
    held = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        alive = held()
        if alive is not None:
            alive(*args)

    return call
