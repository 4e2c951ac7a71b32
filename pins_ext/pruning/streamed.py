"""Gradients one at a time: each is handed over as soon as backward has it, and freed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pins_ext.hooks import weakly

TakeGradient = Callable[[int, Tensor], None]
"""Told the place of a parameter and its gradient, which is freed when it returns."""


class GradientStream:
    """Follows parameters by hooks inside backward, so that no two of their gradients need to exist at once.

    It ends with the last reference to it.

    Args:
        parameters: leaf tensors that require a gradient.
        take: told of every gradient.
        first: told when a gradient comes and none has come since `begin`, before it is taken.
        torn: told before that when gradients of an earlier backward are there, which an exception has ended; it must
            `begin`. None: gradients of several backwards belong together.

    Attributes:
        came: places of the parameters whose gradient has come since `begin`.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        take: TakeGradient,
        first: Callable[[], None] = lambda: None,
        torn: Callable[[], None] | None = None,
    ) -> None:
        self._take, self._first, self._torn = take, first, torn
        self._backward = -1
        self.came: set[int] = set()
        self._handles: list[Any] = [
            p.register_post_accumulate_grad_hook(partial(weakly(self._hook), i)) for i, p in enumerate(parameters)
        ]

    def begin(self) -> None:
        """Forget which gradients have come."""
        self.came.clear()

    @torch.no_grad()
    def _hook(self, i: int, p: Tensor) -> None:
        grad, p.grad = p.grad, None
        if grad is None:
            return
        backward = torch._C._current_graph_task_id()
        if self._torn is not None and self.came and backward != self._backward:
            self._torn()
        self._backward = backward
        if i in self.came:
            raise RuntimeError(
                "a parameter's gradient came twice in one backward, in parts, of which no score can be made: use "
                "non-reentrant activation checkpointing (use_reentrant=False)"
            )
        if not self.came:
            self._first()
        self.came.add(i)
        self._take(i, grad)

    def detach(self) -> None:
        """Let go of the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
