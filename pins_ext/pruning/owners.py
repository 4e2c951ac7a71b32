"""Which optimizer steps which of the pruned tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pins_ext.optim.fused import FusedOptimizer
from pins_ext.pruning.attachment import Slot
from pins_ext.pruning.fused import FusedSlot
from pins_ext.pruning.hooked import HookedSlot, hooked_by_pruner
from pins_ext.wrappers import unwrapped_optimizer


def divide(
    names: Sequence[str], parameters: Sequence[Tensor], optimizers: Sequence[Any]
) -> list[tuple[Optimizer, tuple[int, ...]]]:
    """Divide the pruned tensors among the optimizers that own them.

    Args:
        names: of the pruned tensors.
        parameters: the pruned tensors.
        optimizers: torch optimizers, wrapped or not.

    Returns:
        Each optimizer that owns any, and which.

    Raises:
        ValueError: a pruned parameter that no optimizer owns.
        TypeError: something that is no torch optimizer.
        RuntimeError: an optimizer that a pruner takes part in already.
    """
    places = {id(p): i for i, p in enumerate(parameters)}
    parts = []
    for optimizer in map(unwrapped_optimizer, optimizers):
        owned = [places.pop(id(p)) for group in optimizer.param_groups for p in group["params"] if id(p) in places]
        if owned:
            parts.append((optimizer, tuple(sorted(owned))))
    if places:
        missing = [names[i] for i in places.values()]
        raise ValueError(
            f"{len(missing)} prunable parameters belong to no optimizer, {missing[0]} first; "
            f"give them to the optimizer or exclude them"
        )
    if any(taken(optimizer) for optimizer, _ in parts):
        raise RuntimeError("an optimizer already belongs to a Pruner: detach() that one first")
    return parts


def slot_of(optimizer: Optimizer, *args: Any) -> Slot:
    """The slot of an optimizer, of the class that fits it; see Slot for the arguments."""
    return (FusedSlot if isinstance(optimizer, FusedOptimizer) else HookedSlot)(optimizer, *args)


def taken(optimizer: Optimizer) -> bool:
    """Whether a pruner takes part in its steps."""
    if isinstance(optimizer, FusedOptimizer):
        return optimizer.listener is not None
    return hooked_by_pruner(optimizer)
