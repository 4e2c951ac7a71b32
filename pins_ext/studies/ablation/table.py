"""What the finished cells add up to: lines of a table, and the same as plain rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pins_ext.runs.record import RunRecord
from pins_ext.studies.ablation.cells import Cell, Row, text
from pins_ext.studies.ablation.overlap import non_zeros
from pins_ext.studies.ablation.spread import Difference, Spread

COSTS = ("train_seconds", "step_ms", "pruning_share", "peak_memory_mb")
"""Timings of a record that the table shows."""


@dataclass(frozen=True)
class Line:
    """A row of the table with its records.

    Attributes:
        records: of the finished cells, by seed.
        metric: the main one, as in the records.
        non_zeros: kept prunable weights, by seed.
    """

    row: Row
    records: Mapping[int, RunRecord]
    metric: str
    non_zeros: Mapping[int, int]

    def values(self, name: str) -> dict[int, float]:
        """A metric, a cost or a number of weights of each record that has it, by seed."""
        found = {seed: _measured(record).get(name) for seed, record in self.records.items()}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def spread(self, name: str) -> Spread | None:
        """Of a metric or a cost, over seeds."""
        return Spread.of(list(self.values(name).values()))


def lines_of(rows: Sequence[Row], records: Mapping[str, RunRecord]) -> list[Line]:
    """The rows that have finished cells.

    Args:
        records: of the finished cells, by the cell's name.
    """
    lines = []
    for row in rows:
        there = {seed: records[cell.name] for seed, cell in row.cells.items() if cell.name in records}
        if there:
            metric = next(iter(there.values())).final.metric
            kept = {seed: _kept(row.cells[seed], record, records) for seed, record in there.items()}
            lines.append(Line(row, there, metric, {seed: n for seed, n in kept.items() if n is not None}))
    return lines


def reference_of(line: Line, lines: Sequence[Line], reference: str) -> Line | None:
    """The reference method's line under the same combination; None for itself."""
    if line.row.method == reference:
        return None
    same = (each for each in lines if each.row.combination == line.row.combination)
    return next((each for each in same if each.row.method == reference), None)


def metric_names(records: Sequence[RunRecord]) -> list[str]:
    """Metrics of the task, on the evaluation and, where it was evaluated, the test set; the main one first."""
    names: dict[str, None] = dict.fromkeys(record.final.metric for record in records)
    for record in records:
        for name in (record.final.metric, *record.data.baseline):
            both = (name, f"test_{name.removeprefix('eval_')}")
            names |= dict.fromkeys(each for each in both if each in record.final.metrics)
    return list(names)


def flat(cells: Sequence[Cell], records: Mapping[str, RunRecord]) -> Iterator[dict[str, Any]]:
    """A row per finished cell with everything that was measured of it."""
    for cell in cells:
        record = records.get(cell.name)
        if record is None:
            continue
        axes = {name: text(value) for name, value in cell.axes.items()}
        kept = {"non_zeros": _kept(cell, record, records)}
        yield {"cell": cell.name, "method": cell.method, **axes, "seed": cell.seed, **_measured(record), **kept}


def aggregated(lines: Sequence[Line], reference: str) -> Iterator[dict[str, Any]]:
    """A row per line and measured quantity: mean, deviation, and the difference to the reference."""
    names = metric_names([record for line in lines for record in line.records.values()])
    for line in lines:
        other = reference_of(line, lines, reference)
        for name in (*names, *COSTS):
            spread = line.spread(name)
            if spread is None:
                continue
            gap = Difference.of(line.values(name), other.values(name)) if other else None
            yield {
                "method": line.row.method,
                **{axis: text(value) for axis, value in line.row.combination.items()},
                "quantity": name,
                "main_metric": name == line.metric,
                "mean": spread.mean,
                "standard_deviation": spread.deviation,
                "seeds": spread.n,
                "difference": gap.mean if gap else None,
                "difference_low": gap.low if gap else None,
                "difference_high": gap.high if gap else None,
                "paired_seeds": gap.n if gap else None,
            }


def _measured(record: RunRecord) -> dict[str, Any]:
    final = record.final
    return {
        **{name: final.metrics.get(name) for name in metric_names([record])},
        "zero_share": final.sparsity or 0.0,
        "zeros": final.zeros,
        "steps": record.total_steps,
        **{name: getattr(record.timings, name) for name in COSTS},
    }


def _kept(cell: Cell, record: RunRecord, records: Mapping[str, RunRecord]) -> int | None:
    """Prunable weights that are not zero. A dense run doesn't know which are prunable: counted as in a pruned one."""
    if record.final.weights:
        return record.final.weights - record.final.zeros
    pruned = (each for each in records.values() if each.final.weights and each.model == record.model)
    other = next(pruned, None)
    return None if other is None else non_zeros(cell.folder, other.final.tensors)
