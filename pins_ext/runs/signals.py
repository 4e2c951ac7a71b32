"""Ctrl-C and SIGTERM, taken over for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Asked to stop by the user, or by the machine's scheduler."""


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Hand these signals to a function inside, and give them back afterwards.

    Args:
        handler: called with the signal's number, as `signal.signal` does.
    """
    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
