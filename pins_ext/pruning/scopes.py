"""Which weights compete with each other, how many of them are pruned, and the bounds on a tensor's density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction

from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.schedule import n_prune


class Scopes:
    """The regions in which weights compete, and numbers of weights; nothing here reads a weight.

    Args:
        names: pruned parameters, in order.
        sizes: weights in each.
        config: scope, ties and densities.

    Attributes:
        regions: places in the list of the tensors of each region.
        least: lower bound of the number of kept weights, for each tensor.
        most: upper bound, for each tensor.
        bounded: whether any such bound was set.
        exact: whether precisely the wanted number of weights is pruned.

    Raises:
        ValueError: a pattern of a group or density that matches nothing, or densities that exclude the final sparsity.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], config: PruneConfig) -> None:
        self.sizes = list(sizes)
        self.exact = config.ties == "exact"
        self.regions = [tuple(members) for members in _groups(names, config)]
        low = _densities(names, config, "min_density", 0.0)
        high = _densities(names, config, "max_density", 1.0)
        self.least = [math.ceil(_decimal(d) * n) for d, n in zip(low, self.sizes, strict=True)]
        self.most = [math.floor(_decimal(d) * n) for d, n in zip(high, self.sizes, strict=True)]
        self.bounded = bool(config.min_density or config.max_density)
        for i, name in enumerate(names):
            if self.least[i] > self.most[i]:
                raise ValueError(f"{name}: min_density {low[i]} lies above max_density {high[i]}")
        for region, count in zip(self.regions, self.n_prune(1 - config.sparsity), strict=True):
            self._check_feasible(region, self.size(region) - count)

    @property
    def is_global(self) -> bool:
        """Whether all weights compete under one cutoff."""
        return len(self.regions) == 1 and not self.bounded

    def size(self, region: Sequence[int]) -> int:
        """Weights in a region."""
        return sum(self.sizes[i] for i in region)

    def n_prune(self, remaining_ratio: float) -> list[int]:
        """Weights to prune per region."""
        return [n_prune(self.size(region), remaining_ratio, self.exact) for region in self.regions]

    def _check_feasible(self, region: Sequence[int], keep: int) -> None:
        least, most = sum(self.least[i] for i in region), sum(self.most[i] for i in region)
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
