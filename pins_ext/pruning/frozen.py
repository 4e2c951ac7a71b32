"""Pruning weights that don't learn, below adapters that do: their gradients exist one at a time, inside backward."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import CheckpointFunction

from pins_ext import ops
from pins_ext.optim.step import NonFiniteError, Scaling
from pins_ext.pruning import sparse_start
from pins_ext.pruning.attachment import Slots, Step
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.hooked import HookedSlot
from pins_ext.pruning.owners import taken
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.pruning.streamed import GradientStream
from pins_ext.wrappers import is_sharded, unwrapped_optimizer


def base_config(config: PruneConfig) -> PruneConfig:
    """The configuration as it works over a frozen base: what is pruned can't come back, as it does not move.

    Raises:
        ValueError: what needs an optimizer of the pruned weights.
    """
    if config.rule.reads_moments or config.rule.reads_update:
        raise ValueError(
            f"criterion={config.criterion!r} needs an optimizer that steps the pruned weights, and a frozen base has "
            "none: use platon, movement or magnitude"
        )
    if config.mask_optimizer_state:
        raise ValueError("mask_optimizer_state: a frozen base has no optimizer state; leave it out")
    sparse_start.check_marks(config)
    return dataclasses.replace(config, regrow="never")


def base_parameters(model: nn.Module, config: PruneConfig) -> dict[str, nn.Parameter]:
    """The frozen parameters to prune, see prunable_parameters.

    Raises:
        ValueError: one that learns, or a model of several processes.
    """
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several or is_sharded(model):
        raise ValueError("frozen_base runs in one process: gradients are used before they are reduced over ranks")
    parameters = prunable_parameters(model, config, frozen_too=True)
    if learning := [name for name, p in parameters.items() if p.requires_grad]:
        raise ValueError(
            f"{learning[0]} is to be pruned and learns: frozen_base prunes weights with requires_grad=False; leave it "
            "out, or freeze the base as peft.get_peft_model does"
        )
    return parameters


def divide_base(n: int, optimizers: Sequence[Any]) -> list[tuple[Optimizer, tuple[int, ...]]]:
    """The optimizer of the adapters, whose steps a pruner of the base counts, and the places of all tensors.

    Raises:
        ValueError: several optimizers.
        RuntimeError: an optimizer that a pruner takes part in already.
    """
    if len(optimizers) != 1:
        raise ValueError(f"frozen_base follows the one optimizer of the adapters, got {len(optimizers)}")
    optimizer = unwrapped_optimizer(optimizers[0])
    if taken(optimizer):
        raise RuntimeError("an optimizer already belongs to a Pruner: detach() that one first")
    return [(optimizer, tuple(range(n)))]


class BaseSlot(HookedSlot):
    """The slot of the adapters' optimizer: its steps are counted, and gradients of the base are taken inside backward.

    Every backward is a gradient of its own in the window's mean, several in a step too. The first one of a step begins
    it, as its gradients belong behind the window's end. A window of one step keeps no mean: each score is folded into
    the averages as it comes, and a step has one backward.
    """

    def __init__(self, *args: Any) -> None:
        self._stream: GradientStream | None = None
        self._begun = False
        self._fixed_for: tuple[int, ...] | None = None
        self._skips: list[Tensor] = []
        super().__init__(*args)
        self.masks.fix()

    def attach(self, slots: Slots) -> None:
        """See Slot; from now on the base has gradients, one at a time."""
        super().attach(slots)
        for p in self.parameters:
            p.requires_grad_(True)
        self._stream = GradientStream(self.parameters, self._take, self._first, self._end_backward)

    def detach(self) -> None:
        """See Slot; the base is frozen as it was."""
        super().detach()
        if self._stream is not None:
            self._stream.detach()
            self._stream = None
            for p in self.parameters:
                p.requires_grad_(False)

    def before_step(self, step: Step) -> None:
        """See Slot: called when the first gradient comes, and once more by the optimizer."""
        self.reset()
        self.step = step

    @property
    def _scores(self) -> bool:
        takes = self.importance.at_once or bool(self.importance.ipt)
        return self.step.scored and takes and not self.masks.frozen

    def _first(self) -> None:
        """A backward begins."""
        if _inside_reentrant_checkpoint():
            raise RuntimeError(
                "reentrant activation checkpointing makes a backward of its own of each part, and each would count as "
                "a gradient in which all other weights have none: use use_reentrant=False"
            )
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._end_backward)
        if self._begun and self.importance.at_once and self._scores:
            raise RuntimeError(
                "delta_t=1 over a frozen base keeps no window: a step has one backward. To accumulate, or to go on "
                "after a backward that an exception ended, use a delta_t of 2 or more"
            )
        if not self._begun:
            if self.slots.driver.score_gradients is not None:
                raise RuntimeError(
                    "score_gradient='task' is not for a frozen base, whose gradients are gone: use 'joint'"
                )
            self._begun = True
            self.slots.begin(self)

    def _take(self, i: int, grad: Tensor) -> None:
        if not self._scores:
            return
        if grad.layout != torch.strided:
            raise ValueError(f"{self.names[i]} has a sparse gradient; pruned parameters need dense ones (sparse=False)")
        begin = time.perf_counter()
        grad, layout = grad.contiguous(), self._subsets.of([i])
        skip = (~torch.isfinite(ops.sum_of_squares([grad], layout.places, layout.chunks))).float()
        self._skips.append(skip)
        self._score(i, grad, Scaling(found_inf=skip))
        self.slots.seconds += time.perf_counter() - begin

    def _score(self, i: int, grad: Tensor, scaling: Scaling) -> None:
        """Take a gradient into the window, or at once into the averages."""
        layout, t = self._subsets.of([i]), self.step.t
        if self.importance.at_once:
            skipped = torch.zeros_like(self.importance.accepted[self.part])
            skipped = skipped if scaling.found_inf is None else scaling.found_inf
            self.importance.fold_at_once(i, layout, grad, self.part, t, skipped)
        else:
            self.importance.accumulate([i], layout, [grad], [0.0], self.part, t, scaling)

    @torch.no_grad()
    def _end_backward(self) -> None:
        """A weight without a gradient has a zero in its window; one that an exception ended early counts like that."""
        if self._stream is None:
            return
        if self._scores:
            for i in set(self.indices) - self._stream.came:
                self._score(i, torch.zeros_like(self.parameters[i]), Scaling())
            self.importance.count_accepted(self.part, Scaling(), bool(self._stream.came))
        self._stream.begin()

    def after_step(self) -> None:
        """See Slot. One synchronisation.

        Raises:
            NonFiniteError: a gradient of the base was not finite.
        """
        skips, self._skips = self._skips, []
        if skips and bool(torch.stack(skips).any()):
            raise NonFiniteError(
                "a gradient of the frozen base is not finite: its tensor's importance has left it out. Start again "
                "from the last checkpoint, with a lower learning rate, other data, or without a GradScaler"
            )
        super().after_step()

    def close(self, masked: bool) -> None:
        """See Slot; what is pruned now stays so."""
        super().close(masked)
        self._begun = False
        if masked and self.masks.chosen_for != self._fixed_for:
            self.fix()

    def fix(self) -> None:
        """Let what the mask prunes be part of every later one."""
        self._fixed_for = self.masks.chosen_for
        self.masks.fix()
        self.importance.bar(self.masks.fixed or [])

    def restored(self) -> None:
        """A state was loaded: the base is as its masks left it."""
        self._fixed_for = None
        assert self.masks.fixed is not None
        self.apply_masks(self.indices, self.masks.fixed)
        self.importance.bar(self.masks.fixed)


def _inside_reentrant_checkpoint() -> bool:
    """Whether this backward is one inside another: its hooks are called from CheckpointFunction.backward."""
    frame = sys._getframe()
    code = CheckpointFunction.backward.__code__
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None
