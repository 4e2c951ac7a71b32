"""How a pruner takes part in its optimizers' steps; fused.py is for optimizers of ours, hooked.py for any other."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from pins_ext import ops
from pins_ext.distributed.shards import local, local_gradient, shard_of
from pins_ext.optim.step import Rate, Scaling
from pins_ext.pruning.captured import CapturedSteps
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
        captured: which steps CUDA graphs hold; None where no optimizer is capturable.
    """

    def __init__(self, slots: Sequence[Slot], driver: StepDriver) -> None:
        self._slots, self.driver = tuple(slots), driver
        self.begun: list[Slot] = []
        self._ending = False
        self.seconds = 0.0
        self._step = Step(0, None, False, False)
        capturable = any(slot.capturable for slot in slots)
        self.captured = CapturedSteps([slot.optimizer for slot in slots]) if capturable else None
        for slot in slots:
            slot.attach(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Pruner can't be pickled, as hooks tie it to its model and optimizer: save state_dict(), or save(path), "
            "and load it into a Pruner of those that are there then; copy.deepcopy copies all three"
        )

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
        slot.masks.refuse_in_view()
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

    def forget(self) -> None:
        """Forget the step under way, which an exception has ended: states that are loaded take its place."""
        for slot in self.begun:
            slot.reset()
        self.begun = []

    def abandon(self) -> None:
        """Forget a step that was to be captured: nothing of it has run."""
        self.forget()
        if self.captured is not None:
            self.captured.put_back(self._slots[0].masks)

    @torch.no_grad()
    def complete(self) -> None:
        """End the step under way if all that began it have stepped: a gradient scaler has skipped the others."""
        if self.begun and all(slot.stepped for slot in self.begun) and not self._ending:
            self.finish()

    def finish(self) -> None:
        """End the step under way, also where some optimizers have not stepped."""
        self._ending = True  # what is called on the way, such as before_mask, may ask for states
        try:
            self.driver.end_step()
        finally:
            self._ending = False
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
        unscales: whether a step unscales the parameters' own gradients in place, as those of torch's fused optimizers.
    """

    slots: Slots
    unscales = True

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
        self._subsets = ops.Subsets(masks.weights_layout)

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
        """Whether the optimizer's coming pass may choose masks and end a window."""
        return False

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the optimizer's step."""
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
        rule = self.importance.rule
        if rule.reads_moments:
            check_moments(rule.name, self.names[self.indices[0]], self.parameters[self.indices[0]], self.optimizer)
        if not self._scores_in_pass and not self.importance.scores_after_step:
            self._accumulate(self.indices, self.scaling)

    def after_step(self) -> None:
        """The optimizer has stepped."""
        if not self._scores_in_pass and self.importance.scores_after_step:
            own = self.step.gradients is None and self.unscales
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
        if not self.capturable:  # a graph, or the capture to come, reads all that was asked for
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
            self._in_window |= self.importance.rule.reads_moments
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
