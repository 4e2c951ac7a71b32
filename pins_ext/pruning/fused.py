"""How a pruner takes part in the steps of a PinsAdamW or PinsSGD: inside their one pass over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pins_ext import ops
from pins_ext.optim.fused import FusedOptimizer
from pins_ext.optim.listener import Batch, BoundaryArguments, PruningArguments
from pins_ext.optim.step import Scaling
from pins_ext.pruning.attachment import Slot, Slots, Step
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.masks import Masks
from pins_ext.pruning.scores import Counted


class FusedSlot(Slot):
    """The slot of a PinsAdamW or PinsSGD, whose pass takes importance and masks along: a StepListener."""

    optimizer: FusedOptimizer
    unscales = False

    def __init__(self, *args: Any) -> None:
        self._passed: set[int] = set()
        self._boundary: BoundaryArguments | None = None
        self._kept = ops.KeptLists()
        super().__init__(*args)

    def bind(self, importance: Importance, masks: Masks) -> None:
        """See Slot."""
        super().bind(importance, masks)
        self._places = {id(self.parameters[i]): i for i in self.indices}
        plain = importance.folds_in_pass and importance.dtype not in ops.CODED
        self._one_pass = plain and masks.selection.one_cutoff

    def attach(self, slots: Slots) -> None:
        """See Slot."""
        super().attach(slots)
        self.optimizer.listener = self

    def detach(self) -> None:
        """See Slot."""
        # By now the optimizer may belong to another pruner.
        if self.attached:
            self.optimizer.listener = None

    @property
    def attached(self) -> bool:
        """See Slot."""
        return self.optimizer.listener is self

    @property
    def one_pass(self) -> bool:
        """See Slot: not of 8 bits, released or missing gradients, capturable steps, or one that a scaler may skip."""
        optimizer = self.optimizer
        if not self._one_pass or optimizer.capturable or optimizer.release is not None:
            return False
        if optimizer.coded(self.parameters):
            return False
        return Scaling.of(self.optimizer).found_inf is None and all(p.grad is not None for p in self.parameters)

    @property
    def _scores_in_pass(self) -> bool:
        return self.step.gradients is None and self.importance.in_pass

    @property
    def _takes_importance(self) -> bool:
        """Whether this step's gradients enter the window: not once more into one that an interrupted pass has ended."""
        return self._scores_in_pass and self.step.scored and not self.importance.ahead

    @property
    def _masks_in_pass(self) -> bool:
        """Not where a scaler may skip the pass, or the score still needs the weights that it leaves."""
        scores_late = self.importance.scores_after_step and not self._scores_in_pass
        return self.step.masks_in_pass and self.scaling.found_inf is None and not scores_late

    @property
    def _bits_in_pass(self) -> list[Tensor] | None:
        """What the pass prunes: by the masks, or between them by what is fixed."""
        if self._masks_in_pass:
            return self.masks.bits
        # Where the masks come after the pass, so does what is fixed.
        return self.masks.fixed if self.scaling.found_inf is None else None

    # ---- StepListener -----------------------------------------------------------------------------------------------

    def check_release(self) -> None:
        """See StepListener."""
        importance = self.importance
        if importance.on_host:
            raise RuntimeError(
                "state_device='cpu' would make every gradient inside backward wait for the host: leave it out, or "
                "train without release_gradients"
            )
        if not importance.scored_before_step or importance.scores_after_step or not importance.in_pass:
            config = importance.config
            which = "a function as criterion" if callable(config.criterion) else f"criterion={config.criterion!r}"
            which += " with beta2=0" if importance.smoothed and config.beta2 == 0 else ""
            raise RuntimeError(
                f"{which} needs all gradients of a step for its mask, and released ones are gone by then: use another "
                "criterion, such as pins, or train without release_gradients"
            )
        if self.slots.driver.score_gradients is not None:
            raise RuntimeError(
                "score_gradient='task' scores weights by gradients of its own, and released ones are gone by then: use "
                "'joint', or train without release_gradients"
            )

    def begin_step(self) -> None:
        """See StepListener."""
        self._passed.clear()
        self._boundary = None
        self.slots.begin(self)

    def place_of(self, parameter: Tensor) -> int | None:
        """See StepListener."""
        return self._places.get(id(parameter))

    def arguments(self, batch: Batch) -> PruningArguments:
        """See StepListener."""
        indices = [self._places[id(p)] for p in batch.parameters]
        self._passed.update(indices)
        self._scored |= self._scores_in_pass  # a released gradient is not there yet when the step begins
        importance = self.importance
        scored = self._takes_importance and bool(importance.ipt) and not self.masks.frozen
        together = self.step.one_pass and self._scores_in_pass and len(indices) == len(self.parameters)
        if not together:
            self.masks.settle(importance)
        self._boundary = _boundary_of(self.step, importance, self.masks, scored, self._kept) if together else None
        accepted, rng = importance.pass_scalars(self.part, self.step.t, self.optimizer.rounds(batch.parameters))
        lists = (self._bits_in_pass, importance.ipt if scored else None, importance.shadow)
        masks, ipt, shadow = self._kept.of(batch.kind, *([x[i] for i in indices] if x else [] for x in lists))
        return PruningArguments(
            layout=self._subsets.of(indices),
            masks=masks,
            ipt=ipt,
            shadow=shadow,
            accepted=accepted,
            rng=rng,
            criterion=importance.criterion if scored else "pins",
            clear_state=importance.config.mask_optimizer_state,
            boundary=self._boundary,
        )

    def end_pass(self) -> None:
        """See StepListener; a pruned parameter that got no gradient has a zero in its window, and stays masked."""
        left = [i for i in self.indices if i not in self._passed]
        if self._takes_importance:
            self._in_window = True
            if left:
                self._accumulate(left, self.scaling)
        if (boundary := self._boundary) is not None:
            if boundary.around is not None:
                self.masks.came()
            if boundary.fold_rng is not None:
                self.count()
                self.importance.folded_in_pass(_counted_by(boundary))
        self.masks.settle(self.importance)
        if self._masks_in_pass:
            if left:
                self.apply_masks(left)
            self._zeroed = True
        self._fixed_zeroed = self._bits_in_pass is not None

    def end_step(self) -> None:
        """See StepListener."""
        self.slots.end(self)

    def abandon_step(self) -> None:
        """See StepListener."""
        self.slots.abandon()

    def states_replaced(self) -> None:
        """See StepListener."""
        if self.slots.captured is not None:
            self.slots.captured.forget()

    @property
    def capturable(self) -> bool:
        """See Slot."""
        return self.optimizer.capturable


