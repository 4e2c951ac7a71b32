"""How a pruner takes part in the steps of any torch optimizer: through its hooks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from pins_ext.distributed.shards import local
from pins_ext.optim.step import is_rehearsal, refuse_capture
from pins_ext.pruning import copies
from pins_ext.pruning.attachment import Slot, Slots


class HookedSlot(Slot):
    """The slot of any torch optimizer: importance before its step, masks after it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rehearsed = False  # whether the step under way is none, see is_rehearsal
        self._handles: list[Any] = []

    def attach(self, slots: Slots) -> None:
        """See Slot."""
        super().attach(slots)
        # torch.compile breaks its graph at both: what a step does is decided on the host, anew in every step.
        before, after = (partial(torch.compiler.disable(hook), self) for hook in (_before, _after))
        copies.warn_copies(self.optimizer)
        self._handles = [
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        ]

    def detach(self) -> None:
        """See Slot."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            copies.let_copies_be(self.optimizer)
        self._handles = []

    @property
    def attached(self) -> bool:
        """See Slot."""
        return bool(self._handles) and self._handles[0].id in self.optimizer._optimizer_step_pre_hooks

    def close(self, masked: bool) -> None:
        """See Slot; weights that were stepped go into the shadow, the others were masked before."""
        if self.stepped and self.importance.shadow:
            stepped = [i for i in self.indices if self.parameters[i].grad is not None]
            weights, shadow = [local(self.parameters[i]) for i in stepped], [self.importance.shadow[i] for i in stepped]
            if self.scaling.found_inf is not None:
                skipped = self.scaling.found_inf != 0
                weights = [torch.where(skipped, old, new) for old, new in zip(shadow, weights, strict=True)]
            if stepped:
                torch._foreach_copy_(shadow, weights)
        super().close(masked)

    @property
    def _scores_in_pass(self) -> bool:
        return False


def _before(slot: HookedSlot, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    slot.rehearsed = is_rehearsal(optimizer)
    if slot.rehearsed:
        return
    if any(callable(value) for value in (*args, *kwargs.values())):
        raise RuntimeError("step(closure) computes gradients inside the step, too late for the importance")
    refuse_capture(optimizer)
    slot.slots.begin(slot)


def _after(slot: HookedSlot, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not slot.rehearsed:
        slot.slots.end(slot)


def hooked_by_pruner(optimizer: Optimizer) -> bool:
    """Whether a HookedSlot follows its steps."""
    hooks = (getattr(hook, "func", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return any(getattr(hook, "__wrapped__", None) is _before for hook in hooks)
