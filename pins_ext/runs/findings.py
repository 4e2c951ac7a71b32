"""What runs found, in sentences and numbers: who beat whom, how sure that is, what it takes on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from pins_ext.runs.record import RunRecord, TensorFacts

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CERTAINTY = 1.959964  # standard deviations that hold 95 % of a normal distribution


class Size(NamedTuple):
    """Bytes on disk: as ordinary tensors, and with a bit for each zero (`save_sparse`)."""

    dense: int
    packed: int


def score(record: RunRecord) -> float | None:
    """The run's main metric, None where there is no finite number."""
    value = record.final.score
    return value if value is not None and math.isfinite(value) else None


def interval(record: RunRecord) -> tuple[float, float] | None:
    """95 % interval of an accuracy by the examples it was measured on (Wilson 1927); None for other metrics."""
    value, n = score(record), record.data.examples.get("validation")
    if record.final.metric != "eval_accuracy" or value is None or not n or not 0 <= value <= 1:
        return None
    z = _CERTAINTY**2 / n
    middle = (value + z / 2) / (1 + z)
    reach = math.sqrt(value * (1 - value) * z + z * z / 4) / (1 + z)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def standard_error(records: Sequence[RunRecord]) -> str:
    """How far an accuracy may be off, being measured on so many examples: the 95 % interval's width over 2 · 1.96.

    Nothing for other metrics.
    """
    errors, sizes = [], set()
    for record in records:
        found = interval(record)
        if found is None:
            return ""
        errors.append(f"{100 * (found[1] - found[0]) / 2 / _CERTAINTY:.1f}")
        sizes.add(record.data.examples["validation"])
    if len(sizes) != 1:
        return ""
    low, high = min(errors, key=float), max(errors, key=float)
    size = low if low == high else f"{low} to {high}"
    return f"{sizes.pop():,} validation examples: an accuracy has a standard error of {size} points (Wilson)"


def comparison(records: Sequence[RunRecord]) -> str:
    """The verdict, where the runs are one dense, one pruned by magnitude and one by another criterion; else nothing."""
    dense = [record for record in records if not record.final.weights]
    pruned = [record for record in records if record.final.weights]
    magnitude = [record for record in pruned if record.config.pruning.get("criterion") == "magnitude"]
    method = [record for record in pruned if record not in magnitude]
    three = [*dense, *method, *magnitude]
    metrics = {(record.final.metric, record.data.task) for record in three}
    if not len(dense) == len(method) == len(magnitude) == len(metrics) == 1 or None in map(score, three):
        return ""
    return verdict(three, three[0].final.metric)


def verdict(records: Sequence[RunRecord], metric: str) -> str:
    """Whether the method beat magnitude pruning, and what it lost against dense, in one sentence.

    Args:
        records: of the dense run, the method's and that of magnitude pruning.
        metric: the main one.
    """
    dense, method, magnitude = records
    scores = [record.final.metrics.get(metric) for record in (method, magnitude, dense)]
    score, other, full = (math.nan if each is None else each for each in scores)
    if math.isnan(score + other + full):
        return f"{method.label} can't be compared: a score is not a number."
    points, greater = method.final.points, method.final.greater_is_better
    gap, lost = points * (score - other), points * (full - score)
    word = "beats" if (gap > 0 if greater else gap < 0) else "does not beat"
    direction = "" if greater else "; lower is better"
    compared = f"{word} {magnitude.label} ({gap:+.1f} points{direction})"
    if _nothing(gap):
        compared = f"equals {magnitude.label}"
    against = f"is {abs(lost):.1f} points {'below' if lost >= 0 else 'above'} dense"
    return f"{method.label} {compared} and {'equals dense' if _nothing(lost) else against}."


def _nothing(points: float) -> bool:
    """Whether a difference is none to the digit that is shown."""
    return float(f"{points:.1f}") == 0


def size(record: RunRecord) -> Size | None:
    """Bytes of the pruned tensors, of the whole model where the record knows its weights; None for a dense run."""
    tensors, each = record.final.tensors.values(), _BYTES.get(record.model.dtype)
    if not tensors or each is None or not all(tensor.shape for tensor in tensors):
        return None
    weights = sum(tensor.weights for tensor in tensors)
    rest = max(0, record.model.weights - weights) * each
    return Size(rest + weights * each, rest + sum(_packed(tensor, each) for tensor in tensors))


def _packed(tensor: TensorFacts, each: int) -> int:
    """Bytes of a tensor: a bit per weight, rows padded to bytes; an offset per row; the kept weights."""
    columns = tensor.shape[-1]
    rows = tensor.weights // columns if columns else 0
    return rows * -(-columns // 8) + 8 * (rows + 1) + (tensor.weights - tensor.zeros) * each


def no_better_than_baseline(record: RunRecord) -> str:
    """That a run learned nothing, and what to try; nothing where its score beats that of a prediction without a model.

    Args:
        record: of the run; its score is what the final model has on the validation set.
    """
    final, data = record.final, record.data
    score, baseline = final.score, data.baseline.get(final.metric)
    if score is None or baseline is None or (score > baseline if final.greater_is_better else score < baseline):
        return ""
    name = final.metric.removeprefix("eval_").replace("_", " ")
    less = ", a lower --sparsity" if final.weights else ""
    look = ", or look at the labels: pins-ext plan shows how they are distributed" if data.labels else ""
    return (
        f"{record.label}: {name} {score:.4f} is no better than {data.baseline_name}, which needs no model and has "
        f"{baseline:.4f}. Try more steps (--num-train-epochs), another --learning-rate{less}{look}."
    )
