"""Iterative global pruning attached to a training loop: who is asked what, and when, within one optimizer step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pins_ext import ops, reference
from pins_ext.optim import FusedPruning
from pins_ext.pruning import attachment, checkpoint, inspection
from pins_ext.pruning.attachment import Slot
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.importance import Importance, Scaling
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.pruning.schedule import Schedule
from pins_ext.pruning.scopes import Selection, subset

_ZERO_THRESHOLD = 0x80000001  # order key of the smallest positive float32: below it lies only zero


class Pruner:
    """Prunes a model while any torch optimizer trains it; the training loop stays as it was.

    Order within one step (Ren & Zhu 2023, released code): the window's end and a new mask where they are due,
    importance from the weights before the step, the optimizer, zeros. A `PinsAdamW` or `PinsSGD` does the last three in
    one pass; any other optimizer is followed through its step hooks.

    Args:
        model: the model to prune. Nothing in it is renamed or replaced.
        optimizer: its optimizer, or several that share one budget and each step once per training step. One that a
            gradient scaler skips, or an exception ends, is left out when the others go on.
        config: what to prune, how much and when.
        total_steps: optimizer steps of the whole run.

    Attributes:
        step: optimizer steps seen so far. names: pruned parameters in order of their global index.
        n_weights: how many weights they hold. schedule: remaining ratio and mask steps.
        score_gradients: asked before every step for the gradients that score the weights, by parameter name, in place
            of the parameters' own (a missing one is zero; None: the parameters' own). For SelfRegularizer's
            score_gradient="task": `pruner.score_gradients = regularizer.take_task_gradients`.
        before_mask: called in every step that zeroes weights, when they are stepped and not yet zeroed and `mask` is
            already the one to come; it must leave the weights as they are. While it is set, masks go on after the
            optimizer's pass, to the same bits.

    Raises:
        ValueError: a schedule longer than training, patterns that match nothing, infeasible densities, parameters that
            no optimizer owns; see PruneConfig, Schedule, prunable_parameters.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], config: PruneConfig, total_steps: int
    ) -> None:
        self.model, self.config = model, config
        self.schedule = Schedule.of(config, total_steps)
        parameters = prunable_parameters(model, config)
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.layout = ops.Layout.of(self.parameters)
        self.n_weights = self.layout.total
        self.selection = Selection(self.names, self.parameters, self.layout, config)
        optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        self._slots = attachment.divide(self.names, self.parameters, optimizers)
        self.importance = Importance(self.parameters, config, self.layout, [slot.indices for slot in self._slots])
        self.masks = [ops.new_mask(p) for p in self.parameters]
        self.threshold = torch.zeros(1, 2, dtype=torch.int64, device=self.layout.places.device)
        self.step = 0
        self.frozen = False
        self.masked = False
        self.seconds = 0.0
        self.score_gradients: Callable[[], Mapping[str, Tensor] | None] | None = None
        self.before_mask: Callable[[], None] | None = None
        self._given: Mapping[str, Tensor] | None = None
        self._selected_for: tuple[Any, ...] | None = None
        self._pack_stats = torch.zeros(len(self.names), 3, dtype=torch.int64, device=self.layout.places.device)
        self._counts: Tensor | None = None
        self._layouts: dict[tuple[int, ...], ops.Layout] = {}
        self._open: list[Slot] = []
        attachment.attach(self, self._slots)

    @classmethod
    def from_sparse(
        cls, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], config: PruneConfig | None = None
    ) -> Pruner:
        """Go on training a sparse model with its zeros fixed: the mask is where its prunable weights are not zero.

        Args:
            config: which parameters count (include, exclude, parameter_set); its schedule is not used.

        Raises:
            ValueError: the model has no zeros to keep.
        """
        # Magnitude keeps no states; with the mask fixed no score is ever asked for.
        still = dataclasses.replace(
            config or PruneConfig(),
            criterion="magnitude",
            mask_policy="reference",
            schedule="constant",
            warmup=0,
            cooldown=0,
        )
        pruner = cls(model, optimizer, still, total_steps=1)
        threshold = torch.tensor([[_ZERO_THRESHOLD, 0]]).to(pruner.layout.places.device)
        pruner._pack(pruner.importance.score(), threshold)
        kept = int(pruner._pack_stats[:, 0].sum())
        if kept == pruner.n_weights:
            pruner.detach()
            raise ValueError("the model has no zeros in its prunable parameters: nothing to keep sparse")
        pruner.schedule = dataclasses.replace(pruner.schedule, final_ratio=kept / pruner.n_weights)
        pruner.freeze()
        return pruner

    # ---- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, slot: Slot) -> None:
        """An optimizer is about to step: its gradients are in place, its weights are the old ones."""
        if slot in self._open and any(other.stepped for other in self._open[self._open.index(slot) :]):
            # The missing optimizers will not step any more: a gradient scaler skipped them, or an exception.
            self._end_step()
        interrupted = slot in self._open
        if interrupted:
            # An exception ended its step, and this one takes its place; gradients already in the window stay there.
            self._count(slot)
        slot.reset()
        slot.scaling = Scaling.of(slot.optimizer)
        if interrupted or not self._open:
            self._given = self.score_gradients() if self.score_gradients is not None else None
        if not self._open:
            self._begin_step()
        if not interrupted:
            self._open.append(slot)
        slot.given = any(self._score_gradient(i) is not None for i in slot.indices)
        if not self._in_optimizer_pass(slot) and self.config.criterion != "pins-update":
            self._accumulate(slot, slot.indices, slot.scaling)

    @torch.no_grad()
    def end(self, slot: Slot) -> None:
        """An optimizer has stepped; after the last one the weights are masked."""
        if not self._in_optimizer_pass(slot) and self.config.criterion == "pins-update":
            # torch's fused optimizers have unscaled the parameters' own gradients by now.
            unscaled = Scaling(None, slot.scaling.found_inf)
            self._accumulate(slot, slot.indices, unscaled if self._given is None else slot.scaling)
        slot.stepped = True
        if all(other.stepped for other in self._slots):
            self._end_step()

    def _begin_step(self) -> None:
        with self._timed():
            due = self.schedule.mask_due(self.step)
            if self.frozen:
                return
            if self.config.smoothed and self.step % self.config.delta_t == 0:
                bracket, counts = self._count_while_folding() if due else (None, None)
                self.importance.fold(self.step, bracket, counts)
            else:
                bracket = counts = None
            if due and self.importance.scored_before_step:
                self._renew_masks(self.schedule.remaining_ratio(self.step), bracket, counts)

    def _end_step(self) -> None:
        with self._timed():
            due = self.schedule.mask_due(self.step)
            if not self.frozen:
                for slot in self._open:
                    self._count(slot)
                if due and not self.importance.scored_before_step:
                    self._renew_masks(self.schedule.remaining_ratio(self.step))
                # One synchronisation, where an empty mask would otherwise stay for good.
                if due and self.schedule.selects_once(self.step) and bool(self.importance.known):
                    self.freeze()
            self.masked = self._masks_wanted
            if self.masked and self.before_mask is not None:
                self.before_mask()
            for slot in self._slots:
                if slot.stepped and not slot.fused and self.importance.shadow:
                    self._keep_unmasked(slot)
                if self.masked and (self._masks_late(slot) or not slot.stepped):
                    self._apply(slot, slot.indices)
                slot.reset()
            self._open.clear()
            self.step += 1

    def _count(self, slot: Slot) -> None:
        if slot.accumulated:
            self.importance.count_accepted(slot.part, slot.scaling, slot.given)

    def _keep_unmasked(self, slot: Slot) -> None:
        """Take the weights that were stepped into the shadow; the others were masked before."""
        skipped = None if slot.scaling.found_inf is None else slot.scaling.found_inf != 0
        for i in slot.indices:
            p, shadow = self.parameters[i], self.importance.shadow[i]
            if p.grad is not None:
                shadow.copy_(p if skipped is None else torch.where(skipped, shadow, p))

    def _in_optimizer_pass(self, slot: Slot) -> bool:
        """Whether the optimizer's own kernel advances the importance."""
        return slot.fused and self._given is None and not callable(self.config.criterion)

    def _masks_late(self, slot: Slot) -> bool:
        """Whether masks go on after the optimizer's pass: it takes none, may be skipped, or must not mask yet."""
        may_skip = slot.scaling.found_inf is not None
        selected_after = self.schedule.mask_due(self.step) and not self.importance.scored_before_step
        scored_after = self.config.criterion == "pins-update" and not self._in_optimizer_pass(slot)
        return not slot.fused or may_skip or selected_after or scored_after or self.before_mask is not None

    @property
    def _masks_wanted(self) -> bool:
        """Whether the step under way ends with pruned weights at zero."""
        strict = self.config.mask_policy == "strict" and self._selected_for is not None
        return self.frozen or strict or self.schedule.mask_due(self.step)

    def fused_pruning(self, slot: Slot, with_grad: list[int]) -> FusedPruning:
        """What a fused optimizer takes into its pass over the pruned tensors `with_grad` (places in the whole list)."""
        importance = self.importance
        masked = self._masks_wanted and not self._masks_late(slot)
        importing = bool(importance.ipt) and not self.frozen and self._in_optimizer_pass(slot)
        return FusedPruning(
            layout=self._layout_of(with_grad),
            masks=[self.masks[i] for i in with_grad] if masked else [],
            ipt=[importance.ipt[i] for i in with_grad] if importing else [],
            shadow=[importance.shadow[i] for i in with_grad] if importance.shadow else [],
            accepted=importance.accepted[slot.part],
            rng=importance.rng(self.step),
            criterion=importance.criterion if importing else "pins",
            clear_state=self.config.mask_optimizer_state,
        )

    @torch.no_grad()
    def fused_without_grad(self, slot: Slot, without_grad: list[int]) -> None:
        """The fused pass is over; pruned tensors that got no gradient: a zero enters their window, their zeros stay."""
        if self._in_optimizer_pass(slot):
            slot.accumulated = True
            if without_grad:
                self._accumulate(slot, without_grad, slot.scaling)
        if not without_grad:
            return
        if self._masks_wanted and not self._masks_late(slot):
            self._apply(slot, without_grad)

    def _accumulate(self, slot: Slot, indices: Sequence[int], scaling: Scaling) -> None:
        if not self.importance.ipt or self.frozen:
            return
        with self._timed():
            grads = [self._gradient(i) for i in indices]
            rates = [float(group["lr"]) for group in slot.optimizer.param_groups]
            place = dict(zip(slot.indices, slot.group_of, strict=True))
            lr = torch.tensor([rates[place[i]] for i in indices], dtype=torch.float32).to(self.layout.places.device)
            self.importance.accumulate(indices, self._layout_of(indices), grads, lr, slot.part, self.step, scaling)
            slot.accumulated = True

    def _score_gradient(self, i: int) -> Tensor | None:
        """The gradient that scores a parameter, as it is."""
        return self.parameters[i].grad if self._given is None else self._given.get(self.names[i])

    def _gradient(self, i: int) -> Tensor:
        """The gradient that scores a parameter, as the kernels take it; a missing one is zero."""
        p, grad = self.parameters[i], self._score_gradient(i)
        if grad is None:
            return torch.zeros_like(p)
        if grad.layout != torch.strided:
            raise ValueError(f"{self.names[i]} has a sparse gradient; pruned parameters need dense ones (sparse=False)")
        return grad.contiguous()

    # ---- masks ------------------------------------------------------------------------------------------------------

    def _count_while_folding(self) -> tuple[Tensor | None, Tensor | None]:
        """A bracket around the last threshold and room for its counts, once there is a threshold to start from."""
        selected_before = self._selected_for is not None and self.config.beta2 != 0
        if not self.selection.global_scope or not selected_before or len(self._slots) > 1:
            return None, None
        if self._counts is None:
            self._counts = torch.zeros(1 + ops.BINS, dtype=torch.int64, device=self.layout.places.device)
        return ops.bracket_around(self.threshold), self._counts

    def _renew_masks(self, ratio: float, bracket: Tensor | None = None, counts: Tensor | None = None) -> None:
        """Select anew, unless neither the scores nor the number to prune changed since the last time."""
        window = self.step // self.config.delta_t if self.importance.constant_in_window else self.step
        wanted = (window, *self.selection.n_prune(ratio))
        if wanted == self._selected_for:
            return
        score = self.importance.score()
        threshold = self.selection.thresholds(score, ratio, bracket, counts)
        if self.selection.exact:
            # Before any score is known an exact count could only be met by position; the lowest threshold prunes
            # nothing. The released rule, strictly below zero, prunes nothing by itself.
            threshold = threshold * self.importance.known
        self._pack(score, threshold)
        self._selected_for = wanted

    def _pack(self, score: tuple[str, list[Tensor], list[Tensor]], threshold: Tensor) -> None:
        kind, a, b = score
        self.threshold = threshold
        places, chunks = self.layout.places, self.layout.chunks
        torch.ops.pins_ext.pack_(self.masks, self._pack_stats, a, b, places, chunks, kind, threshold)

    def _apply(self, slot: Slot, indices: Sequence[int]) -> None:
        layout, masks = self._layout_of(indices), [self.masks[i] for i in indices]
        parameters = [self.parameters[i] for i in indices]
        torch.ops.pins_ext.apply_mask_(parameters, masks, layout.places, layout.chunks)
        torch.autograd.graph.increment_version(parameters)
        if self.config.mask_optimizer_state:
            for i, p in zip(indices, parameters, strict=True):
                states = [v for v in slot.optimizer.state[p].values() if isinstance(v, Tensor) and v.shape == p.shape]
                one = self._layout_of([i])
                for state in states:
                    torch.ops.pins_ext.apply_mask_([state], [self.masks[i]], one.places, one.chunks)

    def _layout_of(self, indices: Sequence[int]) -> ops.Layout:
        key = tuple(indices)
        if key not in self._layouts:
            self._layouts[key] = subset(self.layout, self.parameters, key)
        return self._layouts[key]

    # ---- what the user asks for -------------------------------------------------------------------------------------

    @property
    def remaining_ratio(self) -> float:
        """Share of the prunable weights that the schedule keeps at the current step."""
        return self.schedule.remaining_ratio(self.step)

    @torch.no_grad()
    def finalize(self) -> dict[str, Any]:
        """Select at the final sparsity, zero the pruned weights for good, verify: when training ends, early or not.

        Returns:
            What `verify` returns.

        Raises:
            RuntimeError: no gradient was ever seen, so no weight has a score; or verification failed.
        """
        if self._open:
            self._end_step()
        if not self.frozen:
            if not self.importance.known:
                if not self.importance.seen:
                    raise RuntimeError("finalize: no gradient has been seen yet, so nothing is known about any weight")
                self.importance.fold(self.step)
            self._selected_for = None
            self._renew_masks(self.schedule.final_ratio)
            self.freeze()
        for slot in self._slots:
            self._apply(slot, slot.indices)
        self.masked = True
        return self.verify()

    def freeze(self) -> None:
        """Fix the mask: from now on it never changes, pruned weights are zero after every step, importance rests."""
        self.frozen = True

    def mask(self, name: str) -> Tensor:
        """Boolean mask of one parameter (True = keep), of its shape; a copy.

        Raises:
            ValueError: the parameter is not pruned.
        """
        if name not in self.names:
            raise ValueError(f"{name!r} is not pruned; Pruner.names lists what is, such as {self.names[0]!r}")
        i = self.names.index(name)
        return reference.unpack_bits(self.masks[i], self.parameters[i].shape)

    def stats(self) -> dict[str, Any]:
        """Sparsity overall and per layer, threshold, churn, NaN scores, time spent; costs one synchronisation."""
        return inspection.stats(self)

    def plan(self) -> inspection.Plan:
        """What would happen, without doing it: pruned tensors, memory, schedule, conflicts."""
        return inspection.plan(self)

    def verify(self) -> dict[str, Any]:
        """Check that the model, its optimizer and the masks agree.

        Raises:
            RuntimeError: they don't; every problem found is listed.
        """
        return inspection.verify(self)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, as plain data and tensors (not copied): never part of the optimizer's state."""
        return checkpoint.state_dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict of a Pruner of the same model and configuration.

        Raises:
            ValueError: another configuration, other parameters or shapes; the message lists the differences.
        """
        checkpoint.load_state_dict(self, state)

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, aside and then renamed; contents are checked by hash on loading."""
        checkpoint.save(self, Path(path))

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote. Raises ValueError for a damaged or foreign file or another configuration."""
        checkpoint.load(self, Path(path))

    def detach(self) -> None:
        """Let go of the optimizers; the weights stay as they are."""
        attachment.detach(self._slots)

    @property
    def attached(self) -> bool:
        """Whether every optimizer still calls this pruner; a deep copy of an optimizer does not."""
        return attachment.is_attached(self, self._slots)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Wall time on the host; a GPU's own time is the benchmark's matter, not worth a synchronisation here."""
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin
