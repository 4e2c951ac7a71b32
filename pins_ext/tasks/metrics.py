"""What is reported of a task, computed by scikit-learn and scipy from the model's raw outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.generic]


def _accuracy(labels: Values, ids: Values) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, ids))


def _f1(labels: Values, ids: Values, average: str = "binary") -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, ids, average=average, zero_division=0.0))


def _matthews_correlation(labels: Values, ids: Values) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, ids))


def _correlation(labels: Values, values: Values, kind: str) -> float:
    from scipy import stats

    # Undefined for a constant, which follows nothing.
    if np.ptp(labels) == 0 or np.ptp(values) == 0:
        return 0.0
    return float(getattr(stats, kind)(labels, values).statistic)


METRICS: Mapping[str, Callable[[Values, Values], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": lambda labels, ids: _f1(labels, ids, "macro"),
    "matthews_correlation": _matthews_correlation,
    "pearson": lambda labels, values: _correlation(labels, values, "pearsonr"),
    "spearman": lambda labels, values: _correlation(labels, values, "spearmanr"),
    "pearson_spearman": lambda labels, values: (
        (_correlation(labels, values, "pearsonr") + _correlation(labels, values, "spearmanr")) / 2.0
    ),
}
"""Name -> function of (labels, predicted ids or values). `f1` is that of class 1; larger is better in each."""


def evaluate(
    names: Sequence[str], outputs: NDArray[np.floating], labels: Values, is_regression: bool
) -> dict[str, float]:
    """Computes metrics from raw outputs. Outputs that are not finite make every metric NaN.

    Args:
        names: keys of METRICS.
        outputs: logits [examples, classes], or values [examples] or [examples, 1] for a regression.
        labels: int [examples], or float [examples] for a regression.
    """
    if not np.isfinite(outputs).all():
        return dict.fromkeys(names, math.nan)
    predictions = outputs.reshape(len(labels)) if is_regression else outputs.argmax(axis=-1)
    return {name: METRICS[name](labels, predictions) for name in names}
