"""What is kept about the pruned tensors, made for the parameters as they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import layout_of
from pins_ext.optim.fused import FusedOptimizer
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.masks import Masks
from pins_ext.pruning.moments import reader
from pins_ext.pruning.offload import HostImportance, HostMasks, offloads
from pins_ext.pruning.patterns import refuse_cut
from pins_ext.pruning.scopes import Scopes
from pins_ext.pruning.staging import Staging

Parts = Sequence[tuple[Optimizer, Sequence[int]]]
"""Each optimizer, and the places of the pruned tensors that it steps."""


def states_of(
    parameters: Mapping[str, Tensor], scopes: Scopes, config: PruneConfig, parts: Parts, frozen_base: bool = False
) -> tuple[Importance, Masks]:
    """The importance and the masks of pruned tensors, before any step.

    Args:
        parameters: the pruned tensors by name, DTensors or plain.
        scopes: which weights compete.
        config: which states there are, and when masks apply.
        parts: who steps which.
        frozen_base: see Pruner.

    Raises:
        ValueError: a pattern whose groups lie on several ranks, see refuse_cut; a storage that is not there; see
            offloads.
    """
    names, tensors = list(parameters), list(parameters.values())
    refuse_cut(names, tensors, scopes.fits)
    layout, ranks = layout_of(parameters), Ranks(tensors)
    places = [indices for _, indices in parts]
    importance: Importance
    masks: Masks
    if offloads(config, layout, ranks, frozen_base):
        staging = Staging.of(layout.places.device)
        importance = HostImportance(tensors, config, layout, places, ranks, frozen_base, staging)
        masks = HostMasks(tensors, layout, scopes, config, ranks, staging)
    else:
        owners = [optimizer for optimizer, _ in parts if isinstance(optimizer, FusedOptimizer)]
        capturable = not frozen_base and any(optimizer.capturable for optimizer in owners)
        importance = Importance(tensors, config, layout, places, ranks, frozen_base, capturable)
        masks = Masks(tensors, layout, scopes, config, ranks, capturable)
    importance.moments = reader(config, names, tensors, parts)
    return importance, masks


def refuse_stale(parameters: Mapping[str, Tensor], parts: Parts) -> None:
    """Refuse parameters that took the place of those that the optimizers step.

    Args:
        parameters: the pruned tensors by name.
        parts: who is to step which.

    Raises:
        RuntimeError: an optimizer does not hold them.
    """
    names, tensors = list(parameters), list(parameters.values())
    for optimizer, indices in parts:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missing := [names[i] for i in indices if id(tensors[i]) not in owned]:
            raise RuntimeError(
                f"{missing[0]} was replaced in the model since the Pruner was made, and its optimizer has the old "
                f"one: build optimizer and Pruner after the model is sharded"
            )
