"""Steps in CUDA graphs: which of them one graph can serve, and what of a step no graph can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.masks import Masks
from pins_ext.pruning.schedule import Schedule


class StepKind(NamedTuple):
    """What a step does besides updating weights: steps of equal kinds launch the same, and one CUDA graph serves them.

    Attributes:
        first: it is the first step of a run, in which states are made.
        folds: it begins a window, and first folds the one before into the averages.
        counts: it counts the new scores in the same pass, around the threshold of the last mask.
        chooses: it chooses a mask.
        scores: its gradients enter the window.
        zeroes: it ends with pruned weights at zero.
    """

    first: bool
    folds: bool
    counts: bool
    chooses: bool
    scores: bool
    zeroes: bool


def kind_of(t: int, schedule: Schedule, importance: Importance, masks: Masks) -> StepKind:
    """The kind of a step that has not begun.

    Args:
        t: pruner step.
        schedule: when masks are asked for.
        importance: as the last step left it.
        masks: as the last step left them.
    """
    due, learns = schedule.mask_due(t), not masks.frozen
    folds = learns and importance.smoothed and t % importance.config.delta_t == 0
    counts = folds and due and importance.constant_in_window and masks.chosen and masks.scopes.is_global
    chooses = learns and due and masks.choice(importance, schedule.remaining_ratio(t), t) != masks.chosen_for
    scores = learns and t % importance.config.importance_every == 0
    return StepKind(t == 0, folds, counts, chooses, scores, masks.wanted(due))


class CapturedSteps:
    """Which kinds of steps were taken and captured so far, and what the capture under way must leave as it was.

    Args:
        optimizers: how many take part.

    Attributes:
        taken: kinds of steps that were taken eagerly, which uploads all they need.
        held: kinds that were captured.
    """

    def __init__(self, optimizers: int) -> None:
        self._optimizers = optimizers
        self._uploads = ops.Uploads()
        self.forget()

    def forget(self) -> None:
        """The states are others: what was captured does not know them."""
        self.taken: set[StepKind] = set()
        self.held: set[StepKind] = set()
        self._kind: StepKind | None = None
        self._choice: tuple[tuple[int, ...] | None] | None = None

    def begin(self, t: int, schedule: Schedule, importance: Importance, masks: Masks, hooks: Mapping[str, Any]) -> None:
        """A step begins.

        Args:
            t: pruner step.
            schedule: of the run.
            importance: of the run.
            masks: of the run.
            hooks: what is called in every step, by name; None where nothing is.

        Raises:
            RuntimeError: it is to be captured, and only the host can decide something in it, or none of its kind has
                been taken before.
        """
        kind = kind_of(t, schedule, importance, masks)
        captured = ops.capturing(masks.weights_layout.places.device)
        if captured:
            found = [*_obstacles(kind, t, schedule, importance, masks), *(name for name in hooks if hooks[name])]
            if self._optimizers > 1:
                found.append("several optimizers")
            if found:
                raise RuntimeError(
                    f"a CUDA graph can't hold this step, because of {', '.join(found)}: capture forward and backward, "
                    "and call step() after the replay"
                )
            if kind not in self.taken:
                raise RuntimeError(
                    f"a CUDA graph can hold a step when one of its kind was taken before, and none was of {kind}: call "
                    "step() without capturing it first"
                )
        self._kind, self._choice = kind, (masks.chosen_for,) if captured else None

    def end(self, masks: Masks) -> bool:
        """The step has ended; whether it was captured, so that the host must take no note of it."""
        kind, self._kind = self._kind, None
        captured = self._choice is not None
        self.put_back(masks)
        if kind is not None:
            (self.held if captured else self.taken).add(kind)
        return captured

    def put_back(self, masks: Masks) -> None:
        """Nothing has run of what was captured: the last choice is still that of before."""
        if self._choice is not None:
            masks.chosen_for, self._choice = self._choice[0], None

    def target(self, schedule: Schedule, importance: Importance, masks: Masks) -> Tensor | None:
        """How many weights the mask of the step under way prunes, from a table of the whole schedule on the device.

        Returns:
            int64 [1]; None where the host hands out the counts.
        """
        if importance.clock is None or not masks.scopes.is_global or callable(schedule.kind):
            return None
        # Behind the last step the ratio is the final one.
        steps = range(schedule.total + 2)
        table = self._uploads.of(
            "targets",
            schedule,
            importance.clock.device,
            lambda: torch.tensor([masks.scopes.n_prune(schedule.remaining_ratio(t))[0] for t in steps]),
        )
        return table.index_select(0, importance.clock.clamp(max=steps[-1]).reshape(1))


def hosted(kind: StepKind, t: int, schedule: Schedule, masks: Masks) -> str | None:
    """What the host alone decides about the mask of a step; None where there is nothing."""
    if schedule.mask_due(t) and schedule.selects_once(t) and not masks.frozen:
        return "the one mask of a one-shot schedule, for which the host waits"
    if not kind.chooses:
        return None
    if not masks.scopes.is_global:
        return "a mask by a scope, densities or a pattern, whose counts the host hands out"
    return "a mask by a function as schedule" if callable(schedule.kind) else None


def _obstacles(kind: StepKind, t: int, schedule: Schedule, importance: Importance, masks: Masks) -> Iterator[str]:
    if not importance.ranks.alone:
        yield "parameters that lie on several ranks"
    if importance.on_host:
        yield "state_device='cpu'"
    if callable(importance.config.criterion):
        yield "a function as criterion"
    if (found := hosted(kind, t, schedule, masks)) is not None:
        yield found
