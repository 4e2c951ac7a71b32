"""How a pruner takes part in its optimizers' steps, and in the own pass of a fused one; hooked.py is for any other."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from pins_ext import ops
from pins_ext.distributed.shards import local, local_gradient, shard_of
from pins_ext.optim.fused import FusedOptimizer
from pins_ext.optim.listener import BoundaryArguments, PruningArguments
from pins_ext.optim.step import Rate, Scaling
from pins_ext.pruning.boundary import boundary_of, counted_by
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.masks import Masks
from pins_ext.pruning.moments import check_moments


@dataclass(frozen=True)
class Step:
    """What is settled about a step before its optimizers take it.

    Attributes:
        t: pruner step.
        gradients: by parameter name, what scores the weights in place of the parameters' own gradients; None: those.
        scored: whether importance is taken in it, see PruneConfig.importance_every.
        masks_in_pass: whether the step ends with pruned weights at zero and the masks are final already, so that an
            optimizer's pass can apply them.
        one_pass: whether one pass of one optimizer over all tensors may choose masks and end a window, see Slot.
        ends_window: whether it ends one.
        due_next: whether the schedule asks for a mask in the next step.
    """

    t: int
    gradients: Mapping[str, Tensor] | None
    scored: bool
    masks_in_pass: bool
    one_pass: bool = False
    ends_window: bool = False
    due_next: bool = False


class StepDriver(Protocol):
    """Decides what happens in a step, once for all optimizers that take it; a Pruner is one."""

    score_gradients: Callable[[], Mapping[str, Tensor] | None] | None

    def begin_step(self) -> Step:
        """Gradients are in place, and no optimizer has stepped."""

    def end_step(self) -> None:
        """All optimizers that will step have stepped."""


class Slots(Sequence["Slot"]):
    """The slots of all optimizers that step pruned tensors, and the step that they take together.

    Each optimizer steps once per training step, in any order. One that a gradient scaler skips, or an exception ends,
    is left out when the others go on.

    Args:
        slots: one for each optimizer.
        driver: what is asked when a step begins, and told when it is over.

    Attributes:
        begun: slots whose optimizers have begun the step under way, in this order; empty between steps.
        seconds: host time spent in pruning, the fused update apart.
    """

    def __init__(self, slots: Sequence[Slot], driver: StepDriver) -> None:
        self._slots, self.driver = tuple(slots), driver
        self.begun: list[Slot] = []
        self.seconds = 0.0
        self._step = Step(0, None, False, False)
        for slot in slots:
            slot.attach(self)

    def __len__(self) -> int:
        return len(self._slots)

    @overload
    def __getitem__(self, i: int) -> Slot: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Slot]: ...
    def __getitem__(self, i: int | slice) -> Slot | Sequence[Slot]:
        return self._slots[i]

    @torch.no_grad()
    def begin(self, slot: Slot) -> None:
        """An optimizer is about to step: its gradients are in place, its weights are the old ones."""
        if slot.masks.in_view:
            raise RuntimeError(
                "an optimizer steps inside masked_view, which puts the weights back afterwards: leave it"
            )
        begin = time.perf_counter()
        if slot in self.begun and any(other.stepped for other in self.begun[self.begun.index(slot) :]):
            # The missing optimizers will not step any more: a gradient scaler skipped them, or an exception.
            self.finish()
        if not self.begun:
            self._step = self.driver.begin_step()
            self.begun = [slot]
        elif slot in self.begun:
            # An exception ended its step, and this one takes its place; gradients already in the window stay there.
            slot.count()
            gradients = self.driver.score_gradients() if self.driver.score_gradients is not None else None
            self._step = replace(self._step, gradients=gradients)
        else:
            self.begun.append(slot)
        slot.before_step(self._step)
        self.seconds += time.perf_counter() - begin

    @torch.no_grad()
    def end(self, slot: Slot) -> None:
        """An optimizer has stepped; after the last one the step is over."""
        begin = time.perf_counter()
        slot.after_step()
        if all(other.stepped for other in self):
            self.finish()
        self.seconds += time.perf_counter() - begin

    def finish(self) -> None:
        """End the step under way, also where some optimizers have not stepped."""
        self.driver.end_step()
        self.begun = []


class Slot(ABC):
    """The part of the pruned tensors that one optimizer owns, and its place in the step under way.

    Args:
        optimizer: their optimizer.
        indices: which of the pruner's tensors.
        part: its place among the optimizers, and its part of the importance.
        names: of all pruned tensors.
        importance: of all pruned tensors.
        masks: of all pruned tensors.

    Attributes:
        slots: told of each of the optimizer's steps, once attached.
        stepped: whether the optimizer has ended its step.
    """

    slots: Slots

    def __init__(
        self,
        optimizer: Optimizer,
        indices: Sequence[int],
        part: int,
        names: Sequence[str],
        importance: Importance,
        masks: Masks,
    ) -> None:
        self.optimizer, self.indices, self.part = optimizer, tuple(indices), part
        self.names = names
        self.bind(importance, masks)
        self.reset()

    def bind(self, importance: Importance, masks: Masks) -> None:
        """Follow these from now on: before the first step parameters may have been replaced by shards of them."""
        self.importance, self.masks = importance, masks
        self.parameters = importance.parameters
        self._subsets = ops.Subsets(importance.layout)

    def attach(self, slots: Slots) -> None:
        """Tell these of each of the optimizer's steps from now on."""
        self.slots = slots

    @abstractmethod
    def detach(self) -> None:
        """Let go of the optimizer."""

    @property
    @abstractmethod
    def attached(self) -> bool:
        """Whether the optimizer still calls; a copy of it does not."""

    @property
    def one_pass(self) -> bool:
        """Whether the optimizer's coming pass may choose masks and end a window; on the CPU."""
        return False

    # ---- the step ---------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """No step is under way."""
        self.step = Step(0, None, False, False)
        self.scaling = Scaling()
        self.stepped = False
        self._scored = False  # whether any of its tensors has a gradient that scores it
        self._in_window = False  # whether these gradients are in the window and not counted yet
        self._zeroed = False  # whether the optimizer's pass has zeroed the pruned weights
        self._fixed_zeroed = False  # whether it has zeroed those that every mask prunes

    def before_step(self, step: Step) -> None:
        """Gradients are in place, weights are the old ones."""
        self.reset()
        self.step, self.scaling = step, Scaling.of(self.optimizer)
        self._scored = any(self._score_gradient(i) is not None for i in self.indices)
        rule = self.importance.config.rule
        if rule.reads_moments:
            check_moments(rule.name, self.names[self.indices[0]], self.parameters[self.indices[0]], self.optimizer)
        if not self._scores_in_pass and not self.importance.scores_after_step:
            self._accumulate(self.indices, self.scaling)

    def after_step(self) -> None:
        """The optimizer has stepped."""
        if not self._scores_in_pass and self.importance.scores_after_step:
            # torch's fused optimizers have unscaled the parameters' own gradients by now.
            own = self.step.gradients is None
            self._accumulate(self.indices, replace(self.scaling, grad_scale=None) if own else self.scaling)
        self.stepped = True

    def count(self) -> None:
        """Count the gradients of this step in their window, once."""
        if self._in_window:
            self.importance.count_accepted(self.part, self.scaling, self._scored)
            self._in_window = False

    def close(self, masked: bool) -> None:
        """The step is over for all optimizers: `masked` says whether it ends with pruned weights at zero."""
        fixed = self.masks.fixed
        if masked and not self._zeroed:
            self.apply_masks(self.indices)
        elif fixed is not None and not self._fixed_zeroed:
            self.apply_masks(self.indices, fixed)
        if fixed is not None and self.importance.shadow:
            shadow = [self.importance.shadow[i] for i in self.indices]
            self.masks.apply(shadow, self.indices, self._subsets.of(self.indices), fixed, of="shadow")
        self.reset()
        self._subsets.next_step()

    def apply_masks(self, indices: Sequence[int], bits: list[Tensor] | None = None) -> None:
        """Zero the pruned weights of some of its tensors, and their optimizer states if the configuration says so.

        Args:
            indices: which tensors.
            bits: see Masks.apply.
        """
        self.masks.apply([local(self.parameters[i]) for i in indices], indices, self._subsets.of(indices), bits)
        if not self.importance.config.mask_optimizer_state:
            return
        states: dict[str, list[tuple[int, Tensor]]] = {}
        for i in indices:
            p = self.parameters[i]
            for name, state in self.optimizer.state[p].items():
                if isinstance(state, Tensor) and ops.is_coded(state, p.shape):
                    # Code 0 is zero, and the scale stays: no other weight's moment changes.
                    keep = ops.unpack_bits((bits or self.masks.bits)[i], local(p).shape)
                    local(state)[..., : ops.GROUP] *= ops.by_group(keep, shard_of(self.names[i], p))
                elif isinstance(state, Tensor) and state.shape == p.shape:
                    states.setdefault(name, []).append((i, local(state)))
        for name, entries in states.items():
            places, of_name = zip(*entries, strict=True)
            self.masks.apply(list(of_name), places, self._subsets.of(places), bits, of=name)

    def learning_rates(self) -> dict[int, Rate]:
        """Rate of the step under way by the tensor's place; 0 for a parameter that is in no group any more."""
        rates = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        return {i: rates.get(id(self.parameters[i]), 0.0) for i in self.indices}

    @property
    @abstractmethod
    def _scores_in_pass(self) -> bool:
        """Whether the optimizer's own pass advances the importance in this step."""

    def _accumulate(self, indices: Sequence[int], scaling: Scaling) -> None:
        """Take the gradients of this step into the window."""
        if self.masks.frozen or not self.step.scored:
            return
        if not self.importance.ipt:
            # The optimizer's moments are the window: it is enough to know that they took this gradient in.
            self._in_window |= self.importance.config.rule.reads_moments
            return
        rates = self.learning_rates()
        lr, grads = [rates[i] for i in indices], [self._gradient(i) for i in indices]
        self.importance.accumulate(indices, self._subsets.of(indices), grads, lr, self.part, self.step.t, scaling)
        self._in_window = True

    def _score_gradient(self, i: int) -> Tensor | None:
        """The gradient that scores a parameter, as it is."""
        given = self.step.gradients
        if given is None:
            return local_gradient(self.parameters[i])
        return local(given[self.names[i]]) if self.names[i] in given else None

    def _gradient(self, i: int) -> Tensor:
        """The gradient that scores a parameter, as the kernels take it; a missing one is zero."""
        p, grad = local(self.parameters[i]), self._score_gradient(i)
        if grad is None:
            return torch.zeros_like(p)
        if grad.layout != torch.strided:
            raise ValueError(f"{self.names[i]} has a sparse gradient; pruned parameters need dense ones (sparse=False)")
        return grad.contiguous()


