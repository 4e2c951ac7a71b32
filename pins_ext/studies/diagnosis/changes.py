"""How well a first-order model of the loss predicts what pruning does to it (the independence assumption).

The criterion of PINS (Ren & Zhu 2023) rests on a first-order expansion: with weights p and gradient g, zeroing a set Z
of weights changes the loss by

    zeroing          -sum_Z g p
    step and zeroing -sum_Z g p - lr sum_kept g g'     one step of SGD along the gradient g', then zeros
                     sum_i g (p_next - p)              the same for the step that the optimizer really made

Each weight counts for itself: a second-order model would add 1/2 sum_ij H_ij p_i p_j, curvature and interactions. Here
the prediction and the change that is really there are put side by side, on the same batches and without dropout, for
the masks of a running pruner and for random ones.

diagnosis = Diagnosis(pruner, loss=lambda batch: model(**batch).loss, batches=batches)
...                   # the training loop stays as it was, to the last bit
diagnosis.changes     # what was predicted and measured
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.pruning.pruner import Pruner
from pins_ext.studies.diagnosis.exchanges import Exchanges, difference_noise, draw, try_exchanges
from pins_ext.studies.diagnosis.fixed_loss import FixedLoss

FRACTIONS = (1 / 64, 1 / 16, 1 / 4)
"""Parts of the way to zero at which the loss is measured too: where they are predicted well, the gradient is right."""

_SEED_STRIDE = 1 << 20  # seeds of one step lie apart from those of the next


@dataclass(frozen=True)
class Change:
    """What zeroing one set of weights does to the loss, and what first order says it does.

    Attributes:
        step: optimizer step, from 1, that ends with this mask.
        kind: "criterion" or "random", a set of as many weights drawn at random.
        extent: "new", the weights that the last mask kept (random: drawn among those); "whole", all pruned weights
            (random: drawn among all); "step", the optimizer's step and then all pruned weights.
        weights: how many are zeroed.
        predicted: predicted change of the loss.
        measured: measured change of the loss.
        predicted_sgd: extent "step": the prediction if the step were one of SGD along the training gradient.
        fractions: criterion's "new" and "whole": measured change when the weights go only this part of their way.
        noise: standard deviation of a measured change from rounding alone.
    """

    step: int
    kind: str
    extent: str
    weights: int
    predicted: float
    measured: float
    predicted_sgd: float | None = None
    fractions: dict[float, float] | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class Observation:
    """One mask. loss: before it is applied. noise: standard deviation of a loss value from rounding alone."""

    step: int
    sparsity: float
    loss: float
    noise: float


@dataclass
class _Set:
    """Weights to zero: packed bits per tensor, and sums on the way to a Change."""

    kind: str
    extent: str
    bits: list[Tensor]
    weights: int
    predicted: float = 0.0
    after_step: float = 0.0
    after_sgd: float = 0.0


class Diagnosis:
    """Watches a pruner while it trains and measures some of its masks, in the moment before they are applied.

    Training is not disturbed: weights, gradients, random state and training flags come back to the last bit. For a
    moment there is one more copy of the prunable weights, and a gradient of one tensor at a time. All other weights
    have made their step already when a change is measured.

    Args:
        pruner: of the run.
        loss: loss of its model on one batch.
        batches: of equal size, to measure on.
        masks: new masks to look at, evenly spread over the run.
        random_masks: random sets per mask and extent.
        exchange_masks: of those masks, how many to try exchanges at; 0 none.
        exchanges: groups per stratum there.
        exchange_pairs: pairs of weights in a group; None: as few as stand out from rounding.
        seed: of everything drawn.
        report: called with a line that says what is under way.

    Attributes:
        steps: pruner steps (from 0) that will be looked at.
        changes: what was found so far.
        observations: likewise.
        exchanges: likewise.
    """

    def __init__(
        self,
        pruner: Pruner,
        loss: Callable[[Any], Tensor],
        batches: Sequence[Any],
        *,
        masks: int = 12,
        random_masks: int = 4,
        exchange_masks: int = 1,
        exchanges: int = 16,
        exchange_pairs: int | None = None,
        seed: int = 0,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.pruner, self.random_masks, self.seed, self.report = pruner, random_masks, seed, report
        self.groups, self.pairs = exchanges, exchange_pairs
        self.loss = FixedLoss(pruner.model, pruner.parameters, loss, batches)
        self.steps = spread([t for t in range(pruner.schedule.total) if pruner.schedule.is_new_mask(t)], masks)
        self.exchange_steps = spread(self.steps, exchange_masks)
        self.changes: list[Change] = []
        self.observations: list[Observation] = []
        self.exchanges: list[Exchanges] = []
        self._last = [ops.new_mask(p) for p in pruner.parameters]
        pruner.before_mask = self._before_mask
        optimizers = [slot.optimizer for slot in pruner.slots]
        self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def detach(self) -> None:
        """Let go of the pruner."""
        self.pruner.before_mask = None
        for handle in self._handles:
            handle.remove()

    # ---- when -------------------------------------------------------------------------------------------------------

    def _before_step(self, *_: Any) -> None:
        if self.pruner.step in self.steps and not self.loss.kept:
            self.loss.keep()

    def _before_mask(self) -> None:
        t = self.pruner.step
        if t in self.steps:
            with self.loss.undisturbed():
                self._observe(t)
        if self.pruner.schedule.is_new_mask(t):
            self._last = [bits.clone() for bits in self.pruner.masks.bits]

    def _observe(self, t: int) -> None:
        """Everything about the mask of step t. The weights have been stepped; those before the step are kept."""
        generator = torch.Generator().manual_seed(self.seed * _SEED_STRIDE + t)
        self.report(f"step {t + 1}  measuring this mask and {2 * self.random_masks} random ones")
        sets = self._sets(generator)
        # Back before the step, for a moment.
        self.loss.swap()
        before = self.loss.value()
        self._predict_step([s for s in sets if s.extent == "whole"])
        self.loss.swap()
        self.loss.keep()
        now, noise = self.loss.value(), self.loss.noise(generator)
        self._predict(sets)
        for s in sets:
            self._measure(s, t, now, now - before, difference_noise(noise))
        self.observations.append(Observation(t + 1, sets[1].weights / self.pruner.n_weights, now, noise))
        self.report(self._line())
        if t in self.exchange_steps:
            whole = [c for c in self.changes if c.step == t + 1 and c.extent == "whole"]
            random = [c.measured for c in whole if c.kind == "random"]
            strata = try_exchanges(
                self.pruner, self.loss, noise, generator, self.groups, self.pairs, lambda s: self.report(f"  {s}")
            )
            self.exchanges.append(Exchanges(t + 1, noise, whole[0].measured, math.fsum(random) / len(random), strata))

    def _line(self) -> str:
        """The last mask in a line."""
        seen = self.observations[-1]
        new, whole = (next(c for c in self.changes if (c.step, c.extent) == (seen.step, e)) for e in ("new", "whole"))
        return (
            f"step {seen.step}  loss {seen.loss:.4f}  {new.weights:,} newly pruned: predicted {new.predicted:+.2e}, "
            f"measured {new.measured:+.2e}  all {whole.weights:,}: {whole.predicted:+.2e}, {whole.measured:+.2e}"
        )

    # ---- what -------------------------------------------------------------------------------------------------------

    def _sets(self, generator: torch.Generator) -> list[_Set]:
        """The weights of the new mask, newly pruned and all, and random ones in the same numbers."""
        every = [ops.new_mask(p) for p in self.pruner.parameters]
        sets = []
        for extent, among in (("new", self._last), ("whole", every)):
            bits = [there & ~kept for there, kept in zip(among, self.pruner.masks.bits, strict=True)]
            sets.append(_Set("criterion", extent, bits, sum(int(self._chosen(bits, i).sum()) for i in self._places)))
        random = []
        for s, among in zip(sets, (self._last, every), strict=True):
            random += [
                _Set("random", s.extent, self._drawn(among, s.weights, generator), s.weights)
                for _ in range(self.random_masks)
            ]
        return sets + random

    @property
    def _places(self) -> range:
        return range(len(self.pruner.parameters))

    def _drawn(self, among: list[Tensor], n: int, generator: torch.Generator) -> list[Tensor]:
        sizes = [p.numel() for p in self.pruner.parameters]
        packed = []
        for p, at in zip(self.pruner.parameters, draw(among, sizes, n, generator), strict=True):
            chosen = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
            chosen[at] = True
            packed.append(ops.pack_bits(chosen))
        return packed

    def _chosen(self, bits: list[Tensor], i: int) -> Tensor:
        return ops.unpack_bits(bits[i], self.pruner.parameters[i].shape)

    # ---- predicted --------------------------------------------------------------------------------------------------

    def _predict(self, sets: Sequence[_Set]) -> None:
        """-sum g p over each set, at the weights as they are."""

        def visit(i: int, grad: Tensor) -> None:
            product = grad.double() * self.pruner.parameters[i].double()
            for s in sets:
                s.predicted -= float(torch.where(self._chosen(s.bits, i), product, 0.0).sum())

        self.loss.gradient(visit)

    def _predict_step(self, sets: Sequence[_Set]) -> None:
        """The step and the zeros after it, at the weights before the step; the kept weights are those after it."""
        rates = self._learning_rates()

        def visit(i: int, grad: Tensor) -> None:
            g, p, p_next = grad.double(), self.pruner.parameters[i].double(), self.loss.kept[i].double()
            training = self.loss.set_aside[i]
            descent = torch.zeros_like(g) if training is None else rates[i] * g * training.double()
            for s in sets:
                zeroed = self._chosen(s.bits, i)
                s.after_step += float((g * (p_next.masked_fill(zeroed, 0) - p)).sum())
                s.after_sgd -= float(torch.where(zeroed, g * p, descent).sum())

        self.loss.gradient(visit)

    def _learning_rates(self) -> dict[int, float]:
        """Learning rate of the step under way, by the tensor's place."""
        return {i: float(rate) for slot in self.pruner.slots for i, rate in slot.learning_rates().items()}

    # ---- measured ---------------------------------------------------------------------------------------------------

    def _measure(self, s: _Set, t: int, now: float, step_change: float, noise: float) -> None:
        """Add the changes of one set. step_change: what the optimizer's step alone did to the loss."""
        measured = self._loss_on_the_way(s, 1.0) - now
        fractions = None
        if s.kind == "criterion":
            fractions = {part: self._loss_on_the_way(s, part) - now for part in FRACTIONS}
        change = Change(t + 1, s.kind, s.extent, s.weights, s.predicted, measured, None, fractions, noise)
        self.changes.append(change)
        if s.extent == "whole":
            both = measured + step_change
            change = replace(change, extent="step", predicted=s.after_step, measured=both, predicted_sgd=s.after_sgd)
            self.changes.append(replace(change, fractions=None))

    @torch.no_grad()
    def _loss_on_the_way(self, s: _Set, part: float) -> float:
        """The loss when a set's weights have gone a part of their way to zero."""
        for i, p in enumerate(self.pruner.parameters):
            zeroed = self._chosen(s.bits, i)
            p.copy_(torch.where(zeroed, p * (1 - part) if part < 1 else torch.zeros_like(p), p))
        value = self.loss.value()
        self.loss.restore()
        return value


def spread(steps: Sequence[int], n: int) -> list[int]:
    """At most n of the steps, evenly spread; for one, that in the middle."""
    n = min(n, len(steps))
    return [steps[(2 * k + 1) * len(steps) // (2 * n)] for k in range(n)]
