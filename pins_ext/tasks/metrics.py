"""What is reported of a task, computed by the libraries of the field: scikit-learn and scipy, nervaluate, torchmetrics
and sacrebleu.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def evaluate_entities(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Computes micro-averaged f1, precision and recall of entities; boundaries and type must both be right (CoNLL).

    Args:
        gold: true IOB tags, a list for each sentence.
        found: predicted ones, as many for each sentence.
    """
    from nervaluate import Evaluator

    kinds = sorted({tag[2:] for tags in (*gold, *found) for tag in tags if tag != "O"})
    result = Evaluator([*map(list, gold)], [*map(list, found)], tags=kinds, loader="list").evaluate()
    # Releases before 1.0, the last ones for Python 3.10, return a tuple of dicts.
    strict = vars(result["overall"]["strict"]) if isinstance(result, dict) else result[0]["strict"]
    return {name: float(strict[name]) for name in ("f1", "precision", "recall")}


def evaluate_answers(found: Mapping[str, str], gold: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Computes f1 and exact match of answers as SQuAD does, from 0 to 100.

    Args:
        found: question -> answer, empty for none.
        gold: question -> right answers, none for an unanswerable one.
    """
    from torchmetrics.functional.text import squad

    answers: list[dict[str, str]] = [{"id": name, "prediction_text": text} for name, text in found.items()]
    # SQuAD 2 takes the empty answer as the right one of an unanswerable question; the library knows SQuAD 1 only.
    truth: list[Any] = [
        {"id": name, "answers": {"text": list(texts) or [""], "answer_start": []}} for name, texts in gold.items()
    ]
    result = squad(answers, truth)
    return {name: float(result[name]) for name in ("f1", "exact_match")}


def evaluate_texts(found: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Computes corpus BLEU from 0 to 100, every text against all its references, with sacrebleu's standard settings.

    Args:
        references: one list or more per text, of any lengths.
    """
    import sacrebleu

    most = max(map(len, references))
    # One stream per position; a text with fewer references has None there, which sacrebleu skips.
    streams: Any = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return {"bleu": float(sacrebleu.corpus_bleu(list(found), streams).score)}


def perplexity(total_loss: float, n_tokens: int) -> float:
    """Returns exp of the mean loss per token, infinity where that is beyond float64.

    Args:
        total_loss: summed cross-entropy in nats.
    """
    mean = total_loss / n_tokens
    return math.exp(mean) if mean < math.log(sys.float_info.max) or math.isnan(mean) else math.inf
