"""The importance states of the pruned weights: window mean, running averages, and the score they make."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import check_codes, local, shard_of
from pins_ext.optim.step import Rate, Scaling, scalars_on
from pins_ext.pruning.bars import write_bars
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.kept import folds_at_once, state_names
from pins_ext.pruning.moments import Moments
from pins_ext.pruning.scores import Counted, Operands, own_score

_ACCUMULATE, _FOLD = 0, 1


def _float32(rate: Rate) -> Rate:
    """The rate that the kernels compute with; a tensor is left on its device."""
    return rate if isinstance(rate, Tensor) else float(struct.unpack("f", struct.pack("f", rate))[0])


class Importance:
    """States of n tensors, one each of the shape of this rank's part, and the operators that advance them.

    The states are made when they are first read: until training begins, a model may still be cut into shards.

    Args:
        parameters: the pruned tensors, DTensors or plain.
        config: which states there are.
        layout: of this rank's parts, where the states are.
        parts: see the attribute.
        ranks: the processes that hold the tensors.
        frozen_base: see Pruner.
        capturable: count the pruner's steps on the device, too.

    Attributes:
        at_once: whether `fold_at_once` takes the gradients, see folds_at_once.
        ipt: mean of the instant scores of the window under way (movement: their sum); empty for magnitude, and where
            scores are folded at once.
        exp_avg_ipt: running averages of importance; empty where unused.
        exp_avg_unc: running averages of its uncertainty; empty where unused.
        shadow: last unmasked value of every weight, for criteria that vanish at zero under strict masks; else empty.
        parts: tensors that are stepped, and by a gradient scaler skipped, together.
        accepted: per part, float32 [1]: gradients in this window so far.
        seen: bool [1], whether any step has brought a gradient that was not skipped.
        folded: bool [1], whether a window with such a step has ended; before that every average is zero.
        moments: reads the optimizers' moments, for criteria that are made of them.
        rule: what is known of the criterion.
        smoothed: whether the score is made of running averages.
        dtype: storage of the states.
        on_host: whether the states are on the host while the weights are elsewhere, see HostImportance.
        ahead: whether the last step's pass has ended the window already, so that the next `fold` has nothing to do.
        clock: int64 [], the pruner's step on the device, where it is counted there; else None.
    """

    moments: Callable[[], Moments]
    on_host = False

    def __init__(
        self,
        parameters: Sequence[Tensor],
        config: PruneConfig,
        layout: ops.Layout,
        parts: Sequence[Sequence[int]],
        ranks: Ranks,
        frozen_base: bool = False,
        capturable: bool = False,
    ) -> None:
        self.config, self.layout, self.ranks = config, layout, ranks
        # Worked out once: a step asks often.
        self.rule, self.smoothed, self.dtype = config.rule, config.smoothed, config.dtype
        self.at_once = frozen_base and folds_at_once(config)
        self._names = state_names(config, frozen_base)
        self.parameters = list(parameters)
        self._check_storage()
        device = layout.places.device
        self.parts = [(tuple(part), layout.subset(part)) for part in parts]
        self._pointers, self._kept = ops.PointerTables(), ops.KeptLists()
        self._seen_by_all = False
        self._barred: Sequence[Tensor] | None = None
        self.accepted = [torch.zeros(1, dtype=torch.float32, device=device) for _ in parts]
        self.seen = torch.zeros(1, dtype=torch.bool, device=device)
        self.folded = torch.zeros_like(self.seen)
        self.ahead = False
        self.clock = torch.zeros((), dtype=torch.int64, device=device) if capturable else None
        self._counted_ahead: Counted | None = None
        self._no_rounding = torch.zeros(2, dtype=torch.int64, device=device)

    @cached_property
    def _states(self) -> dict[str, list[Tensor]]:
        parts = [local(p) for p in self.parameters]
        kept = self._names
        self._check_storage()
        # Where a part lies matters to 8 bits alone.
        coded = self.dtype in ops.CODED
        shards = [shard_of(str(i), p) if coded else None for i, p in enumerate(self.parameters)]
        device = self.layout.places.device
        states = {
            name: [ops.new_state(p, self.dtype, shard, device) for p, shard in zip(parts, shards, strict=True)]
            for name in kept
            if name != "shadow"
        }
        states |= {"shadow": [p.detach().clone() for p in parts]} if "shadow" in kept else {}
        if self._barred is not None:
            write_bars(states, self.parameters, self._barred, self.smoothed)
        return states

    def _check_storage(self) -> None:
        if self.dtype not in ops.CODED:
            return
        for p in self.parameters:
            check_codes("state_dtype='8bit'", "a pruned parameter", p)

    def bar(self, masks: Sequence[Tensor]) -> None:
        """Mark the weights that these masks prune, for good: they score below all others, see write_bars.

        Args:
            masks: packed bits of each tensor.
        """
        self._barred, self.ahead = masks, False
        if "_states" in vars(self):
            write_bars(self._states, self.parameters, masks, self.smoothed)

    @property
    def ipt(self) -> list[Tensor]:
        """See the class."""
        return self._states.get("ipt", [])

    @property
    def exp_avg_ipt(self) -> list[Tensor]:
        """See the class."""
        return self._states.get("exp_avg_ipt", [])

    @property
    def exp_avg_unc(self) -> list[Tensor]:
        """See the class."""
        return self._states.get("exp_avg_unc", [])

    @property
    def shadow(self) -> list[Tensor]:
        """See the class."""
        return self._states.get("shadow", [])

    @property
    def criterion(self) -> str:
        """Name that the operators know."""
        return self.rule.name

    @property
    def scored_before_step(self) -> bool:
        """Whether the score at a step is known before its gradient: the mask can then ride on the optimizer's pass."""
        if self.smoothed:
            return self.config.beta2 != 0
        return not self.rule.instant

    @property
    def scores_after_step(self) -> bool:
        """Whether the criterion reads the updated weights."""
        return self.rule.reads_update

    @property
    def in_pass(self) -> bool:
        """Whether an optimizer's own kernel can compute the instant score."""
        return not callable(self.config.criterion)

    @property
    def constant_in_window(self) -> bool:
        """Whether the score changes only when a window ends."""
        return self.rule.reads_moments or (self.smoothed and self.config.beta2 != 0)

    @property
    def known(self) -> Tensor:
        """Bool [1], where the states are: whether the score tells weights apart; until then it is zero everywhere."""
        if not self.rule.instant and not self.rule.reads_moments:
            return torch.ones_like(self.seen)
        return self.folded if self.smoothed else self.seen

    def score(self) -> Operands:
        """What the score that the selection reads is made of."""
        return self._score()._replace(shapes=[local(p).shape for p in self.parameters])

    def _score(self) -> Operands:
        rule = self.rule
        if not self.smoothed and not rule.instant:
            moments = self.moments() if rule.reads_moments else None
            second, factors = (moments.exp_avg_sq, moments.factors[:, 2].contiguous()) if moments else ([], None)
            weights = list(self.shadow) or [local(p) for p in self.parameters]
            return Operands(rule.name, weights, second, factors)
        if not self.smoothed:
            return Operands("identity", self.ipt, [])
        if self.config.beta2 == 1:
            return Operands("identity", self.exp_avg_ipt, [])
        if self.config.beta2 == 0:
            return Operands("deviation", self.exp_avg_ipt, self.ipt)
        return Operands("product", self.exp_avg_ipt, self.exp_avg_unc)

    def accumulate(
        self,
        indices: Sequence[int],
        layout: ops.Layout,
        grads: list[Tensor],
        lr: Sequence[Rate],
        part: int,
        step: int,
        scaling: Scaling,
    ) -> None:
        """Take the gradients of one step into the window.

        Args:
            indices: which tensors.
            layout: theirs.
            grads: gradients, in the same order, dtype of the parameters.
            lr: learning rate of the coming step per tensor.
            part: which one they belong to.
            step: pruner step.
            scaling: gradient scaling under way.
        """
        weights, grads = self._operands(indices, grads, lr, scaling)
        rates = scalars_on(lr, layout.places.device).float()
        self._enter([self.ipt[i] for i in indices], weights, grads, layout, rates, part, step, scaling)

    def _operands(
        self, indices: Sequence[int], grads: list[Tensor], lr: Sequence[Rate], scaling: Scaling
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and gradients that make the instant scores; of a user's function, no weights and its scores."""
        shadow = self.shadow
        weights = [shadow[i] if shadow else local(self.parameters[i]) for i in indices]
        if not callable(self.config.criterion):
            return weights, grads
        return [], [self._own_score(*x, scaling) for x in zip(weights, grads, map(_float32, lr), strict=True)]

    def _enter(
        self,
        ipt: list[Tensor],
        weights: list[Tensor],
        grads: list[Tensor],
        layout: ops.Layout,
        rates: Tensor,
        part: int,
        step: int,
        scaling: Scaling,
    ) -> None:
        """Take instant scores into window means; see `_operands` for where these come from."""
        if callable(self.config.criterion):
            scaling = Scaling(found_inf=scaling.found_inf)
        use = ("accumulate", part)
        pointers = self._pointers.of(use, layout.places, ipt, weights, grads)
        torch.ops.pins_ext.accumulate_(
            *self._kept.of(use, ipt, weights),
            grads,
            layout.places,
            layout.chunks,
            rates,
            self.accepted[part],
            self.rng(step),
            self.criterion,
            grad_scale=scaling.grad_scale,
            clip=scaling.clip,
            found_inf=scaling.found_inf,
            pointers=pointers,
        )

    def fold_at_once(self, i: int, layout: ops.Layout, grad: Tensor, part: int, step: int, skipped: Tensor) -> None:
        """Advance a tensor's averages by a window of this gradient alone; its mean lives as long as the call.

        The averages are those that `fold` would make of it in the next step, to the last bit.

        Args:
            i: which tensor.
            layout: its own.
            grad: its gradient, dtype of the parameter.
            part: which one it belongs to.
            step: pruner step.
            skipped: float32 [1], 1 where the gradient is not finite: the averages stay as they are.
        """
        weights, grads = self._operands([i], [grad], [0.0], Scaling())
        self._fold_at_once(i, layout, weights, grads, part, step, skipped)

    def _fold_at_once(
        self,
        i: int,
        layout: ops.Layout,
        weights: list[Tensor],
        grads: list[Tensor],
        part: int,
        step: int,
        skipped: Tensor,
    ) -> None:
        p, device = self.parameters[i], layout.places.device
        shard = shard_of(str(i), p) if self.dtype in ops.CODED else None
        ipt = [ops.new_state(local(p), self.dtype, shard, device)]
        rates = torch.zeros(1, device=device)
        self._enter(ipt, weights, grads, layout, rates, part, step, Scaling(found_inf=skipped))
        mean, unc = [self.exp_avg_ipt[i]], [self.exp_avg_unc[i]] if self.exp_avg_unc else []
        rng, betas = self.rng(step + 1, stream=_FOLD), (self.config.beta1, self.config.beta2)
        ops.fold_(mean, unc, ipt, layout.places, layout.chunks, 1 - skipped, rng, *betas)

    def _own_score(self, p: Tensor, g: Tensor, lr: Any, scaling: Scaling) -> Tensor:
        g = g.float() if scaling.grad_scale is None else g.float() / scaling.grad_scale
        g = g if scaling.clip is None else g * scaling.clip
        return own_score(self.config.criterion, p, g, lr)

    def count_accepted(self, part: int, scaling: Scaling, scored: bool) -> None:
        """One more gradient in a part's window, unless it was not finite.

        Args:
            part: whose.
            scaling: of the step.
            scored: whether any weight on this rank had a gradient of its own; where experts are spread, not every rank
                has one in every step.
        """
        accepted = self.accepted[part]
        if not self._seen_by_all:
            scored = scored if self.ranks.alone else self.ranks.any(scored)
            self._seen_by_all = scored and scaling.found_inf is None
        finite = torch.ones_like(accepted) if scaling.found_inf is None else (scaling.found_inf == 0).float()
        accepted += finite
        if scored:
            self.seen |= finite > 0

    @property
    def folds_in_pass(self) -> bool:
        """Whether an optimizer's pass over all tensors can end their window: of one process."""
        averaged = self.smoothed and self.config.beta2 != 0 and self.rule.instant
        return averaged and self.in_pass and len(self.parts) == 1 and self.ranks.alone and not self.on_host

    def is_folded(self, step: int) -> bool:
        """Whether the averages hold a window that no mask was to see yet: that of the step before, which ended it."""
        ended = self.folds_in_pass and step % self.config.delta_t == 0
        return ended and not any(map(bool, self.accepted))

    def fold_keys(self, step: int) -> Tensor:
        """Keys of the stochastic rounding of a fold, int64 [2]; step: the first of the next window."""
        return self.rng(step, stream=_FOLD)

    def folded_in_pass(self, counted: Counted | None) -> None:
        """A pass has ended the window, its own gradient counted; counted: the new scores, see `fold`."""
        # Known is what the averages hold from the next step on: this one's mask has not seen them.
        for accepted in self.accepted:
            accepted.zero_()
        self.ahead, self._counted_ahead = True, counted

    def fold(self, step: int, counted: Counted | None = None) -> Counted | None:
        """End the window: advance the averages.

        Args:
            step: pruner step.
            counted: count the new scores in the same pass; needs all weights in one part, and a window mean.

        Returns:
            Counts of the new scores, see Selection.cutoffs; None where nothing was counted.
        """
        if self.ahead:
            self.ahead = False
            self.folded |= self.seen
            return self._counted_ahead
        for (indices, layout), accepted in zip(self.parts, self.accepted, strict=True):
            if self.at_once:
                pass  # the averages have it already
            elif counted is None or len(self.ranks.owned) == len(indices):
                self._fold(indices, layout, accepted, step, counted)
            else:
                # Another rank counts the tensors that it holds, too.
                others = [i for i in indices if not self.ranks.counts(i)]
                self._fold(self.ranks.owned, layout.subset(self.ranks.owned), accepted, step, counted)
                self._fold(others, layout.subset(others), accepted, step, None)
            accepted.zero_()
        self.folded |= self.seen
        return counted

    def _fold(
        self, indices: Sequence[int], layout: ops.Layout, accepted: Tensor, step: int, counted: Counted | None
    ) -> None:
        bracket, counts = counted or (None, None)
        averages = (
            [self.exp_avg_ipt[i] for i in indices],
            [self.exp_avg_unc[i] for i in indices] if self.exp_avg_unc else [],
        )
        tables = (layout.places, layout.chunks)
        rest = self._fold_arguments(accepted, step)
        use = ("fold", indices[0] if indices else None)
        if not self.rule.reads_moments:
            ipt = [self.ipt[i] for i in indices]
            pointers = self._pointers.of(use, layout.places, *averages, ipt)
            lists = self._kept.of(use, *averages, ipt)
            torch.ops.pins_ext.fold_(*lists, *tables, *rest, bracket=bracket, counts=counts, pointers=pointers)
            return
        moments = self.moments()
        weights, first, second = ([local(x[i]) for i in indices] for x in (self.parameters, *moments[:2]))
        factors = moments.factors
        if len(indices) < len(factors):
            chosen = torch.tensor(list(indices), dtype=torch.int64, device="cpu")
            factors = factors[ops.to_device(chosen, factors.device)]
        lists = (*averages, weights, first, second)
        pointers = self._pointers.of(use, layout.places, *lists)
        torch.ops.pins_ext.fold_moments_(
            *self._kept.of(use, *lists), *tables, factors, *rest, bracket=bracket, counts=counts, pointers=pointers
        )

    def _fold_arguments(self, accepted: Tensor, step: int) -> tuple[Tensor, Tensor, float, float]:
        return accepted, self.rng(step, stream=_FOLD), self.config.beta1, self.config.beta2

    def pass_scalars(self, part: int, step: int, rounds: bool) -> tuple[Tensor, Tensor]:
        """What an optimizer's pass over the weights asks for: gradients accepted so far, keys of stochastic rounding.

        Args:
            part: whose window.
            step: pruner step.
            rounds: whether weights or moments are rounded.
        """
        return self.accepted[part], self.rng(step, rounds)

    def rng(self, step: int, rounds: bool = False, stream: int = _ACCUMULATE) -> Tensor:
        """Keys of the rounding of one step, int64 [2]: of bfloat16 states, and of averages in 8 bits.

        Args:
            step: pruner step.
            rounds: whether something else is, in the same pass.
            stream: which of the step's passes.
        """
        shared = self.dtype in ops.CODED and stream == _FOLD
        if self.dtype != torch.bfloat16 and not rounds and not shared:
            return self._no_rounding
        seed, delta_t = self.config.seed, self.config.delta_t
        if self.clock is not None:
            return ops.fold_keys(self.clock // delta_t) if shared else ops.rounding_keys(seed, self.clock, stream)
        key = ops.fold_key(step // delta_t) if shared else ops.rounding_key(seed, step, stream)
        return ops.to_device(torch.tensor(key, device="cpu"), self.layout.places.device)

    def tensors(self) -> dict[str, list[Tensor]]:
        """The states by name, those that exist."""
        return {name: getattr(self, name) for name in self._names}
