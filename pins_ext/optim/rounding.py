"""Random bits that round parameters that are not pruned: the same ones whichever of the others have a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.shards import local, shard_of
from pins_ext.optim.step import scalars_on

_STREAM = 2  # of random bits, beside those of pins_ext.pruning.importance


class Alike:
    """Parameters that one pass takes together when each of them has a gradient.

    Args:
        parameters: in the order of their groups.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._places = {id(p): i for i, p in enumerate(parameters)}
        # Random bits follow the place in the whole tensor.
        shards = [shard_of(str(i), p) for i, p in enumerate(parameters)]
        self._layout = ops.Layout.of([local(p) for p in parameters], shards)

    def has_just(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it was made of these."""
        return list(map(id, parameters)) == list(self._places)

    def layout(self, parameters: Sequence[Tensor]) -> ops.Layout:
        """Of some of them, each at its place among all."""
        return self._layout.subset([self._places[id(p)] for p in parameters])

    def keys(self, states: Mapping[Tensor, dict[str, Any]]) -> Tensor:
        """Keys of the stochastic rounding in the step that begins, int64 [2]; other ones in every step.

        Args:
            states: the optimizer's, as they are before the step.
        """
        device = self._parameters[0].device
        known = [states[p] for p in self._parameters if p in states]
        steps = [state.get("step", 0) for state in known]
        # Skipped steps are left out, as in a state_dict: a run that is loaded goes on with the same keys.
        skipped = [state.get("skipped", 0) for state in known]
        if any(isinstance(count, Tensor) for count in [*steps, *skipped]):
            taken = scalars_on(steps, device) - scalars_on(skipped, device)
            return ops.rounding_keys(0, taken.max().long(), _STREAM)
        step = max(map(int, steps), default=0)
        return ops.to_device(torch.tensor(ops.rounding_key(0, step, _STREAM), device="cpu"), device)
