"""A model that is sparse already: it stays as it is, or becomes sparser and its zeros are part of every mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from pins_ext.distributed.shards import local
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.masks import Masks
from pins_ext.pruning.patterns import fits_of_zeros
from pins_ext.pruning.schedule import Schedule

_NO_ZEROS = "the model has no zeros in its prunable parameters: nothing to keep sparse"


def still(config: PruneConfig | None) -> PruneConfig:
    """A configuration under which nothing is ever scored; magnitude keeps no states."""
    return replace(
        config or PruneConfig(),
        criterion="magnitude",
        mask_policy="reference",
        schedule="constant",
        warmup=0,
        cooldown=0,
        pattern="none",
    )


def hold_zeros(
    model: nn.Module, config: PruneConfig | None, names: Sequence[str], parameters: Sequence[Tensor], masks: Masks
) -> int:
    """Freeze the mask that keeps what is not zero.

    Args:
        model: the model.
        config: which pattern the zeros must have; None recognises the ones that explain them.
        names: of the pruned tensors.
        parameters: the pruned tensors.
        masks: theirs.

    Returns:
        The number of zeros.

    Raises:
        ValueError: there are none, or others than the pattern asks for.
    """
    zeros = sum(masks.keep_nonzero(parameters))
    if not zeros:
        raise ValueError(_NO_ZEROS)
    kept = [masks.keep(i, local(p).shape) for i, p in enumerate(parameters)]
    by_name = dict(zip(names, parameters, strict=True))
    masks.fits = fits_of_zeros(model, by_name, kept, config or still(None), recognise=masks.ranks.alone)
    masks.frozen = True
    return zeros


def hold_again(before: Masks, parameters: Sequence[Tensor], masks: Masks) -> None:
    """Freeze the masks of parameters that took the place of others, as theirs were.

    Args:
        before: the masks of the others.
        parameters: the pruned tensors.
        masks: theirs.
    """
    masks.keep_nonzero(parameters)
    masks.frozen = True
    # A rank that sees parts of tensors can't tell the patterns of their zeros.
    masks.fits = before.fits if masks.ranks.alone else masks.fits


def keep_zeros(schedule: Schedule, names: Sequence[str], importance: Importance, masks: Masks) -> Schedule:
    """Let the zeros that are there score below everything else, and every mask prune them.

    Args:
        schedule: of the pruner.
        names: of the pruned tensors.
        importance: theirs.
        masks: theirs.

    Returns:
        The schedule, which starts from these zeros.

    Raises:
        ValueError: there are none, more than there may be in the end, or a configuration that can't hold them apart.
    """
    config = importance.config
    if config.initial_sparsity:
        raise ValueError("initial_sparsity: the schedule starts from the sparsity that is there; leave it out")
    check_marks(config)
    zeros, scopes = masks.keep_nonzero(importance.parameters), masks.scopes
    if not any(zeros):
        raise ValueError(_NO_ZEROS)
    for region, pruned in zip(scopes.regions, scopes.n_prune(schedule.final_ratio), strict=True):
        size, there = scopes.size(region), sum(zeros[i] for i in region)
        alive = {i: scopes.sizes[i] - zeros[i] for i in region}
        short = [i for i in region if alive[i] < scopes.least[i]]
        if there > pruned or short or sum(min(alive[i], scopes.most[i]) for i in region) < size - pruned:
            what = "the model" if len(scopes.regions) == 1 and not short else names[(short or region)[0]]
            spread = len(scopes.regions) > 1 or config.min_density or config.max_density
            raise ValueError(
                f"{what} has more zeros already than it may have in the end ({there:,} of {size:,} weights are zero, "
                f"{pruned:,} are to be): ask for a higher sparsity"
                + (", or for a global scope without densities" if spread else "")
            )
    masks.fix()
    importance.bar(masks.fixed or [])
    return from_there(schedule, masks)


def check_marks(config: PruneConfig) -> None:
    """Refuse a configuration whose states can't hold a mark.

    Raises:
        ValueError: with what to change.
    """
    if config.patterned:
        raise ValueError(
            "pattern: weights that stay pruned need not fit it; prune into one with a plain Pruner, or keep one "
            "that is there: Pruner.from_sparse without total_steps"
        )
    if config.beta1 == 0:
        raise ValueError(
            "weights that stay pruned are marked in the running averages, which must last: use a beta1 above 0"
        )
    if config.state_dtype == "8bit" and (config.min_density or config.max_density):
        raise ValueError(
            "state_dtype='8bit' marks weights that stay pruned by NaN, which densities would take for the best of a "
            "tensor: use bfloat16, or leave min_density and max_density out"
        )


def from_there(schedule: Schedule, masks: Masks) -> Schedule:
    """The schedule from the share of weights that is not fixed at zero."""
    kept = 1 - sum(masks.pruned(masks.fixed)) / sum(masks.scopes.sizes)
    return replace(schedule, initial_ratio=kept)