class FusedSlot(Slot):
    """The slot of a PinsAdamW or PinsSGD, whose pass takes importance and masks along: a StepListener."""

    optimizer: FusedOptimizer

    def __init__(self, *args: Any) -> None:
        self._passed: set[int] = set()
        self._boundary: BoundaryArguments | None = None
        super().__init__(*args)

    def bind(self, importance: Importance, masks: Masks) -> None:
        """See Slot."""
        super().bind(importance, masks)
        self._places = {id(self.parameters[i]): i for i in self.indices}

    def attach(self, slots: Slots) -> None:
        """See Slot."""
        super().attach(slots)
        self.optimizer.listener = self

    def detach(self) -> None:
        """See Slot."""
        # By now the optimizer may belong to another pruner.
        if self.attached:
            self.optimizer.listener = None

    @property
    def attached(self) -> bool:
        """See Slot."""
        return self.optimizer.listener is self

    @property
    def one_pass(self) -> bool:
        """See Slot: of windows of one step, but for 8 bits, released or missing gradients, a scaler that may skip it.

        The pass at a longer window's end also reads ipt, and took as long as the separate ones.
        """
        if self.importance.config.delta_t > 1:
            return False
        if not (self.importance.folds_in_pass and self.masks.selection.packs) or self.optimizer.release is not None:
            return False
        if self.importance.config.dtype in ops.CODED or self.optimizer.coded(self.parameters):
            return False
        return Scaling.of(self.optimizer).found_inf is None and all(p.grad is not None for p in self.parameters)

    @property
    def _scores_in_pass(self) -> bool:
        return self.step.gradients is None and self.importance.in_pass

    @property
    def _takes_importance(self) -> bool:
        """Whether this step's gradients enter the window: not once more into one that an interrupted pass has ended."""
        return self._scores_in_pass and self.step.scored and not self.importance.ahead

    @property
    def _masks_in_pass(self) -> bool:
        """Not where a scaler may skip the pass, or the score still needs the weights that it leaves."""
        scores_late = self.importance.scores_after_step and not self._scores_in_pass
        return self.step.masks_in_pass and self.scaling.found_inf is None and not scores_late

    @property
    def _bits_in_pass(self) -> list[Tensor] | None:
        """What the pass prunes: by the masks, or between them by what is fixed."""
        if self._masks_in_pass:
            return self.masks.bits
        # Where the masks come after the pass, so does what is fixed.
        return self.masks.fixed if self.scaling.found_inf is None else None

    # ---- StepListener -----------------------------------------------------------------------------------------------

    def check_release(self) -> None:
        """See StepListener."""
        importance = self.importance
        if not importance.scored_before_step or importance.scores_after_step or not importance.in_pass:
            config = importance.config
            which = "a function as criterion" if callable(config.criterion) else f"criterion={config.criterion!r}"
            which += " with beta2=0" if config.smoothed and config.beta2 == 0 else ""
            raise RuntimeError(
                f"{which} needs all gradients of a step for its mask, and released ones are gone by then: use another "
                "criterion, such as pins, or train without release_gradients"
            )
        if self.slots.driver.score_gradients is not None:
            raise RuntimeError(
                "score_gradient='task' scores weights by gradients of its own, and released ones are gone by then: use "
                "'joint', or train without release_gradients"
            )

    def begin_step(self) -> None:
        """See StepListener."""
        self._passed.clear()
        self._boundary = None
        self.slots.begin(self)

    def place_of(self, parameter: Tensor) -> int | None:
        """See StepListener."""
        return self._places.get(id(parameter))

    def arguments(self, parameters: Sequence[Tensor]) -> PruningArguments:
        """See StepListener."""
        indices = [self._places[id(p)] for p in parameters]
        self._passed.update(indices)
        self._scored |= self._scores_in_pass  # a released gradient is not there yet when the step begins
        importance = self.importance
        scored = self._takes_importance and bool(importance.ipt) and not self.masks.frozen
        together = self.step.one_pass and self._scores_in_pass and len(indices) == len(self.parameters)
        if not together:
            self.masks.settle(importance)
        self._boundary = boundary_of(self.step, importance, self.masks, scored) if together else None
        return PruningArguments(
            layout=self._subsets.of(indices),
            masks=[bits[i] for i in indices] if (bits := self._bits_in_pass) is not None else [],
            ipt=[importance.ipt[i] for i in indices] if scored else [],
            shadow=[importance.shadow[i] for i in indices] if importance.shadow else [],
            accepted=importance.accepted[self.part],
            rng=importance.rng(self.step.t, self.optimizer.rounds(parameters)),
            criterion=importance.criterion if scored else "pins",
            clear_state=importance.config.mask_optimizer_state,
            boundary=self._boundary,
        )

    def end_pass(self) -> None:
        """See StepListener; a pruned parameter that got no gradient has a zero in its window, and stays masked."""
        left = [i for i in self.indices if i not in self._passed]
        if self._takes_importance:
            self._in_window = True
            if left:
                self._accumulate(left, self.scaling)
        if (boundary := self._boundary) is not None:
            if boundary.around is not None:
                self.masks.came()
            if boundary.fold_rng is not None:
                self.count()
                self.importance.folded_in_pass(counted_by(boundary))
        self.masks.settle(self.importance)
        if self._masks_in_pass:
            if left:
                self.apply_masks(left)
            self._zeroed = True
        self._fixed_zeroed = self._bits_in_pass is not None

    def end_step(self) -> None:
        """See StepListener."""
        self.slots.end(self)
