"""The HTML report of one run or several side by side: one self-contained file that loads nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from html import escape
from typing import Any

from pins_ext.runs.charts import pictures
from pins_ext.runs.record import RunRecord

REPORT = "report.html"
NOTHING = "\N{EN DASH}"


def render(records: Sequence[RunRecord], title: str | None = None) -> str:
    """The report as HTML text.

    Args:
        records: one per run, as `read_record` returns them; several are drawn into the same axes.
        title: heading; by default the runs' model and task.
    """
    records = _distinct(records)
    heading = title or _heading(records)
    figures = "".join(
        f"<figure><figcaption><b>{escape(p.title)}</b><span>{escape(p.caption)}</span></figcaption>{p.svg}</figure>"
        for p in pictures(records)
    )
    notes = [*filter(None, [standard_error(records)]), *(note for r in records for note in r.notes)]
    body = [
        f"<header><h1>{escape(heading)}</h1><p>{escape(_subtitle(records))}</p></header>",
        _tiles(records[0]) if len(records) == 1 else "",
        f"<section><h2>Results</h2>{_results(records)}{_list(dict.fromkeys(notes))}</section>",
        f'<section><h2>Training</h2><div class="grid">{figures}</div></section>',
        "".join(_details(record) for record in records),
    ]
    return _PAGE.format(title=escape(heading), style=_STYLE, body="\n".join(body))


def percent(share: float | None, digits: int = 1) -> str:
    """A share as people read it: "80.0 %", or a dash for None."""
    return NOTHING if share is None else f"{100 * share:.{digits}f} %"


def standard_error(records: Sequence[RunRecord]) -> str:
    """How far an accuracy may be off, being measured on so many examples; nothing for other metrics."""
    errors, sizes = [], set()
    for record in records:
        score, n = record.final.score, record.data.examples.get("validation")
        if record.final.metric != "eval_accuracy" or score is None or not 0 <= score <= 1 or not n:
            return ""
        errors.append(f"{100 * math.sqrt(score * (1 - score) / n):.1f}")
        sizes.add(n)
    if len(sizes) != 1:
        return ""
    low, high = min(errors, key=float), max(errors, key=float)
    size = low if low == high else f"{low} to {high}"
    return f"{sizes.pop():,} validation examples: an accuracy has a standard error of {size} points (binomial)"


def _distinct(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs with the same label get a number, so that a legend tells them apart."""
    labels = [record.label for record in records]
    seen: dict[str, int] = {}
    distinct = []
    for record, label in zip(records, labels, strict=True):
        seen[label] = seen.get(label, 0) + 1
        distinct.append(replace(record, label=f"{label} ({seen[label]})" if labels.count(label) > 1 else label))
    return distinct


def _heading(records: Sequence[RunRecord]) -> str:
    if len(records) == 1:
        return f"{records[0].label} on {records[0].data.task}"
    tasks = dict.fromkeys(record.data.task for record in records)
    return f"{len(records)} runs on {', '.join(tasks)}"


def _subtitle(records: Sequence[RunRecord]) -> str:
    models = dict.fromkeys(record.model.name for record in records)
    dates = sorted(record.created[:10] for record in records)
    versions = dict.fromkeys(record.versions.get("pins_ext", "") for record in records)
    return " · ".join(filter(None, [", ".join(models), dates[-1], f"pins_ext {', '.join(versions)}"]))


