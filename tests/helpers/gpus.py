"""What stands for a GPU in a test: one, or CPU tensors on the GPU's operators, emulated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """A device, and the context in which its operators are those of a GPU."""

    device: str
    kernels: Callable[[], AbstractContextManager[None]]

    def choose(self, real: T, emulated: T) -> T:
        """What a GPU takes in a moment, and what an emulated one does."""
        return real if self.device == "cuda" else emulated
