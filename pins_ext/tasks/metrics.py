"""What is reported of a task, computed by scikit-learn and scipy from the model's raw outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sklearn_metrics

Metric = Callable[[NDArray[np.generic], NDArray[np.generic]], float]


def _correlation(function: Callable[..., tuple[float, float]]) -> Metric:
    def metric(labels: NDArray[np.generic], predictions: NDArray[np.generic]) -> float:
        # Undefined for a constant; such predictions follow nothing.
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return float(function(labels, predictions)[0])

    return metric


_pearson, _spearman = _correlation(stats.pearsonr), _correlation(stats.spearmanr)

METRICS: Mapping[str, Metric] = {
    "accuracy": lambda labels, ids: float(sklearn_metrics.accuracy_score(labels, ids)),
    "f1": lambda labels, ids: float(sklearn_metrics.f1_score(labels, ids, zero_division=0.0)),
    "macro_f1": lambda labels, ids: float(sklearn_metrics.f1_score(labels, ids, average="macro", zero_division=0.0)),
    "matthews_correlation": lambda labels, ids: float(sklearn_metrics.matthews_corrcoef(labels, ids)),
    "pearson": _pearson,
    "spearman": _spearman,
    "pearson_spearman": lambda labels, values: (_pearson(labels, values) + _spearman(labels, values)) / 2.0,
}
"""Name -> function of (labels, predicted ids or values). `f1` is that of class 1; larger is better in each."""


def evaluate(
    names: Sequence[str], outputs: NDArray[np.floating], labels: NDArray[np.generic], is_regression: bool
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
