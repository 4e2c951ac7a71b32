"""How far a mask is from the best of small exchanges: a kept weight goes, a pruned one returns, the loss is measured.

What it shows: on fixed batches and at this moment of training, how many exchanges of groups of weights would have
lowered the loss, and by how much. If the criterion ordered the weights perfectly and they acted independently, no
exchange would lower it. What it does not show: that training would end better with the exchanged mask, since what is
kept goes on learning; nor a bound on all masks, since a sample is tried; and the best of many is chosen on the same
batches, so its gain is an optimistic one. Weights come back with the values they had before the mask.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.pruning.pruner import Pruner
from pins_ext.pruning.units import values as scores_of
from pins_ext.studies.diagnosis.fixed_loss import FixedLoss

STRATA = ("near", "anywhere")
"""near: the kept and the pruned weights nearest to the threshold; anywhere: drawn evenly from all kept and pruned."""

_FIRST_PAIRS, _GROWTH, _TRIALS = 16, 4, 3
_STANDS_OUT = 5.0
"""A group is large enough when the median change of a few trials is this many times its rounding noise."""


@dataclass(frozen=True)
class Exchange:
    """One exchange. predicted, measured: change of the loss; predicted by the gradient at the masked weights."""

    predicted: float
    measured: float


@dataclass(frozen=True)
class Stratum:
    """Exchanges of groups of one kind.

    Attributes:
        name: one of STRATA.
        pairs: in each group.
        groups: the exchanges.
        together: change of the loss when all groups are exchanged at once: with independent weights, their sum.
        lowering_together: the same for those groups alone that lower the loss; None where there is none.
    """

    name: str
    pairs: int
    groups: tuple[Exchange, ...]
    together: float
    lowering_together: float | None

    @property
    def total(self) -> float:
        """Sum of the groups' own changes."""
        return math.fsum(group.measured for group in self.groups)

    @property
    def lowering(self) -> tuple[Exchange, ...]:
        """The groups that lower the loss."""
        return tuple(group for group in self.groups if group.measured < 0)

    @property
    def best(self) -> float:
        """The lowest change: below zero, the best gain found."""
        return min(group.measured for group in self.groups)

    def clear(self, noise: float) -> int:
        """Groups that lower the loss by more than twice the noise of a difference."""
        return sum(group.measured < -2 * difference_noise(noise) for group in self.groups)


@dataclass(frozen=True)
class Exchanges:
    """All exchanges tried at one mask.

    Attributes:
        step: optimizer step, from 1.
        noise: of a loss value.
        mask_change: what this mask does to the loss.
        random_change: what random masks of its size do to it on average.
        strata: by kind.
    """

    step: int
    noise: float
    mask_change: float
    random_change: float
    strata: tuple[Stratum, ...]


def difference_noise(noise: float) -> float:
    """Standard deviation of the difference of two losses, from that of one."""
    return math.sqrt(2) * noise


