"""A model that is sparse already and is to become sparser: its zeros are part of every mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.masks import Masks
from pins_ext.pruning.schedule import Schedule

NO_ZEROS = "the model has no zeros in its prunable parameters: nothing to keep sparse"


def fix_zeros(
    config: PruneConfig,
    schedule: Schedule,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    importance: Importance,
    masks: Masks,
) -> None:
    """Let the zeros that are there score below everything else, and every mask prune them.

    Args:
        config: of the pruner.
        schedule: of the pruner.
        names: of the pruned tensors.
        parameters: the pruned tensors.
        importance: theirs.
        masks: theirs.

    Raises:
        ValueError: there are none, more than there may be in the end, or a configuration that can't hold them apart.
    """
    if config.initial_sparsity:
        raise ValueError("initial_sparsity: the schedule starts from the sparsity that is there; leave it out")
    check_marks(config)
    zeros, scopes = masks.keep_nonzero(parameters), masks.scopes
    if not any(zeros):
        raise ValueError(NO_ZEROS)
    for region, pruned in zip(scopes.regions, scopes.n_prune(schedule.final_ratio), strict=True):
        size, there = scopes.size(region), sum(zeros[i] for i in region)
        alive = {i: scopes.sizes[i] - zeros[i] for i in region}
        short = [i for i in region if alive[i] < scopes.least[i]]
        if there > pruned or short or sum(min(alive[i], scopes.most[i]) for i in region) < size - pruned:
            what = "the model" if len(scopes.regions) == 1 and not short else names[(short or region)[0]]
            raise ValueError(
                f"{what} has more zeros already than it may have in the end ({there:,} of {size:,} weights are zero, "
                f"{pruned:,} are to be): ask for a higher sparsity, or for a global scope without densities"
            )
    masks.fix()
    importance.bar(masks.fixed or [])


def check_marks(config: PruneConfig) -> None:
    """Refuse a configuration whose states can't hold a mark.

    Raises:
        ValueError: with what to change.
    """
    if config.patterned:
        raise ValueError(
            "pattern: weights that stay pruned need not fit it; leave out total_steps to keep a pattern that is there, "
            "or prune into one with a plain Pruner"
        )
    if config.beta1 == 0 or config.state_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            "weights that stay pruned are marked in the running averages, which must last: use a beta1 above 0 and a "
            "state_dtype of float32 or bfloat16"
        )


def from_there(schedule: Schedule, masks: Masks) -> Schedule:
    """The schedule from the share of weights that is not fixed at zero."""
    kept = 1 - sum(masks.pruned(masks.fixed)) / sum(masks.scopes.sizes)
    return replace(schedule, initial_ratio=kept)
