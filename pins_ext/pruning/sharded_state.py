"""A pruner's state as torch.distributed.checkpoint saves it: every rank its own part, loaded on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pins_ext.distributed import states
from pins_ext.pruning.pruner import Pruner

_ABOUT = "about"
_CUTOFF = "threshold"
_PAGE = 4096


class ShardedState:
    """A Stateful for `torch.distributed.checkpoint`: states and masks as DTensors cut like the parameters.

        dcp.save({"model": ..., "optimizer": ..., "pruner": ShardedState(pruner)}, checkpoint_id=folder)
        dcp.load({"model": ..., "optimizer": ..., "pruner": ShardedState(pruner)}, checkpoint_id=folder)

    Nothing is gathered: a rank writes and reads its own parts, and a checkpoint of any number of ranks, cut in any way,
    goes on on any other. `Pruner.save` writes the same state into one file instead, put together from all ranks. Masks
    take one byte a weight here, because bits can't be cut between any two weights; plain data are JSON in a tensor,
    for what is no tensor torch would pickle.

    Loading writes into the pruner's states before anything can be checked, as it does for a model: after an error go on
    with a new pruner.

    Args:
        pruner: whose state; of a model that is sharded already.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner

    def state_dict(self) -> dict[str, Any]:
        """Tensors by kind/parameter, those that the pruner goes on with (masks are copies), and `about`.

        Raises:
            ValueError: on every rank, a parameter cut in a way that torch's distributed checkpoint gets wrong
                (pytorch#161368); `Pruner.save` is right there.
        """
        pruner = self.pruner
        state = pruner.state_dict(full=False)
        tensors = state.pop("tensors")
        # Whether one row serves all tensors changes with the first selection; shapes in a checkpoint must not.
        cutoff = tensors.pop(_CUTOFF).expand(len(pruner.names), 2).contiguous()
        spread = states.spread(tensors, pruner.names, pruner.parameters, pruner.masks.ranks)
        return {_ABOUT: self._encoded(state), _CUTOFF: cutoff, **spread}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict that torch's distributed checkpoint has filled.

        Raises:
            ValueError: see Pruner.load_state_dict.
        """
        pruner = self.pruner
        tensors = {name: tensor for name, tensor in state.items() if name != _ABOUT}
        if pruner.masks.scopes.is_global:
            tensors[_CUTOFF] = tensors[_CUTOFF][:1]
        collected = states.collected(tensors, pruner.names, pruner.parameters)
        pruner.load_state_dict({**_decoded(state[_ABOUT]), "tensors": collected}, full=False)

    def _encoded(self, data: Mapping[str, Any]) -> Tensor:
        """JSON, uint8, of a length that the pruner's progress doesn't change."""
        lasting = json.dumps({name: data[name] for name in ("config", "total_steps")})
        numbers = 8 + len(self.pruner.masks.scopes.regions)  # a step, and how many are pruned in each region
        room = -(-(len(lasting) + 64 * numbers) // _PAGE) * _PAGE
        return torch.frombuffer(bytearray(json.dumps(data).encode().ljust(room)), dtype=torch.uint8)


def _decoded(about: Tensor) -> dict[str, Any]:
    try:
        data = json.loads(bytes(about.tolist()))
    except ValueError as error:
        raise ValueError(f"the pruner's part of the checkpoint can't be read: {error}") from error
    return data if isinstance(data, dict) else {}
