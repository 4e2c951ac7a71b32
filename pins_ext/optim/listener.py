"""What a fused optimizer reports about its steps, and what its pass takes along: all it knows of pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pins_ext import ops


@dataclass(frozen=True)
class PruningArguments:
    """What pruning adds to the optimizer's pass over some tensors; an empty list means not wanted.

    Attributes:
        layout: of these tensors.
        masks: packed bits to apply after the update.
        ipt: window means to advance.
        shadow: unmasked values to keep.
        accepted: float32 [1], see the operators.
        rng: int64 [2], see the operators.
        criterion: name of the instant score that enters ipt.
        clear_state: zero the moments of pruned weights.
    """

    layout: ops.Layout
    masks: list[Tensor]
    ipt: list[Tensor]
    shadow: list[Tensor]
    accepted: Tensor
    rng: Tensor
    criterion: str
    clear_state: bool

    @staticmethod
    def none(layout: ops.Layout) -> PruningArguments:
        """No pruning: a plain optimizer step."""
        device = layout.places.device
        accepted = torch.zeros(1, dtype=torch.float32, device=device)
        rng = torch.zeros(2, dtype=torch.int64, device=device)
        return PruningArguments(layout, [], [], [], accepted, rng, "pins", False)


class StepListener(Protocol):
    """Takes part in every step of a fused optimizer.

    In each step the optimizer calls `begin_step`, `arguments` for each batch of pruned parameters that have a gradient,
    `end_pass`, and, when the parameters that are not pruned are stepped too, `end_step`.
    """

    def begin_step(self) -> None:
        """Gradients are in place, weights are the old ones."""

    def check_release(self) -> None:
        """Refuse, as RuntimeError, to take part in a step whose gradients come one by one; see release_gradients."""

    def place_of(self, parameter: Tensor) -> int | None:
        """The parameter's place in the list of all pruned ones; None where this optimizer's step is not to prune it."""

    def arguments(self, parameters: Sequence[Tensor]) -> PruningArguments:
        """What the pass over these pruned parameters takes along."""

    def end_pass(self) -> None:
        """Pruned parameters are updated."""

    def end_step(self) -> None:
        """All parameters are updated."""
