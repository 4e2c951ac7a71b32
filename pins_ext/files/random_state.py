"""The state of every random number generator that training draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators (every GPU's too), for torch.load(weights_only=True)."""
    _, key, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(key).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Put every generator back to what `capture` returned."""
    key, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def untouched() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace: training goes on as if it had not happened."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
