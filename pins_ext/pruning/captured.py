"""Steps in CUDA graphs: which of them one graph can serve, and what of a step no graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from pins_ext import ops
from pins_ext.optim.step import given_tensors
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.masks import Masks
from pins_ext.pruning.schedule import Schedule


class Run(Protocol):
    """What decides about a step; a Pruner is one, and says more about these."""

    step: int
    schedule: Schedule
    importance: Importance
    masks: Masks
    score_gradients: Callable[[], Mapping[str, Tensor] | None] | None
    before_mask: Callable[[], None] | None


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


def kind_of(run: Run) -> StepKind:
    """The kind of the coming step."""
    t, schedule, importance, masks = run.step, run.schedule, run.importance, run.masks
    due, learns = schedule.mask_due(t), not masks.frozen
    folds = learns and importance.smoothed and t % importance.config.delta_t == 0
    counts = folds and due and importance.constant_in_window and masks.chosen and masks.scopes.is_global
    chooses = learns and due and masks.choice(importance, schedule.remaining_ratio(t), t) != masks.chosen_for
    scores = learns and t % importance.config.importance_every == 0
    return StepKind(t == 0, folds, counts, chooses, scores, masks.wanted(due))


class CapturedSteps:
    """Which kinds of steps were taken and captured so far, and what the capture under way must leave as it was.

    Args:
        optimizers: those that take part.

    Attributes:
        taken: kinds of steps that were taken eagerly, which uploads all they need.
        captured: kinds that were captured, and the tensors of the user's that each reads.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        self._uploads = ops.Uploads()
        self.forget()

    def forget(self) -> None:
        """The states are others: what was captured does not know them."""
        self.taken: set[StepKind] = set()
        self.captured: dict[StepKind, dict[str, object]] = {}
        self._kind: StepKind | None = None
        self._given: dict[str, object] = {}
        self._choice: tuple[tuple[int, ...] | None] | None = None

    def check(self, run: Run, also: str | None = None) -> None:
        """Refuse what no graph can hold, whatever the kind of step.

        Args:
            run: whose steps they are.
            also: what else a step has that no graph can hold.

        Raises:
            RuntimeError: there is any.
        """
        if found := [*self._obstacles(run), *([also] if also else [])]:
            raise RuntimeError(
                f"a CUDA graph can't hold this step, because of {', '.join(found)}: capture forward and backward, "
                "and call step() after the replay"
            )

    def _obstacles(self, run: Run) -> Iterator[str]:
        if not run.importance.ranks.alone:
            yield "parameters that lie on several ranks"
        if run.importance.on_host:
            yield "state_device='cpu'"
        if callable(run.importance.config.criterion):
            yield "a function as criterion"
        if len(self._optimizers) > 1:
            yield "several optimizers"
        if run.score_gradients is not None:
            yield "score_gradients"
        if run.before_mask is not None:
            yield "before_mask"

    def begin(self, run: Run) -> None:
        """A step of this run begins.

        Raises:
            RuntimeError: it is to be captured, and only the host can decide something in it, or none of its kind has
                been taken before.
        """
        kind, captured = kind_of(run), ops.capturing(run.masks.weights_layout.places.device)
        if captured:
            self.check(run, hosted(kind, run))
            if kind not in self.taken:
                raise RuntimeError(
                    f"a CUDA graph can hold a step when one of its kind was taken before, and none was of {kind}: call "
                    "step() without capturing it first"
                )
            self._given = given_tensors(self._optimizers[0])
        self._kind, self._choice = kind, (run.masks.chosen_for,) if captured else None

    def end(self, masks: Masks) -> bool:
        """The step has ended; whether it was captured, so that the host must take no note of it."""
        kind, self._kind = self._kind, None
        captured = self._choice is not None
        self.put_back(masks)
        if kind is not None and captured:
            self.captured[kind] = self._given
        elif kind is not None:
            self.taken.add(kind)
        return captured

    def put_back(self, masks: Masks) -> None:
        """Nothing has run of what was captured: the last choice is still that of before."""
        if self._choice is not None:
            masks.chosen_for, self._choice = self._choice[0], None

    def check_given(self, kind: StepKind) -> None:
        """Refuse to replay a step with other tensors than those that were captured.

        Args:
            kind: a captured one.

        Raises:
            RuntimeError: the learning rate, grad_scale or found_inf is another tensor.
        """
        before, now = self.captured[kind], given_tensors(self._optimizers[0])
        if other := [name for name in before | now if before.get(name) is not now.get(name)]:
            raise RuntimeError(
                f"a CUDA graph reads the tensors of its capture, and {', '.join(other)} is another one now: write to "
                "it in place. A torch.amp.GradScaler makes new ones in every step: call scaler.step(optimizer) after "
                "the replay of forward and backward, or train in bfloat16"
            )

    def target(self, run: Run) -> Tensor | None:
        """How many weights the mask of the step under way prunes, from a table of the whole schedule on the device.

        Returns:
            int64 [1]; None where the host hands out the counts.
        """
        schedule, scopes, clock = run.schedule, run.masks.scopes, run.importance.clock
        if clock is None or not scopes.is_global or callable(schedule.kind):
            return None
        # Behind the last step the ratio is the final one.
        steps = range(schedule.total + 2)
        table = self._uploads.of(
            "targets",
            schedule,
            clock.device,
            lambda: torch.tensor([scopes.n_prune(schedule.remaining_ratio(t))[0] for t in steps], device="cpu"),
        )
        return table.index_select(0, clock.clamp(max=steps[-1]).reshape(1))


def hosted(kind: StepKind, run: Run) -> str | None:
    """What the host alone decides about the mask of the coming step; None where there is nothing.

    Args:
        kind: of the step.
        run: whose step it is.
    """
    t, schedule, masks = run.step, run.schedule, run.masks
    if schedule.mask_due(t) and schedule.selects_once(t) and not masks.frozen:
        return "the one mask of a one-shot schedule, for which the host waits"
    if not kind.chooses:
        return None
    if not masks.scopes.is_global:
        return "a mask by a scope, densities or a pattern, whose counts the host hands out"
    return "a mask by a function as schedule" if callable(schedule.kind) else None
