"""Which weights compete with each other, how many of them are pruned, and the bounds on a tensor's density."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

from pins_ext.patterns import Fit
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.schedule import n_prune


@dataclass(frozen=True)
class Part:
    """Tensors of one region whose units compete with each other: weights, weights of groups N:M, or blocks of one size.

    Attributes:
        members: places in the list of the tensors.
        unit: weights in a unit.
        units: how many the tensors have, by place.
        fixed: those of them that are never pruned: the N of every group of M.
        least: lower bound of how many of the others are kept, by place.
        most: upper bound, by place.
        grouped: whether they are weights of groups N:M.
    """

    members: tuple[int, ...]
    unit: int
    units: Mapping[int, int]
    fixed: Mapping[int, int]
    least: Mapping[int, int]
    most: Mapping[int, int]
    grouped: bool

    @property
    def patterned(self) -> bool:
        """Whether these tensors have a pattern."""
        return self.grouped or self.unit > 1

    @property
    def free(self) -> int:
        """Units that can be pruned."""
        return sum(self.units[i] - self.fixed[i] for i in self.members)

    @property
    def weights(self) -> int:
        """Weights of these tensors."""
        return self.unit * sum(self.units[i] for i in self.members)


class Scopes:
    """The regions in which weights compete, and numbers of weights; nothing here reads a weight.

    A region is one part, unless some of its tensors have a pattern. Then, of the n weights to prune where at the end it
    will be n_end: groups N:M of E weights beside the N prune floor(E n / n_end), all E at the end; blocks of s weights
    prune as many as keep them at the share of all that is left, rounded down to whole blocks; tensors without a pattern
    what is left. What these cannot take goes to more blocks, and less than one block stays unpruned.

    Args:
        names: pruned parameters, in order.
        sizes: weights in each.
        config: scope, ties and densities.
        fits: the pattern of each; None: none has one.

    Attributes:
        regions: places in the list of the tensors of each region.
        parts: of all regions, region by region.
        least: lower bound of the number of kept weights, for each tensor.
        most: upper bound, for each tensor.
        bounded: whether any such bound was set.
        exact: whether precisely the wanted number of weights is pruned.
        names: see above.
        sizes: see above.
        fits: see above.

    Raises:
        ValueError: a pattern of a group or density that matches nothing, or densities or patterns that exclude the
            final sparsity.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], config: PruneConfig, fits: Sequence[Fit | None] | None = None
    ) -> None:
        self.names, self.sizes = list(names), list(sizes)
        self.fits = list(fits) if fits is not None else [None] * len(self.sizes)
        self.exact = config.ties == "exact"
        self.final_ratio = 1 - config.sparsity
        self.regions = [tuple(members) for members in _groups(names, config)]
        low = _densities(names, config, "min_density", 0.0)
        high = _densities(names, config, "max_density", 1.0)
        self.least = [math.ceil(_decimal(d) * n) for d, n in zip(low, self.sizes, strict=True)]
        self.most = [math.floor(_decimal(d) * n) for d, n in zip(high, self.sizes, strict=True)]
        self.bounded = bool(config.min_density or config.max_density)
        for i, name in enumerate(names):
            if self.least[i] > self.most[i]:
                raise ValueError(f"{name}: min_density {low[i]} lies above max_density {high[i]}")
            self._check_fixed(i, name)
        self._parts = [list(self._divided(region)) for region in self.regions]
        for region, parts in zip(self.regions, self._parts, strict=True):
            wanted = self._wanted(region, self.final_ratio)
            self._check_pattern(self.size(region), wanted, parts)
            for part, count in zip(parts, self._shares(parts, wanted, wanted), strict=True):
                self._check_feasible(part, part.free - count)

    @property
    def parts(self) -> list[Part]:
        """See the class."""
        return [part for parts in self._parts for part in parts]

    @property
    def is_global(self) -> bool:
        """Whether all weights compete under one cutoff."""
        return len(self.regions) == 1 and not self.bounded and not any(self.fits)

    def is_blocked(self, i: int) -> bool:
        """Whether blocks of this tensor are pruned whole."""
        fit = self.fits[i]
        return fit is not None and not fit.pattern.grouped

    def size(self, region: Sequence[int]) -> int:
        """Weights in a region."""
        return sum(self.sizes[i] for i in region)

    def n_prune(self, remaining_ratio: float) -> list[int]:
        """Weights to prune per region."""
        counts = iter(self.units_to_prune(remaining_ratio))
        return [sum(part.unit * next(counts) for part in parts) for parts in self._parts]

    def remainder(self, remaining_ratio: float) -> int:
        """Weights that the ratio asks to prune and that blocks, which go whole, leave."""
        return sum(self._wanted(region, remaining_ratio) for region in self.regions) - sum(
            self.n_prune(remaining_ratio)
        )

    def units_to_prune(self, remaining_ratio: float) -> list[int]:
        """Units to prune per part."""
        return [
            count
            for region, parts in zip(self.regions, self._parts, strict=True)
            for count in self._shares(
                parts, self._wanted(region, remaining_ratio), self._wanted(region, self.final_ratio)
            )
        ]

    def _wanted(self, region: Sequence[int], remaining_ratio: float) -> int:
        return n_prune(self.size(region), remaining_ratio, self.exact)

    def _divided(self, region: Sequence[int]) -> Iterator[Part]:
        """The parts of a region: groups, blocks by size with the largest first, weights."""
        of: dict[tuple[bool, int], list[int]] = {}
        for i in region:
            fit = self.fits[i]
            kind = (False, 1) if fit is None else (fit.pattern.grouped, math.prod(fit.pattern.block))
            of.setdefault(kind, []).append(i)
        for (grouped, unit), members in sorted(of.items(), reverse=True):
            fixed = {i: self._best(i) for i in members}
            yield Part(
                tuple(members),
                unit,
                {i: self.sizes[i] // unit for i in members},
                fixed,
                {i: max(0, -(-self.least[i] // unit) - fixed[i]) for i in members},
                {i: self.most[i] // unit - fixed[i] for i in members},
                grouped,
            )

    def _best(self, i: int) -> int:
        """Weights of a tensor that its groups N:M always keep."""
        fit = self.fits[i]
        return self.sizes[i] // fit.pattern.of * fit.pattern.keep if fit is not None and fit.pattern.grouped else 0

    @staticmethod
    def _shares(parts: Sequence[Part], wanted: int, at_the_end: int) -> list[int]:
        """Units to prune in each part of a region, of `wanted` weights; see the class."""
        if len(parts) == 1 and not parts[0].patterned:
            return [wanted]
        counts = [part.free * wanted // max(1, at_the_end) if part.grouped else 0 for part in parts]
        counts = [min(part.free, count) for part, count in zip(parts, counts, strict=True)]
        rest, others = wanted - sum(counts), sum(part.weights for part in parts if not part.grouped)
        left = rest
        for place, part in enumerate(parts):
            if not part.grouped:
                counts[place] = rest * part.weights // (others * part.unit) if part.patterned else min(part.free, left)
                left -= counts[place] * part.unit
        for place, part in enumerate(parts):
            if part.unit > 1:
                more = min(left // part.unit, part.free - counts[place])
                counts[place] += more
                left -= more * part.unit
        return counts

    def _check_fixed(self, i: int, name: str) -> None:
        fit = self.fits[i]
        if fit is None or not fit.pattern.grouped or self.least[i] <= self._best(i) <= self.most[i]:
            return
        raise ValueError(
            f"{name}: the pattern {fit.pattern.name} keeps {self._best(i):,} of its {self.sizes[i]:,} weights, and the "
            f"densities ask for {self.least[i]:,} to {self.most[i]:,}"
        )

    @staticmethod
    def _check_pattern(size: int, wanted: int, parts: Sequence[Part]) -> None:
        """Groups N:M prune a fixed number of weights; the others must be able to make up what is wanted beyond it."""
        if not any(part.patterned for part in parts):
            return
        fixed = sum(part.free for part in parts if part.grouped)
        most = fixed + sum(part.weights for part in parts if not part.grouped)
        if fixed <= wanted <= most:
            return
        exactly = f"exactly {fixed:,}" if fixed == most else f"{fixed:,} to {most:,}"
        shares = f"{fixed / size:.9g}" + ("" if fixed == most else f" to {most / size:.9g}")
        raise ValueError(
            f"the sparsity asks for {wanted:,} zeros among {size:,} weights, and with the pattern N:M there can be "
            f"{exactly}: set sparsity to {shares}, or give fewer tensors the pattern"
        )

    @staticmethod
    def _check_feasible(part: Part, keep: int) -> None:
        least, most = part.unit * sum(part.least.values()), part.unit * sum(part.most.values())
        if not least <= keep * part.unit <= most:
            raise ValueError(
                f"the densities do not allow the final sparsity: {keep * part.unit:,} weights are to be kept, "
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
