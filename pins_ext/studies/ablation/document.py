"""What a grid leaves on the disk: ablation.md with its picture, and the same numbers as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pins_ext.files.atomic import write_file
from pins_ext.runs.errors import CommandError
from pins_ext.runs.html import NOTHING, percent
from pins_ext.runs.record import RunRecord
from pins_ext.runs.tables import csv_text, markdown
from pins_ext.studies.ablation.cells import Cell, Row, text
from pins_ext.studies.ablation.chart import draw
from pins_ext.studies.ablation.grid import Flags, Grid
from pins_ext.studies.ablation.overlap import Pair, pairs_of
from pins_ext.studies.ablation.spread import CONFIDENCE, Difference, Spread
from pins_ext.studies.ablation.table import Line, aggregated, flat, lines_of, metric_names, reference_of

DOCUMENT = "ablation.md"
TABLE, CELLS, OVERLAP = "ablation.csv", "cells.csv", "overlap.csv"
PICTURE = "ablation.svg"

Table = list[list[str]]
"""Rows of text, the heading first."""


def write(root: Path, grid: Grid, rows: Sequence[Row], cells: Sequence[Cell], why_not: Mapping[str, str]) -> list[Line]:
    """Write every file from the cells that have finished.

    Args:
        why_not: the reason of each cell that has no result, by its name.

    Returns:
        The lines of the table.

    Raises:
        CommandError: no cell has finished.
    """
    records = {cell.name: record for cell in cells if (record := cell.record()) is not None}
    lines = lines_of(rows, records)
    if not lines:
        raise CommandError(f"{root} holds no finished cell of {grid.name}: there is nothing to report")
    try:
        pairs, problem = list(pairs_of(rows, records)), None
    except (CommandError, OSError) as error:
        pairs, problem = [], f"The masks could not be compared: {error}."
    draw(lines, grid.name, root / PICTURE)
    write_file(root / TABLE, csv_text(aggregated(lines, grid.reference)))
    write_file(root / CELLS, csv_text(flat(cells, records)))
    write_file(root / OVERLAP, csv_text(_overlap_rows(pairs)))
    sections = [
        f"# {grid.name}\n\n{grid.about}".rstrip(),
        f"![mean and standard deviation over seeds]({PICTURE})",
        f"## Results\n\n{markdown(results(lines, grid.reference))}\n\n{_reading(lines, grid)}",
        _every_metric(lines),
        f"## Cost\n\n{markdown(_costs(lines, grid.reference))}\n\n{_COST_NOTE}",
        problem or _overlap_section(pairs),
        _absent(why_not),
        _how(grid, list(records.values())),
    ]
    write_file(root / DOCUMENT, "\n\n".join(section for section in sections if section) + "\n")
    return lines


def results(lines: Sequence[Line], reference: str) -> Table:
    """Main metric, difference to the reference, final sparsity and number of non-zeros of every line."""
    axes = _axes(lines)
    metrics = list(dict.fromkeys(line.metric for line in lines))
    named = [metrics[0].removeprefix("eval_").replace("_", " ")] if len(metrics) == 1 else ["metric", "score"]
    head = [*axes, "method", *named, "seeds", f"against {reference}", "95 % interval", "final sparsity", "non-zeros"]
    table = [head]
    for line in lines:
        other = reference_of(line, lines, reference)
        gap = Difference.of(line.values(line.metric), other.values(line.metric)) if other else None
        score = line.spread(line.metric)
        zeros = line.spread("zero_share")
        table.append(
            [
                *_settings(line, axes),
                line.row.method,
                *([line.metric.removeprefix("eval_")] if len(metrics) > 1 else []),
                _spread(score, ".4f"),
                str(score.n) if score else "0",
                NOTHING if gap is None else f"{gap.mean:+.4f}",
                NOTHING if gap is None or gap.low is None else f"{gap.low:+.4f} to {gap.high:+.4f}",
                "dense" if zeros is None or zeros.mean == 0 else percent(zeros.mean, 2),
                _counts(line.non_zeros.values()),
            ]
        )
    return table


def _costs(lines: Sequence[Line], reference: str) -> Table:
    axes = _axes(lines)
    table = [
        [*axes, "method", "training, s", "ms per step", f"against {reference}", "of it pruning", "peak memory, MiB"]
    ]
    for line in lines:
        other, step, share = reference_of(line, lines, reference), line.spread("step_ms"), line.spread("pruning_share")
        base = other.spread("step_ms") if other else None
        table.append(
            [
                *_settings(line, axes),
                line.row.method,
                _spread(line.spread("train_seconds"), ".1f"),
                _spread(step, ".1f"),
                f"{step.mean / base.mean:.2f} x" if step and base else NOTHING,
                percent(share.mean) if share else NOTHING,
                _spread(line.spread("peak_memory_mb"), ",.0f"),
            ]
        )
    return table


def _every_metric(lines: Sequence[Line]) -> str:
    """All metrics, where there is more than the main one."""
    names = metric_names([record for line in lines for record in line.records.values()])
    if len(names) < 2:
        return ""
    axes = _axes(lines)
    table = [[*axes, "method", *(name.removeprefix("eval_").replace("_", " ") for name in names)]]
    table += [
        [*_settings(line, axes), line.row.method, *(_spread(line.spread(name), ".4f") for name in names)]
        for line in lines
    ]
    return f"## Every metric\n\n{markdown(table)}"


def _overlap_section(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return ""
    axes = list(pairs[0].combination)
    head = ["methods", "kept in common", "at random", "at random per tensor", "Jaccard", "at random"]
    table = [[*axes, *head]]
    for pair in pairs:
        shares = [overlap.shares() for overlap in pair.overlaps.values()]
        names = ("in_common", "in_common_at_random", "in_common_at_random_per_tensor", "jaccard", "jaccard_at_random")
        cells = [_spread(Spread.of([share[name] for share in shares]), ".4f") for name in names]
        values = [text(value) for value in pair.combination.values()]
        table.append([*values, f"{pair.first}, {pair.second}", *cells])
    return f"## Overlap of the final masks\n\n{markdown(table)}\n\n{_OVERLAP_NOTE}"


def _overlap_rows(pairs: Sequence[Pair]) -> Iterable[dict[str, Any]]:
    for pair in pairs:
        for seed, overlap in pair.overlaps.items():
            yield {
                **{name: text(value) for name, value in pair.combination.items()},
                "first": pair.first,
                "second": pair.second,
                "seed": seed,
                "weights": overlap.weights,
                "kept_by_first": overlap.first,
                "kept_by_second": overlap.second,
                "kept_by_both": overlap.common,
                **overlap.shares(),
            }


def _reading(lines: Sequence[Line], grid: Grid) -> str:
    baselines: dict[str, None] = {}
    for line in lines:
        data = next(iter(line.records.values())).data
        score = data.baseline.get(line.metric)
        if score is not None:
            baselines[f"{data.baseline_name} on {data.task} {score:.4f}"] = None
    seeds = ", ".join(map(str, grid.seeds))
    return (
        f"Mean ± standard deviation over seeds ({seeds}), on the evaluation set. Against {grid.reference}: mean of the "
        f"differences seed by seed, with the {percent(CONFIDENCE, 0)} confidence interval of a paired t-test; an "
        "interval that holds 0 shows no difference. Differences that are the same for every seed have no interval: "
        "they say nothing of other seeds. Non-zeros are those of the prunable weights."
        + (f" Without a model: {'; '.join(baselines)}." if baselines else "")
    )


_COST_NOTE = (
    "Each cell ran in a process of its own; peak memory is that process's largest resident set. Training includes "
    "evaluations on the way; a step is forward, backward and update. Times of a machine that did other work too are "
    "no measurement: compare them only where it was idle."
)

_OVERLAP_NOTE = (
    "Share of the weights one method keeps that the other keeps too, mean ± standard deviation over seeds; at random: "
    "what two masks of these sizes share if drawn from all weights, or within each tensor as many as they keep there. "
    "Jaccard: common weights over those that either keeps."
)


def _absent(why_not: Mapping[str, str]) -> str:
    if not why_not:
        return ""
    return f"## Cells without a result\n\n{markdown([('cell', 'why'), *why_not.items()])}"


def _how(grid: Grid, records: Sequence[RunRecord]) -> str:
    """Everything that is needed to run it again."""
    methods = [["method", "flags"], *([name, _flags(flags) or NOTHING] for name, flags in grid.methods.items())]
    facts = {
        "every run": _flags(grid.base),
        "varied": "; ".join(f"{name}: {', '.join(map(text, values))}" for name, values in grid.vary.items()),
        "model": _several(record.model.name for record in records),
        "data": _several(record.data.source for record in records),
        "machine": _several(f"{r.machine.device}, {r.machine.threads} threads" for r in records),
        "software": _several(
            ", ".join(f"{name} {version}" for name, version in record.versions.items()) for record in records
        ),
        "note": _several(note for record in records for note in record.notes),
    }
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
    return f"## How\n\n{listed}\n\n{markdown(methods)}"


def _several(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def _flags(flags: Flags) -> str:
    return ", ".join(f"{name} {text(value)}" for name, value in flags.items())


def _axes(lines: Sequence[Line]) -> list[str]:
    return list(lines[0].row.combination)


def _settings(line: Line, axes: Sequence[str]) -> list[str]:
    return [text(line.row.combination[name]) for name in axes]


def _spread(spread: Spread | None, form: str) -> str:
    if spread is None:
        return NOTHING
    mean = format(spread.mean, form)
    return mean if spread.deviation is None else f"{mean} ± {format(spread.deviation, form)}"


def _counts(counts: Iterable[int]) -> str:
    """A number that should be the same for every seed; its range where it is not."""
    found = sorted(counts)
    if not found:
        return NOTHING
    return f"{found[0]:,}" if found[0] == found[-1] else f"{found[0]:,} to {found[-1]:,}"
