"""Iterative global pruning attached to a training loop: the order of things within one optimizer step."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pins_ext.distributed import states
from pins_ext.distributed.shards import forget_gathered, like, local
from pins_ext.pruning import checkpoint, inspection, sparse_start
from pins_ext.pruning.attachment import Slot, Slots, Step
from pins_ext.pruning.captured import StepKind
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.frozen import BaseSlot, base_config, base_parameters, divide_base
from pins_ext.pruning.owners import divide, slot_of
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.pruning.patterns import fitted
from pins_ext.pruning.plan import ConflictWarning, Plan, conflicts, plan
from pins_ext.pruning.schedule import Schedule
from pins_ext.pruning.scopes import Scopes
from pins_ext.pruning.sparse_start import keep_zeros
from pins_ext.pruning.states import refuse_stale, states_of
from pins_ext.pruning.view import masked
from pins_ext.wrappers import unwrapped


class Pruner:
    """Prunes a model while any torch optimizer trains it; the training loop stays as it was.

    Order within one step (Ren & Zhu 2023, released code): at the steps that ask for it, end the window and choose a new
    mask; compute importance from the weights before the step; update the weights; zero those that are pruned. A
    `PinsAdamW` or `PinsSGD` does the last three in one pass; any other optimizer is followed through its step hooks.

    Args:
        model: the model to prune. Nothing in it is renamed or replaced.
        optimizer: its optimizer, or several that share one budget and each step once per training step. One that a
            gradient scaler skips, or an exception ends, is left out when the others go on.
        config: what to prune, how much and when.
        total_steps: optimizer steps of the whole run.
        frozen_base: prune weights that don't learn (requires_grad=False), below adapters whose optimizer is given.
            Their gradients are folded into their importance inside backward and freed one by one. Pruned weights stay
            so, as nothing moves them; `pins` is `platon` here. To resume, load the base as it was at the start, and
            `load` masks it. `detach` freezes the base again.

    Attributes:
        step: optimizer steps seen so far.
        names: pruned parameters in order of their global index, as in `named_parameters`, but without what wrappers
            put before and between: torch.compile, DistributedDataParallel, peft's base_model.model and base_layer.
        n_weights: how many weights they hold.
        schedule: remaining ratio and mask steps.
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
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        config: PruneConfig,
        total_steps: int,
        frozen_base: bool = False,
    ) -> None:
        if not isinstance(config, PruneConfig):
            kind = type(config).__name__
            raise TypeError(f"config must be a PruneConfig, got {kind}: Pruner(model, optimizer, config, total_steps)")
        config.check_training()
        config = base_config(config) if frozen_base else config
        model = unwrapped(model)
        self.model, self.config, self.frozen_base = model, config, frozen_base
        self.schedule = Schedule.of(config, total_steps)
        forget_gathered(model)
        parameters = base_parameters(model, config) if frozen_base else prunable_parameters(model, config)
        self.names = list(parameters)
        self.n_weights = sum(p.numel() for p in parameters.values())
        fits, misfits = fitted(model, parameters, config)
        scopes = Scopes(self.names, [p.numel() for p in parameters.values()], config, fits)
        optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        parts = (
            divide_base(len(parameters), optimizers)
            if frozen_base
            else divide(self.names, list(parameters.values()), optimizers)
        )
        self.parameters = list(parameters.values())
        self.importance, self.masks = states_of(parameters, scopes, config, parts, frozen_base)
        self.step = 0
        self.score_gradients: Callable[[], Mapping[str, Tensor] | None] | None = None
        self.before_mask: Callable[[], None] | None = None
        self._settled = False
        make = BaseSlot if frozen_base else slot_of
        made: list[Slot] = [
            make(owner, indices, part, self.names, self.importance, self.masks)
            for part, (owner, indices) in enumerate(parts)
        ]
        self.slots = Slots(made, self)
        try:
            for conflict in (*misfits, *conflicts(config, self.schedule, frozen_base, self.slots)):
                warnings.warn(conflict, ConflictWarning, stacklevel=2)
        except BaseException:
            # Nobody has this pruner: its optimizers are free for the next one.
            self.detach()
            raise

    def __repr__(self) -> str:
        return (
            f"Pruner({self.config.criterion}, {self.n_weights:,} weights in {len(self.names)} tensors, "
            f"step {self.step} of {self.schedule.total}, sparsity to reach {1 - self.schedule.final_ratio:.4g})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Pruner:
        """A pruner of the copies of the model and of the optimizers, which are made along if they were not yet."""
        self.slots.complete()
        if self.slots.begun or self.masks.in_view:
            raise RuntimeError("a Pruner can't be copied within a step or inside masked_view")
        if self.frozen_base:
            raise RuntimeError("a Pruner of a frozen base can't be copied: make a new one, and load its state_dict")
        model = copy.deepcopy(self.model, memo)
        optimizers = [copy.deepcopy(slot.optimizer, memo) for slot in self.slots]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConflictWarning)
            copied = memo[id(self)] = Pruner(model, optimizers, self.config, self.schedule.total)
        copied.schedule = self.schedule
        if self.masks.fixed is not None:
            copied.schedule = keep_zeros(copied.schedule, copied.names, copied.importance, copied.masks)
        copied.load_state_dict(self.state_dict())
        copied.score_gradients, copied.before_mask = copy.deepcopy((self.score_gradients, self.before_mask), memo)
        return copied

    def _settle(self) -> None:
        """Until the first step: follow parameters that were replaced since, as accelerate does when it shards a model.

        Raises:
            RuntimeError: they are not the same ones any more, or their optimizers do not hold them.
        """
        if self._settled:
            return
        forget_gathered(self.model)
        parameters = prunable_parameters(self.model, self.config)
        if all(a is b for a, b in zip(parameters.values(), self.parameters, strict=False)):
            return
        if list(parameters) != self.names or self.n_weights != sum(p.numel() for p in parameters.values()):
            left = next((name for name in self.names if name not in parameters), None)
            why = f"{left} is gone, or does not require gradients any more" if left else "there are others"
            raise RuntimeError(f"the model's parameters changed since the Pruner was made ({why}): make a new one")
        before, parts = self.masks, [(slot.optimizer, slot.indices) for slot in self.slots]
        refuse_stale(parameters, parts)
        self.parameters = list(parameters.values())
        self.importance, self.masks = states_of(parameters, before.scopes, self.config, parts, self.frozen_base)
        if before.fixed is not None:
            self.schedule = keep_zeros(self.schedule, self.names, self.importance, self.masks)
        elif before.frozen:
            sparse_start.hold_again(before, self.parameters, self.masks)
        for slot in self.slots:
            slot.bind(self.importance, self.masks)

    @classmethod
    def from_sparse(
        cls,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        config: PruneConfig | None = None,
        total_steps: int | None = None,
        frozen_base: bool = False,
    ) -> Pruner:
        """Go on training a sparse model with its zeros fixed: they are zero after every step, whatever else is pruned.

        With `total_steps` the model is pruned further, to config.sparsity by config.schedule, which starts from the
        sparsity that is there. The zeros of the start stay pruned in every mask and count among what it prunes;
        mask_policy says of the other weights alone what happens between masks.

        Args:
            model: the model.
            optimizer: its optimizer, or several.
            config: what to prune, how much and when. Without total_steps only which parameters count (include, exclude,
                parameter_set) and which pattern their zeros must have: the mask is where they are not zero, and never
                changes. Without a pattern the ones that explain the zeros are recognised; `verify` names them.
            total_steps: optimizer steps of the run; None: keep the sparsity that is there.
            frozen_base: see the class; needs total_steps, as a base that does not move keeps its zeros by itself.

        Raises:
            ValueError: the model has no zeros to keep, or others than the pattern asks for; with total_steps more than
                are asked for in the end, in all or by scope and densities, or initial_sparsity, beta1=0, a pattern, or
                no config.
        """
        if total_steps is not None:
            if config is None:
                raise ValueError("from_sparse needs a config with total_steps: how sparse is the model to become?")
            pruner = cls(model, optimizer, config, total_steps, frozen_base)
            try:
                pruner.schedule = keep_zeros(pruner.schedule, pruner.names, pruner.importance, pruner.masks)
            except ValueError:
                pruner.detach()
                raise
            return pruner
        if frozen_base:
            raise ValueError("from_sparse needs total_steps with frozen_base: a frozen base keeps its zeros by itself")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConflictWarning)
            pruner = cls(model, optimizer, sparse_start.still(config), total_steps=1)
        try:
            zeros = sparse_start.hold_zeros(pruner.model, config, pruner.names, pruner.parameters, pruner.masks)
        except ValueError:
            pruner.detach()
            raise
        pruner.schedule = dataclasses.replace(pruner.schedule, final_ratio=1 - zeros / pruner.n_weights)
        return pruner

    # ---- the step ---------------------------------------------------------------------------------------------------

    def begin_step(self) -> Step:
        """See StepDriver: end the window and renew the masks, at the steps that ask for it."""
        self._settle()
        self._settled = True
        t, importance, masks, captured = self.step, self.importance, self.masks, self.slots.captured
        if captured is not None:
            captured.begin(self)
        gradients = self.score_gradients() if self.score_gradients is not None else None
        if gradients is not None and self.importance.rule.reads_moments:
            raise ValueError(
                f"criterion={self.config.criterion!r} reads the optimizer's moments, which are of the joint gradient: "
                f"use score_gradient='joint', or another criterion"
            )
        if gradients and gradients.keys().isdisjoint(self.names):
            raise ValueError(
                f"score_gradients names none of the pruned parameters: {next(iter(gradients))!r} is none, "
                f"{self.names[0]!r} is one"
            )
        due, alone = self.schedule.mask_due(t), len(self.slots) == 1
        one_pass = alone and gradients is None and self.before_mask is None and self.slots[0].one_pass
        if not masks.frozen:
            counted = None
            if importance.smoothed and t % self.config.delta_t == 0:
                counting = due and importance.constant_in_window and alone and not importance.at_once
                counted = importance.fold(t, masks.counting() if counting else None)
            if due and importance.scored_before_step:
                target = None if captured is None else captured.target(self)
                masks.renew(importance, self.schedule.remaining_ratio(t), t, counted, one_pass, target)
        final = masks.frozen or not due or importance.scored_before_step
        scored = t % self.config.importance_every == 0
        ends, due_next = one_pass and (t + 1) % self.config.delta_t == 0, self.schedule.mask_due(t + 1)
        masks_in_pass = masks.wanted(due) and final and self.before_mask is None
        return Step(t, gradients, scored, masks_in_pass, one_pass, ends, due_next)

    def end_step(self) -> None:
        """See StepDriver: choose masks that could not be chosen before, and zero what they prune."""
        t, importance, masks, captured = self.step, self.importance, self.masks, self.slots.captured
        due = self.schedule.mask_due(t)
        masks.settle(importance)
        if not masks.frozen:
            for slot in self.slots.begun:
                slot.count()
            if due and not importance.scored_before_step:
                target = None if captured is None else captured.target(self)
                masks.renew(importance, self.schedule.remaining_ratio(t), t, target=target)
            # One synchronisation, where an empty mask would otherwise stay for good.
            if due and self.schedule.selects_once(t) and bool(importance.known):
                self.freeze()
        masked = masks.wanted(due)
        if masked and self.before_mask is not None:
            self.before_mask()
        for slot in self.slots:
            slot.close(masked)
        if importance.clock is not None:
            importance.clock += 1
        if captured is None or not captured.end(masks):
            masks.applied = masked
            self.step += 1

    def replayed(self, kind: StepKind) -> None:
        """Note a step that a CUDA graph has taken, see StepGraphs: the device has counted it, the host has not."""
        t, masks = self.step, self.masks
        if kind.chooses:
            masks.chosen_for = masks.choice(self.importance, self.schedule.remaining_ratio(t), t)
        masks.applied = kind.zeroes
        self.step += 1

    # ---- what the user asks for -------------------------------------------------------------------------------------

    @torch.no_grad()
    def finalize(self) -> dict[str, Any]:
        """Select at the final sparsity, zero the pruned weights for good, verify: when training ends, early or not.

        It warns of a jump (training ended before the schedule came to its end), of a mask that was frozen before, and
        of tensors without any weight left. Of a model that is cut over ranks every rank calls this.

        Returns:
            What `verify` returns.

        Raises:
            RuntimeError: no gradient was ever seen, so no weight has a score; verification failed; inside masked_view.
        """
        self.masks.refuse_in_view("finalize is called")
        if self.slots.begun:
            self.slots.finish()
        before = sum(self.masks.pruned())
        if not self.masks.frozen:
            known = bool(self.importance.known)
            if not known and not self.importance.seen:
                raise RuntimeError("finalize: no gradient has been seen yet, so nothing is known about any weight")
            last_counts = known and self.masks.chosen_at(self.schedule.final_ratio)
            # A window that has just ended counts, as it would for the next step's mask.
            ends = self.importance.smoothed and self.importance.constant_in_window
            if not known or (ends and self.step % self.config.delta_t == 0 and not last_counts):
                self.importance.fold(self.step)
            if not last_counts or not self.importance.is_folded(self.step):
                self.masks.forget_choice()
                self.masks.renew(self.importance, self.schedule.final_ratio, self.step)
            self.freeze()
        for slot in self.slots:
            slot.apply_masks(slot.indices)
        self.masks.applied = True
        report = self.verify()
        pruned = dict(zip(self.names, zip(self.masks.pruned(), self.masks.scopes.sizes, strict=True), strict=True))
        for surprise in inspection.surprises(before, pruned, self.schedule, self.step):
            warnings.warn(surprise, stacklevel=3)  # past no_grad
        return report

    def freeze(self) -> None:
        """Fix the mask: from now on it never changes, pruned weights are zero after every step, importance rests.

        Raises:
            RuntimeError: there has been no mask yet, so nothing would ever be pruned.
        """
        self.slots.complete()
        if not self.masks.frozen and not (self.masks.chosen and self.importance.known):
            raise RuntimeError("freeze: no mask has been chosen yet, so no weight would ever be zero; train on to one")
        self.masks.frozen = True

    def mask(self, name: str) -> Tensor:
        """Boolean mask of one parameter (True = keep), of its shape, a DTensor where the parameter is one; a copy.

        Args:
            name: of the parameter, one of `names`.

        Raises:
            ValueError: the parameter is not pruned.
        """
        if name not in self.names:
            raise ValueError(f"{name!r} is not pruned; Pruner.names lists what is, such as {self.names[0]!r}")
        i = self.names.index(name)
        return like(self.parameters[i], self.masks.keep(i, local(self.parameters[i]).shape))

    def masked_view(self) -> AbstractContextManager[None]:
        """The masked model, within a `with`: the last mask is applied, and afterwards the weights are as they were.

        Under the "reference" policy weights train densely between masks, so an evaluation there would see an unpruned
        model. Weights come back bit for bit, on exceptions too; a step inside the view is refused.
        """
        self.slots.complete()
        return masked(self.model, self.parameters, self.masks)

    def stats(self) -> dict[str, Any]:
        """Statistics of the model and of its last selection; costs a few synchronisations. Every rank must ask.

        Returns:
            step; target_sparsity (what the schedule asks for at this step); ms (host time spent in pruning since the
            last call, in all steps together, the fused update apart); sparsity (share of the weights that the last mask
            prunes, 0 before the first); zeros (share that is zero now: between two masks weights may grow back);
            threshold (the score below which weights are pruned) or None; churn (share of mask bits the last selection
            flipped); nan (how many scores are NaN: kept); frozen (whether masks have ended); per_layer (name to share
            of zeros).
        """
        ms, self.slots.seconds = 1e3 * self.slots.seconds, 0.0
        target = 1 - self.schedule.remaining_ratio(self.step)
        found = inspection.stats(dict(zip(self.names, self.parameters, strict=True)), self.masks)
        return {"step": self.step, "target_sparsity": target, "ms": ms, **found}

    def plan(self) -> Plan:
        """What would happen, without doing it: pruned tensors, memory, schedule, conflicts."""
        parameters = dict(zip(self.names, self.parameters, strict=True))
        model_weights = sum(p.numel() for p in self.model.parameters())
        scopes, fits = self.masks.scopes, self.masks.fits
        about = (self.config, self.schedule, parameters, scopes, model_weights, fits)
        made = plan(*about, self.frozen_base, self.slots, self.importance.on_host)
        _, misfits = fitted(self.model, parameters, self.config)
        made["conflicts"] = [*misfits, *made["conflicts"]]
        if self.masks.fixed is not None:
            made["start_sparsity"] = made["points"][0][1]
        return made

    def verify(self) -> dict[str, Any]:
        """Check that the model, its optimizer and the masks agree. Every rank must ask.

        Returns:
            final_sparsity (what the schedule ends at; of a mask that was frozen, what it prunes); weights, zeros and
            kept (numbers of the prunable weights, of those that are zero now, and of mask bits that keep); sparsity
            (share that is zero now); masked (whether pruned weights are to be zero now); patterns (how many tensors
            have each, of those whose masks are to have it now).

        Raises:
            RuntimeError: they don't; every problem found is listed.
        """
        self.slots.complete()
        forget_gathered(self.model)
        parameters = dict(zip(self.names, self.parameters, strict=True))
        report = inspection.verify(self.model, parameters, self.masks, self.slots)
        target = 1 - self.schedule.final_ratio
        pruned = report["weights"] - report["kept"]
        if self.masks.frozen and pruned != sum(self.masks.scopes.n_prune(self.schedule.final_ratio)):
            target = pruned / report["weights"]
        return report | {"final_sparsity": target}

    def state_dict(self, full: bool = True) -> dict[str, Any]:
        """All that resuming needs, as plain data and tensors (not copied): never part of the optimizer's state.

        Args:
            full: put the states of sharded parameters together from all ranks, as one process has them: every rank
                asks, gets all, and any number of ranks can go on from it. False: this rank's parts alone; nothing is
                sent.
        """
        self._settle()
        self.slots.complete()
        state = checkpoint.gather(self.config, self.schedule.total, self.step, self.names, self.importance, self.masks)
        if full:
            state["tensors"] = states.whole(state["tensors"], self.names, self.parameters, self.masks.ranks)
        return state

    def load_state_dict(self, state: dict[str, Any], full: bool = True) -> None:
        """Go on from a state_dict of a Pruner of the same model and configuration, of any number of ranks.

        Args:
            state: the other Pruner's.
            full: False: it was made with full=False, from parts cut like those of this rank.

        Raises:
            ValueError: another configuration, other parameters or shapes, or values that no pruner can have; the
                message lists them, and nothing has changed.
        """
        self.masks.refuse_in_view("a state is loaded")
        self._settle()
        own = checkpoint.gather(self.config, self.schedule.total, self.step, self.names, self.importance, self.masks)
        if full and "tensors" in state:
            state = {**state, "tensors": states.parts(state["tensors"], self.names, self.parameters)}
        checkpoint.restore(state, own, self.masks)
        self.slots.forget()
        self.step, self._settled = state["step"], True
        self.importance.ahead = False
        if self.importance.clock is not None:
            self.importance.clock.fill_(self.step)
        if self.slots.captured is not None:
            self.slots.captured.forget()
        for slot in self.slots:
            if isinstance(slot, BaseSlot):
                slot.restored()
        if self.masks.fixed is not None and not self.frozen_base:
            self.schedule = sparse_start.from_there(self.schedule, self.masks)

    def save(self, path: str | Path, origin: Mapping[str, Any] | None = None) -> None:
        """Write the state to one safetensors file, aside and then renamed; contents are checked by hash on loading.

        Of sharded parameters every rank calls this, and one writes.

        Args:
            path: where to.
            origin: what the file belongs to, such as a run and a step of it; `load` compares it.

        Raises:
            OSError: the file can't be written; on the ranks that don't write a RuntimeError.
        """
        state = self.state_dict()
        self.masks.ranks.write(lambda: checkpoint.write(Path(path), state, origin))

    def load(self, path: str | Path, origin: Mapping[str, Any] | None = None) -> None:
        """Read what `save` wrote; when it is refused, nothing has changed.

        Args:
            path: the file.
            origin: what it must belong to; a file of an earlier version doesn't say, which is warned of.

        Raises:
            ValueError: a file that is damaged, foreign, of another origin or of another configuration.
        """
        self.load_state_dict(checkpoint.read(Path(path), origin))

    def detach(self) -> None:
        """Let go of the optimizers; the weights stay as they are."""
        for slot in self.slots:
            slot.detach()
