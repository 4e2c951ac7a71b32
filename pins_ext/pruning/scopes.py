"""From scores to thresholds: the scopes in which weights compete, and floors and ceilings on a tensor's density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.schedule import n_prune

Operands = tuple[str, list[Tensor], list[Tensor]]


def subset(layout: ops.Layout, tensors: Sequence[Tensor], indices: Sequence[int]) -> ops.Layout:
    """The layout of some of the tensors, at their own global indices."""
    if len(indices) == len(tensors):
        return layout
    part = ops.Layout.of([tensors[i] for i in indices])
    return ops.Layout(layout.places[list(indices)], part.chunks.to(layout.places.device), layout.total)


@dataclass(frozen=True)
class Region:
    """Tensors whose weights compete with each other. layout: theirs; indices: their places in the whole list."""

    indices: tuple[int, ...]
    layout: ops.Layout


class Selection:
    """Chooses the weights to prune at a remaining ratio; exact, without concatenating or sorting scores.

    Args:
        names, tensors: the pruned parameters in order. layout: their layout. config: scope, ties, densities.

    Raises:
        ValueError: a pattern of a group or density that matches nothing, or densities that exclude the final sparsity.
    """

    def __init__(
        self, names: Sequence[str], tensors: Sequence[Tensor], layout: ops.Layout, config: PruneConfig
    ) -> None:
        self.exact = config.ties == "exact"
        self.layout = layout
        self.sizes = [t.numel() for t in tensors]
        self.regions = [Region(tuple(i), subset(layout, tensors, i)) for i in _groups(names, config)]
        # Floors and ceilings also need each tensor alone.
        low = _densities(names, config, "min_density", 0.0)
        high = _densities(names, config, "max_density", 1.0)
        self.least = [math.ceil(_decimal(d) * n) for d, n in zip(low, self.sizes, strict=True)]
        self.most = [math.floor(_decimal(d) * n) for d, n in zip(high, self.sizes, strict=True)]
        self.bounded = bool(config.min_density or config.max_density)
        self._alone = [subset(layout, tensors, [i]) for i in range(len(tensors))] if self.bounded else []
        self._tensors = list(tensors)
        for i, name in enumerate(names):
            if self.least[i] > self.most[i]:
                raise ValueError(f"{name}: min_density {low[i]} lies above max_density {high[i]}")
        for region in self.regions:
            self._check_feasible(region, 1 - config.sparsity)

    @property
    def global_scope(self) -> bool:
        """Whether all weights compete under one threshold, so that a counting pass can ride on the fold."""
        return len(self.regions) == 1 and not self.bounded

    def n_prune(self, remaining_ratio: float) -> list[int]:
        """Weights to prune per region."""
        return [n_prune(self._size(region), remaining_ratio, self.exact) for region in self.regions]

    def thresholds(
        self, score: Operands, remaining_ratio: float, bracket: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor:
        """Threshold of each tensor, int64 [n, 2] or [1, 2] for all: (order key, tie index). See ops.py for its meaning.

        Args:
            score: kind and operands of the score. remaining_ratio: share kept.
            bracket, counts: a counting pass already made over all weights (global scope only).
        """
        wanted = self.n_prune(remaining_ratio)
        if self.global_scope:
            return self._select(self.regions[0], score, wanted[0], bracket, counts).reshape(1, 2)
        table = torch.zeros(len(self.sizes), 2, dtype=torch.int64, device=self.layout.places.device)
        for region, count in zip(self.regions, wanted, strict=True):
            if self.bounded:
                self._fill_bounded(region, score, count, table)
            else:
                table[list(region.indices)] = self._select(region, score, count)
        return table

    def _fill_bounded(self, region: Region, score: Operands, count: int, table: Tensor) -> None:
        """Each tensor keeps its own top `least`, then the best of the rest up to `most`, as one exact water level.

        Variable fixing on a monotone budget: where clamping every tensor's share at a common threshold keeps too many
        weights, the level must rise, so tensors below their floor stay there; and the other way round. Tensors so
        settled leave the competition with their own threshold, the others compete again.
        """
        free = list(region.indices)
        keep = self._size(region) - count
        keep = min(max(keep, sum(self.least[i] for i in free)), sum(self.most[i] for i in free))
        while free:
            part = Region(tuple(free), subset(self.layout, self._tensors, free))
            threshold = self._select(part, score, sum(self.sizes[i] for i in free) - keep)
            table[free] = threshold
            kept = dict(zip(free, self._kept(part, score, threshold), strict=True))
            low = [i for i in free if kept[i] < self.least[i]]
            high = [i for i in free if kept[i] > self.most[i]]
            missing = sum(self.least[i] - kept[i] for i in low)
            surplus = sum(kept[i] - self.most[i] for i in high)
            settled = (low if missing >= surplus else []) + (high if surplus >= missing else [])
            for i in settled:
                share = self.least[i] if kept[i] < self.least[i] else self.most[i]
                table[i] = self._select(Region((i,), self._alone[i]), score, self.sizes[i] - share)
                keep -= share
                free.remove(i)
            if missing == surplus:
                return

    def _select(
        self, region: Region, score: Operands, count: int, bracket: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor:
        kind, a, b = score
        target = torch.tensor(count).to(self.layout.places.device)
        a, b = ([x[i] for i in region.indices] if x else [] for x in (a, b))
        layout = region.layout
        return torch.ops.pins_ext.select(
            a, b, layout.places, layout.chunks, kind, target, self.exact, bracket=bracket, counts=counts
        )

    def _kept(self, region: Region, score: Operands, threshold: Tensor) -> list[int]:
        """Weights of each tensor that the threshold keeps; tensor by tensor, for one mask's worth of memory."""
        kind, a, b = score
        stats = torch.zeros(len(region.indices), 3, dtype=torch.int64, device=threshold.device)
        for row, i in zip(stats.split(1), region.indices, strict=True):
            layout, bits = self._alone[i], ops.new_mask(a[i])
            torch.ops.pins_ext.pack_(
                [bits], row, [a[i]], [b[i]] if b else [], layout.places, layout.chunks, kind, threshold.reshape(1, 2)
            )
        return stats[:, 0].tolist()

    def _size(self, region: Region) -> int:
        return sum(self.sizes[i] for i in region.indices)

    def _check_feasible(self, region: Region, remaining_ratio: float) -> None:
        keep = self._size(region) - n_prune(self._size(region), remaining_ratio, self.exact)
        least, most = sum(self.least[i] for i in region.indices), sum(self.most[i] for i in region.indices)
        if not least <= keep <= most:
            raise ValueError(
                f"the densities do not allow the final sparsity: {keep:,} weights are to be kept, "
                f"min_density asks for at least {least:,} and max_density allows at most {most:,}"
            )


def _groups(names: Sequence[str], config: PruneConfig) -> list[list[int]]:
    if config.scope == "global":
        return [list(range(len(names)))]
    if config.scope == "layer":
        return [[i] for i in range(len(names))]
    assert isinstance(config.scope, Mapping)
    rest = list(range(len(names)))
    groups = []
    for group, patterns in config.scope.items():
        members = [i for i in rest if any(fnmatchcase(names[i], p) for p in patterns)]
        if not members:
            raise ValueError(f"scope: the group {group!r} matches no pruned parameter that an earlier group left over")
        groups.append(members)
        rest = [i for i in rest if i not in members]
    return groups + ([rest] if rest else [])


def _decimal(density: float) -> Fraction:
    """The number as it was written: in binary 0.07 of 100 weights are a little more than 7, rounded up 8."""
    return Fraction(str(density))


def _densities(names: Sequence[str], config: PruneConfig, option: str, default: float) -> list[float]:
    """The density each name gets from the last pattern that matches it."""
    patterns = dict(getattr(config, option))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{option}: the pattern {pattern!r} matches no pruned parameter")
    return [next((d for p, d in reversed(list(patterns.items())) if fnmatchcase(name, p)), default) for name in names]
