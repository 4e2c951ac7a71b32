"""Which importance states a configuration keeps, and how many bytes they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pins_ext import ops
from pins_ext.pruning.config import PruneConfig


def folds_at_once(config: PruneConfig) -> bool:
    """Whether, over a frozen base, the averages take each score in as it comes, so that no window mean is kept."""
    return config.delta_t == 1 and config.rule.instant and config.smoothed and config.beta2 != 0


def state_names(config: PruneConfig, frozen_base: bool = False) -> list[str]:
    """The states that a configuration keeps for every pruned tensor; all but the shadow are of `config.dtype`.

    Args:
        config: of the run.
        frozen_base: see Pruner.
    """
    kept = {
        "ipt": config.rule.instant and not (frozen_base and folds_at_once(config)),
        "exp_avg_ipt": config.smoothed,
        "exp_avg_unc": config.smoothed and 0 < config.beta2 < 1,
        "shadow": config.needs_shadow,
    }
    return [name for name, wanted in kept.items() if wanted]


def state_bytes(config: PruneConfig, shape: Sequence[int], element: int, frozen_base: bool = False) -> int:
    """Bytes of all states of a pruned tensor.

    Args:
        config: says which states there are.
        shape: of the tensor.
        element: bytes of one weight.
        frozen_base: see Pruner.
    """
    one, shadow = state_size(config, shape), math.prod(shape) * element
    return sum(shadow if name == "shadow" else one for name in state_names(config, frozen_base))


def state_size(config: PruneConfig, shape: Sequence[int]) -> int:
    """Bytes of one state of a pruned tensor of this shape."""
    return ops.coded_bytes(shape) if config.dtype in ops.CODED else math.prod(shape) * config.dtype.itemsize
