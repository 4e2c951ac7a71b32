"""Statistics over seeds: mean and deviation, and the paired difference to a reference with its confidence interval."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95

_NO_VARIANCE = 1e-12
"""Differences of scores that are this close are the same, computed from other numbers."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample, n - 1) of n values; one value has no deviation."""

    mean: float
    deviation: float | None
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """None of no values."""
        if not values:
            return None
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Difference:
    """Mean difference to the reference over the n seeds that both have, and its confidence interval (t, paired).

    Attributes:
        low: lower end of the interval; None for a single seed, and for differences without variance: an interval of
            no width would read as proof, where a score of few examples merely took the same value twice.
        high: upper end, likewise.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @staticmethod
    def of(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
        """Paired by seed; None where no seed is in both."""
        seeds = sorted(values.keys() & reference.keys())
        if not seeds:
            return None
        gaps = [values[seed] - reference[seed] for seed in seeds]
        if max(gaps) - min(gaps) < _NO_VARIANCE:
            return Difference(statistics.fmean(gaps), None, None, len(seeds))
        from scipy.stats import ttest_rel

        test = ttest_rel([values[seed] for seed in seeds], [reference[seed] for seed in seeds])
        interval = test.confidence_interval(CONFIDENCE)
        return Difference(statistics.fmean(gaps), float(interval.low), float(interval.high), len(seeds))