def _boundary_of(
    step: Step, importance: Importance, masks: Masks, scored: bool, kept: ops.KeptLists
) -> BoundaryArguments | None:
    """What the pass takes along: the choice that is coming, and the end of the window.

    The window ends in the step before the one whose mask it decides: counts and averages are complete before that step
    writes a weight, and no pass of their own reads them.

    Args:
        step: the step under way.
        importance: of all pruned tensors.
        masks: of all pruned tensors.
        scored: whether the pass takes this step's gradients into the window.
        kept: lists of the steps before.

    Returns:
        None where there is neither.
    """
    coming, config = masks.coming, importance.config
    folds = step.ends_window and scored
    if coming is None and not folds:
        return None
    counted = masks.counting() if folds and step.due_next else None
    bracket, counts = counted or (None, None)
    exp_avg_ipt, exp_avg_unc = kept.of("averages", importance.exp_avg_ipt, importance.exp_avg_unc)
    return BoundaryArguments(
        exp_avg_ipt=exp_avg_ipt,
        exp_avg_unc=exp_avg_unc,
        around=coming.around if coming else None,
        stats=masks.stats if coming else None,
        threshold=coming.cutoff if coming else None,
        fold_rng=importance.fold_keys(step.t + 1) if folds else None,
        beta1=config.beta1,
        beta2=config.beta2,
        bracket=bracket,
        counts=counts,
    )


def _counted_by(boundary: BoundaryArguments) -> Counted | None:
    """The counts that the pass has made of the new scores; None: none."""
    if boundary.bracket is None or boundary.counts is None:
        return None
    return boundary.bracket, boundary.counts