def draw(bits: Sequence[Tensor], sizes: Sequence[int], n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw n weights among those whose bit is set; every tensor gives the same share of its own, to the rounding.

    Args:
        bits: packed, per tensor.
        sizes: weights per tensor.
        n: at most as many as there are.

    Yields:
        Per tensor the flat indices drawn, int64 on the bits' device, in random order.
    """
    live = [int(ops.unpack_bits(b, (size,)).sum()) for b, size in zip(bits, sizes, strict=True)]
    total, seen = max(sum(live), 1), 0
    for b, size, there in zip(bits, sizes, live, strict=True):
        count = (seen + there) * n // total - seen * n // total
        seen += there
        chosen = torch.randperm(there, generator=generator)[:count].to(b.device)
        yield ops.unpack_bits(b, (size,)).nonzero().flatten()[chosen]


class Exchanger:
    """Tries exchanges on a model whose mask has just been applied.

    Args:
        pruner: whose masks and scores.
        loss: its weights are masked; those it keeps are not.
        noise: of a loss value.
        generator: for what is drawn.
    """

    def __init__(self, pruner: Pruner, loss: FixedLoss, noise: float, generator: torch.Generator) -> None:
        self.pruner, self.loss, self.noise, self.generator = pruner, loss, noise, generator
        self.sizes = [p.numel() for p in loss.parameters]
        self.bases = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        pruned = [ops.new_mask(p) & ~bits for p, bits in zip(loss.parameters, pruner.masks.bits, strict=True)]
        self.sides = (pruner.masks.bits, pruned)
        n_kept = sum(int(ops.unpack_bits(b, (n,)).sum()) for b, n in zip(pruner.masks.bits, self.sizes, strict=True))
        self.most = min(n_kept, sum(self.sizes) - n_kept)
        self.base = loss.value()

    def stratum(self, name: str, groups: int, pairs: int | None) -> Stratum | None:
        """Exchange group after group, then all at once.

        Args:
            name: one of STRATA.
            groups: how many.
            pairs: in each, fewer where there are not so many; None: as few as stand out from rounding.

        Returns:
            What was found; None where the mask keeps or prunes fewer weights than there are groups.
        """
        limit = self.most // groups
        if not limit:
            return None
        pairs = min(pairs, limit) if pairs is not None else self._measurable(name, groups, limit)
        leaving, entering = self._sample(name, groups * pairs)
        slopes = self._slopes(leaving, entering)
        found = []
        for k in range(groups):
            part = slice(k * pairs, (k + 1) * pairs)
            predicted = float(slopes[1][part].sum() - slopes[0][part].sum())
            found.append(Exchange(predicted, self._change(leaving[part], entering[part])))
        together = self._change(leaving, entering)
        lower = torch.tensor([group.measured < 0 for group in found]).repeat_interleave(pairs)
        gain = self._change(leaving[lower], entering[lower]) if bool(lower.any()) else None
        return Stratum(name, pairs, tuple(found), together, gain)

    def _measurable(self, name: str, groups: int, limit: int) -> int:
        pairs = min(_FIRST_PAIRS, limit)
        while pairs < limit:
            leaving, entering = self._sample(name, groups * pairs)
            parts = [slice(k * pairs, (k + 1) * pairs) for k in range(min(_TRIALS, groups))]
            changes = [abs(self._change(leaving[part], entering[part])) for part in parts]
            if statistics.median(changes) >= _STANDS_OUT * difference_noise(self.noise):
                break
            pairs = min(pairs * _GROWTH, limit)
        return pairs

    # ---- which ------------------------------------------------------------------------------------------------------

    def _sample(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        """Global flat indices of kept and of pruned weights, int64 [count] each, in random order."""
        if name == "near":
            sides = self._nearest(count)
        else:
            parts = [draw(bits, self.sizes, count, self.generator) for bits in self.sides]
            sides = [torch.cat([base + at.cpu() for base, at in zip(self.bases, part, strict=True)]) for part in parts]
        leaving, entering = (side[torch.randperm(count, generator=self.generator)] for side in sides)
        return leaving, entering

    def _nearest(self, count: int) -> list[Tensor]:
        """Of the kept and of the pruned weights those whose scores are nearest to the threshold of their tensor."""
        operands = self.pruner.importance.score()
        if operands.kind == "magnitude" and not self.pruner.importance.shadow:
            operands = operands._replace(a=self.loss.kept)
        thresholds = ops.score_of_key(self.pruner.masks.cutoff).double()
        found = [(torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)) for _ in self.sides]
        for i, (base, size) in enumerate(zip(self.bases, self.sizes, strict=True)):
            score = scores_of(operands, i).double().flatten()
            distance = (score - thresholds[i if len(thresholds) > 1 else 0]).abs().nan_to_num(nan=math.inf)
            for side, bits in enumerate(self.sides):
                at = ops.unpack_bits(bits[i], (size,)).nonzero().flatten()
                values, order = distance[at].topk(min(count, len(at)), largest=False)
                values = torch.cat([found[side][0], values.cpu()])
                places = torch.cat([found[side][1], base + at[order].cpu()])
                values, order = values.topk(min(count, len(values)), largest=False)
                found[side] = values, places[order]
        return [places for _, places in found]

    # ---- what it does -----------------------------------------------------------------------------------------------

    def _slopes(self, leaving: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
        """g p of each weight, float64: g at the masked weights, p the value it has when it is there."""
        sides = [(places, torch.zeros(len(places), dtype=torch.float64)) for places in (leaving, entering)]

        def visit(i: int, grad: Tensor) -> None:
            for places, slopes in sides:
                here, at = self._within(i, places)
                product = grad.flatten()[at].double() * self.loss.kept[i].flatten()[at].double()
                slopes[here] += product.cpu()

        self.loss.gradient(visit)
        return sides[0][1], sides[1][1]

    def _change(self, leaving: Tensor, entering: Tensor) -> float:
        self._put(leaving, alive=False)
        self._put(entering, alive=True)
        change = self.loss.value() - self.base
        self._put(leaving, alive=True)
        self._put(entering, alive=False)
        return change

    @torch.no_grad()
    def _put(self, places: Tensor, alive: bool) -> None:
        """Give weights the value they had before the mask, or zero."""
        for i, (p, kept) in enumerate(zip(self.loss.parameters, self.loss.kept, strict=True)):
            _, at = self._within(i, places)
            p.view(-1)[at] = kept.view(-1)[at] if alive else 0.0

    def _within(self, i: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the global indices lie in tensor i, and where there, on its device."""
        here = (places >= self.bases[i]) & (places < self.bases[i] + self.sizes[i])
        return here, (places[here] - self.bases[i]).to(self.loss.parameters[i].device)


def try_exchanges(
    pruner: Pruner,
    loss: FixedLoss,
    noise: float,
    generator: torch.Generator,
    groups: int,
    pairs: int | None,
    report: Callable[[str], None],
) -> tuple[Stratum, ...]:
    """Mask the weights, try exchanges in every stratum; the weights come back by `loss.restore`.

    Args:
        noise: see Exchanger.
        generator: see Exchanger.
        groups: see Exchanger.stratum.
        pairs: see Exchanger.stratum.
        report: told what is under way.
    """
    with torch.no_grad():
        for p, bits in zip(loss.parameters, pruner.masks.bits, strict=True):
            p.masked_fill_(~ops.unpack_bits(bits, p.shape), 0)
    exchanger = Exchanger(pruner, loss, noise, generator)
    strata = []
    for name in STRATA:
        report(f"exchanging {groups} groups of weights {'near the threshold' if name == 'near' else name}")
        strata.append(exchanger.stratum(name, groups, pairs))
    loss.restore()
    return tuple(stratum for stratum in strata if stratum is not None)
