"""What a run ends with on the terminal: the table of results, and where they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pins_ext.runs.html import REPORT, percent, standard_error
from pins_ext.runs.record import RunRecord

_NOTHING = "-"


def print_summary(records: Sequence[RunRecord], folders: Sequence[Path], console: Console) -> None:
    """One row per run and one for the baseline; then folders, and the verdict where methods were compared."""
    metric = records[0].final.metric
    name = metric.removeprefix("eval_").replace("_", " ")
    if not records[0].final.greater_is_better:
        name += " (lower is better)"
    test = f"test_{metric.removeprefix('eval_')}"
    tested = any(test in record.final.metrics for record in records)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run")
    total = max(record.final.weights for record in records)
    zeros = f"zeros of {total:,}" if total else "zeros"
    for column in (name, *(["on test"] if tested else []), "sparsity", zeros, "ms per step", "of it pruning"):
        table.add_column(column, justify="right")
    for record in records:
        final, timings = record.final, record.timings
        table.add_row(
            record.label,
            _score(final.metrics.get(metric)),
            *([_score(final.metrics.get(test))] if tested else []),
            "dense" if final.sparsity is None else percent(final.sparsity, 4),
            f"{final.zeros:,}" if final.weights else _NOTHING,
            _NOTHING if timings.step_ms is None else f"{timings.step_ms:.0f}",
            _NOTHING if timings.pruning_share is None else percent(timings.pruning_share),
        )
    data = records[0].data
    table.add_row(data.baseline_name, _score(data.baseline.get(metric)), *[_NOTHING] * (4 + tested))
    console.print()
    console.print(table)
    console.print()
    said = [verdict(records, metric), budget(records)] if len(records) > 1 else []
    if uncertainty := standard_error(records):
        said.append(f"{uncertainty}.")
    if said:
        console.print("\n".join([*said, ""]), soft_wrap=True)
    for record, folder in zip(records, folders, strict=True):
        console.print(f"{record.label:<14} {folder}", soft_wrap=True)
    if len(records) == 1:
        console.print(f"{'report':<14} {folders[0] / REPORT}", soft_wrap=True)


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


def budget(records: Sequence[RunRecord]) -> str:
    """What the runs had in common, and what one of them had more, in one sentence."""
    training = records[0].config.training
    steps = f"{records[0].total_steps:,} steps of {training['per_device_train_batch_size']}"
    regularized = [(record.label, record.config.self_regularization) for record in records]
    teachers = [f"{label} has self-regularization (teacher {s['teacher']})" for label, s in regularized if s]
    return "; ".join([f"Each: {steps}, learning rate {training.get('learning_rate', 5e-5):g}", *teachers]) + "."


def _score(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4f}"
