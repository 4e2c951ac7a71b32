"""How a pruner takes part in its optimizers' steps: it drives a fused one and follows any other through its hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from pins_ext.optim import FusedOptimizer
from pins_ext.pruning.importance import Scaling

if TYPE_CHECKING:
    from pins_ext.pruning.pruner import Pruner


@dataclass(eq=False)
class Slot:
    """The part of the pruned tensors that one optimizer owns.

    Attributes:
        indices: which of the pruner's tensors. group_of: the parameter group of each.
        part: its place among the optimizers, and its part of the importance. handles: of the hooks.
        scaling, given, accumulated, stepped: of the step under way: gradient scaling, whether any of its tensors has a
            gradient to be scored by, whether these gradients are in the window, whether the optimizer is done.
    """

    optimizer: Optimizer
    indices: tuple[int, ...]
    group_of: tuple[int, ...]
    part: int
    handles: list[Any] = field(default_factory=list)
    scaling: Scaling = field(default_factory=Scaling)
    given: bool = False
    accumulated: bool = False
    stepped: bool = False

    def reset(self) -> None:
        """No step is under way."""
        self.scaling = Scaling()
        self.given = self.accumulated = self.stepped = False

    @property
    def fused(self) -> bool:
        """Whether the optimizer's own pass can take importance and masks."""
        return isinstance(self.optimizer, FusedOptimizer)


def divide(names: Sequence[str], parameters: Sequence[Tensor], optimizers: Sequence[Any]) -> list[Slot]:
    """Divide the pruned tensors among the optimizers that own them.

    Raises:
        ValueError: a pruned parameter that no optimizer owns. TypeError: something that is no torch optimizer.
    """
    places = {id(p): i for i, p in enumerate(parameters)}
    slots: list[Slot] = []
    for optimizer in map(_unwrapped, optimizers):
        groups = enumerate(optimizer.param_groups)
        owned = {places.pop(id(p)): g for g, group in groups for p in group["params"] if id(p) in places}
        if owned:
            indices = tuple(sorted(owned))
            slots.append(Slot(optimizer, indices, tuple(owned[i] for i in indices), len(slots)))
    if places:
        missing = [names[i] for i in places.values()]
        raise ValueError(
            f"{len(missing)} prunable parameters belong to no optimizer, {missing[0]} first; "
            f"give them to the optimizer or exclude them"
        )
    return slots


def attach(pruner: Pruner, slots: Sequence[Slot]) -> None:
    """Be called at each optimizer's step.

    Raises:
        RuntimeError: another pruner takes part in one of them already; then none is attached.
    """
    if any(_taken(slot.optimizer) for slot in slots):
        raise RuntimeError("an optimizer already belongs to a Pruner: detach() that one first")
    for slot in slots:
        if isinstance(slot.optimizer, FusedOptimizer):
            slot.optimizer.attach(pruner, slot)
        else:
            _hook(pruner, slot)


def detach(slots: Sequence[Slot]) -> None:
    """Let go of the optimizers."""
    for slot in slots:
        for handle in slot.handles:
            handle.remove()
        slot.handles = []
        # By now it may belong to another pruner.
        if isinstance(slot.optimizer, FusedOptimizer) and slot.optimizer._slot is slot:
            slot.optimizer.detach()


def is_attached(pruner: Pruner, slots: Sequence[Slot]) -> bool:
    """Whether every optimizer still calls this pruner; a deep copy of an optimizer does not."""
    return all(
        slot.optimizer.pruner is pruner
        if isinstance(slot.optimizer, FusedOptimizer)
        else bool(slot.handles) and slot.handles[0].id in slot.optimizer._optimizer_step_pre_hooks
        for slot in slots
    )


def _hook(pruner: Pruner, slot: Slot) -> None:
    before, after = partial(_before, pruner, slot), partial(_after, pruner, slot)
    slot.handles = [slot.optimizer.register_step_pre_hook(before), slot.optimizer.register_step_post_hook(after)]


def _before(pruner: Pruner, slot: Slot, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if any(callable(value) for value in (*args, *kwargs.values())):
        raise RuntimeError("step(closure) computes gradients inside the step, too late for the importance")
    pruner.begin(slot)


def _after(pruner: Pruner, slot: Slot, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    pruner.end(slot)


def _taken(optimizer: Optimizer) -> bool:
    """Whether a pruner takes part in its steps."""
    if isinstance(optimizer, FusedOptimizer):
        return optimizer.pruner is not None
    return any(getattr(hook, "func", None) is _before for hook in optimizer._optimizer_step_pre_hooks.values())


def _unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a wrapper such as accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"a torch.optim.Optimizer is needed, got {type(optimizer).__name__}")
    return optimizer