def _tiles(record: RunRecord) -> str:
    final, data, timings = record.final, record.data, record.timings
    tiles = []
    if final.metric in final.metrics:
        baseline = data.baseline.get(final.metric)
        below = "" if baseline is None else f"{data.baseline_name} {_number(baseline)}"
        tiles.append((_number(final.score), final.metric.removeprefix("eval_"), below))
    if final.sparsity is not None:
        zeros = f"{final.zeros:,} of {final.weights:,} weights are zero"
        tiles.append((percent(final.sparsity, 2), "sparsity", zeros))
    tiles.append((f"{record.total_steps:,}", "steps", f"{timings.train_seconds:.0f} s of training"))
    if timings.pruning_share is not None:
        each = f"{timings.pruning_ms or 0:.1f} of {timings.step_ms or 0:.0f} ms"
        tiles.append((percent(timings.pruning_share), "of a step is pruning", each))
    cells = "".join(
        f"<div><b>{escape(a)}</b><span>{escape(b)}</span><small>{escape(c)}</small></div>" for a, b, c in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _results(records: Sequence[RunRecord]) -> str:
    mains = [record.final.metric for record in records]
    found = dict.fromkeys(name for record in records for name in record.final.metrics if _shown(name))
    names = sorted(found, key=lambda name: name not in mains)
    head = ["run", *(name.removeprefix("eval_") for name in names), "sparsity", "zeros", "ms per step", "pruning"]
    rows = []
    for record in records:
        final, timings = record.final, record.timings
        rows.append(
            [
                record.label,
                *(_number(final.metrics.get(name)) for name in names),
                "dense" if final.sparsity is None else percent(final.sparsity, 2),
                f"{final.zeros:,}" if final.weights else NOTHING,
                NOTHING if timings.step_ms is None else f"{timings.step_ms:.0f}",
                percent(timings.pruning_share),
            ]
        )
    for data in {record.data.task: record.data for record in records if record.data.baseline}.values():
        row = [data.baseline_name, *(_number(data.baseline.get(name)) for name in names)]
        rows.append([*row, *[NOTHING] * (len(head) - len(row))])
    return _table(head, rows)


def _shown(metric: str) -> bool:
    return not metric.endswith(("runtime", "per_second", "epoch", "preparation_time", "sparsity"))


def _details(record: RunRecord) -> str:
    """Settings, tensors and versions of a run, folded away."""
    parts = []
    for part, values in asdict(record.config).items():
        rows = [
            [name.replace("_", "-"), _plain(value)] for name, value in values.items() if value not in (None, "", [], {})
        ]
        if rows:
            parts.append(f"<h3>{escape(part.replace('_', '-'))}</h3>{_table(['setting', 'value'], rows)}")
    if tensors := record.final.tensors:
        rows = [
            [name, f"{tensor.weights:,}", f"{tensor.zeros:,}", percent(tensor.sparsity, 2)]
            for name, tensor in tensors.items()
        ]
        parts.append(f"<h3>tensors</h3>{_table(['name', 'weights', 'zeros', 'sparsity'], rows)}")
    versions = " · ".join(f"{name} {version}" for name, version in record.versions.items())
    summary = f"Everything about {escape(record.label)}"
    return f"<details><summary>{summary}</summary>{''.join(parts)}<p>{escape(versions)}</p></details>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(items: Iterable[str]) -> str:
    entries = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{entries}</ul>" if entries else ""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = re.sub(
    r"\s*\n\s*",
    " ",
    """
    :root { color-scheme: light; }
    body { margin: 0; background: #f6f7f9; color: #1f2937;
      font: 15px/1.55 Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
    main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
    h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 4px; font-weight: 650; }
    h2 { font-size: 17px; margin: 36px 0 12px; font-weight: 600; }
    h3 { font-size: 13px; margin: 20px 0 6px; color: #4b5563; font-weight: 600; text-transform: capitalize; }
    header p { margin: 0; color: #6b7280; }
    .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 26px; }
    .tiles div, figure, .scroll, details { background: #fff; border: 1px solid #e5e7eb; border-radius: 10px; }
    .tiles div { padding: 16px 18px; }
    .tiles b { display: block; font-size: 26px; line-height: 1.2; font-weight: 650; letter-spacing: -0.01em;
      font-variant-numeric: tabular-nums; }
    .tiles span { display: block; color: #374151; }
    .tiles small { color: #6b7280; }
    .grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 14px; align-items: start; }
    figure { margin: 0; padding: 14px 16px 8px; }
    figcaption b { font-weight: 600; display: block; }
    figcaption span { color: #6b7280; font-size: 13px; }
    figure svg { display: block; width: 100%; height: auto; margin-top: 6px; }
    .scroll { overflow-x: auto; }
    table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
    th, td { text-align: right; padding: 8px 16px; white-space: nowrap; }
    th:first-child, td:first-child { text-align: left; }
    th { color: #6b7280; font-weight: 500; font-size: 13px; border-bottom: 1px solid #e5e7eb; }
    tbody tr + tr td { border-top: 1px solid #f1f3f5; }
    ul { color: #4b5563; padding-left: 20px; margin: 12px 0 0; }
    details { margin-top: 14px; padding: 12px 18px; }
    details table { font-size: 13px; }
    details td { white-space: normal; overflow-wrap: anywhere; padding: 5px 14px; }
    details p { color: #6b7280; font-size: 13px; }
    summary { cursor: pointer; font-weight: 600; }
    @media (max-width: 520px) { .grid { grid-template-columns: 1fr; } }
    @media print { body { background: #fff; } details { break-inside: avoid; } }
    """,
).strip()
