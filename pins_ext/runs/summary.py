"""What a run ends with on the terminal: the table of results, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pins_ext.runs.findings import no_better_than_baseline, standard_error, verdict
from pins_ext.runs.html import REPORT, percent
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
    said += filter(None, map(no_better_than_baseline, records))
    if said:
        console.print("\n".join([*said, ""]), soft_wrap=True)
    for record, folder in zip(records, folders, strict=True):
        console.print(f"{record.label:<14} {folder}", soft_wrap=True)
    if len(records) == 1:
        console.print(f"{'report':<14} {folders[0] / REPORT}", soft_wrap=True)


def budget(records: Sequence[RunRecord]) -> str:
    """What the runs had in common, and what one of them had more, in one sentence."""
    training = records[0].config.training
    steps = f"{records[0].total_steps:,} steps of {training['per_device_train_batch_size']}"
    regularized = [(record.label, record.config.self_regularization) for record in records]
    teachers = [f"{label} has self-regularization (teacher {s['teacher']})" for label, s in regularized if s]
    return "; ".join([f"Each: {steps}, learning rate {training.get('learning_rate', 5e-5):g}", *teachers]) + "."


def _score(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4f}"
