"""Which importance states a configuration keeps, and how many bytes they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

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


def moves_states(config: PruneConfig, frozen_base: bool = False) -> bool:
    """Whether any state is to be on the host, wherever the weights are; unmasked values stay with the weights.

    Args:
        config: of the run.
        frozen_base: see Pruner.
    """
    return config.state_device == "cpu" and any(name != "shadow" for name in state_names(config, frozen_base))


def host_bytes(
    config: PruneConfig,
    shapes: Sequence[Sequence[int]],
    element: int,
    frozen_base: bool = False,
    moments: Callable[[Sequence[int]], int] = lambda shape: 8 * math.prod(shape),
) -> int:
    """Bytes in host memory where states are there: the states, a bit a weight, and two buffers for the largest tensor.

    Args:
        config: says which states there are.
        shapes: of the pruned tensors.
        element: bytes of one weight.
        frozen_base: see Pruner.
        moments: bytes of a tensor's two moments.
    """
    if not moves_states(config, frozen_base):
        return 0
    bits = sum(ops.mask_bytes(math.prod(shape)) for shape in shapes)
    states = sum(state_bytes(config, shape, 0, frozen_base) for shape in shapes)
    return states + bits + 2 * max(_staged(config, shape, element, moments(shape)) for shape in shapes)


def _staged(config: PruneConfig, shape: Sequence[int], element: int, moments: int) -> int:
    """Bytes of a tensor that come to the host at a time: its weights, and its gradient or moments; or their scores."""
    n = math.prod(shape)
    if callable(config.criterion):
        return torch.float32.itemsize * n
    return n * element + (moments if config.rule.reads_moments else n * element)


def state_bytes(config: PruneConfig, shape: Sequence[int], element: int, frozen_base: bool = False) -> int:
    """Bytes of all states of a pruned tensor, wherever they are.

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
