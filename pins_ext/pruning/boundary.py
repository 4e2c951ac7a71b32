"""What a pass over all pruned tensors does at a window's boundary, beside the step: masks, fold and count."""

from __future__ import annotations

from typing import Protocol

from pins_ext.optim.listener import BoundaryArguments
from pins_ext.pruning.importance import Counted, Importance
from pins_ext.pruning.masks import Masks


class BoundaryStep(Protocol):
    """What of a step decides; see attachment.Step."""

    @property
    def t(self) -> int:
        """Pruner step."""

    @property
    def ends_window(self) -> bool:
        """Whether the pass ends one."""

    @property
    def due_next(self) -> bool:
        """Whether the schedule asks for a mask in the next step."""


def boundary_of(step: BoundaryStep, importance: Importance, masks: Masks, scored: bool) -> BoundaryArguments | None:
    """What the pass takes along: the choice that is coming, and the end of the window.

    The window ends in the step before the one whose mask it decides: counts and averages are complete before that step
    writes a weight, and no pass of their own reads them.

    Args:
        step: the step under way.
        importance: of all pruned tensors.
        masks: of all pruned tensors.
        scored: whether the pass takes this step's gradients into the window.

    Returns:
        None where there is neither.
    """
    coming, config = masks.coming, importance.config
    folds = step.ends_window and scored
    if coming is None and not folds:
        return None
    counted = masks.counting() if folds and step.due_next else None
    bracket, counts = counted or (None, None)
    return BoundaryArguments(
        exp_avg_ipt=importance.exp_avg_ipt,
        exp_avg_unc=importance.exp_avg_unc,
        around=coming.around if coming else None,
        stats=masks.stats if coming else None,
        threshold=coming.cutoff if coming else None,
        fold_rng=importance.fold_keys(step.t + 1) if folds else None,
        beta1=config.beta1,
        beta2=config.beta2,
        bracket=bracket,
        counts=counts,
    )


def counted_by(boundary: BoundaryArguments) -> Counted | None:
    """The counts that the pass has made of the new scores; None: none."""
    if boundary.bracket is None or boundary.counts is None:
        return None
    return boundary.bracket, boundary.counts
