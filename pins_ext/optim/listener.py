"""What a fused optimizer reports about its steps, and what its pass takes along: all it knows of pruning."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pins_ext import ops


class Batch(NamedTuple):
    """Parameters that one kernel call takes together.

    Attributes:
        kind: what they have in common and no other batch of a step has.
        parameters: in order.
        owners: the parameter group of each.
    """

    kind: Hashable
    parameters: list[Tensor]
    owners: list[dict[str, Any]]


@dataclass(frozen=True)
class BoundaryArguments:
    """What a window's boundary adds to the pass over all pruned tensors, see ops.boundary_adamw_.

    A list may be a kept one, see ops.KeptLists.

    Attributes:
        exp_avg_ipt: running averages of importance.
        exp_avg_unc: running averages of its uncertainty; empty where there are none.
        around: int64 [5], a bracket around the threshold by which the pass chooses masks; None: it chooses none.
        stats: int64 [n, 3], written with the masks.
        threshold: int64 [1, 2], likewise; read where the rank of `around` is negative.
        fold_rng: int64 [2], keys of the fold with which the window ends; None: it goes on.
        beta1: decay of exp_avg_ipt.
        beta2: decay of exp_avg_unc.
        bracket: int64 [5], what the new scores are counted against; None: they are not.
        counts: int64 [1 + BINS], written with it.
    """

    exp_avg_ipt: Sequence[Tensor]
    exp_avg_unc: Sequence[Tensor]
    around: Tensor | None
    stats: Tensor | None
    threshold: Tensor | None
    fold_rng: Tensor | None
    beta1: float
    beta2: float
    bracket: Tensor | None
    counts: Tensor | None


@dataclass(frozen=True)
class PruningArguments:
    """What pruning adds to the optimizer's pass over some tensors; an empty list means not wanted.

    A list may be a kept one, see ops.KeptLists.

    Attributes:
        layout: of these tensors.
        masks: packed bits to apply after the update.
        ipt: window means to advance.
        shadow: unmasked values to keep.
        accepted: float32 [1], see the operators.
        rng: int64 [2], see the operators.
        criterion: name of the instant score that enters ipt.
        clear_state: zero the moments of pruned weights.
        boundary: what ends or begins a window in the same pass; None: nothing does.
    """

    layout: ops.Layout
    masks: Sequence[Tensor]
    ipt: Sequence[Tensor]
    shadow: Sequence[Tensor]
    accepted: Tensor
    rng: Tensor
    criterion: str
    clear_state: bool
    boundary: BoundaryArguments | None = None

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

    def arguments(self, batch: Batch) -> PruningArguments:
        """What the pass over these pruned parameters takes along."""

    def end_pass(self) -> None:
        """Pruned parameters are updated."""

    def end_step(self) -> None:
        """All parameters are updated."""

    def states_replaced(self) -> None:
        """The optimizer's states are other tensors: those of a checkpoint."""

    def abandon_step(self) -> None:
        """A step that was to be captured failed: none was taken."""
