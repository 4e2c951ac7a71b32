"""The HTML report of one run or several side by side: one self-contained file that loads nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pins_ext.runs.charts import pictures

RECORD = "metrics.json"
REPORT = "report.html"
FORMAT = "pins-ext run"
NOTHING = "\N{EN DASH}"


class RecordError(ValueError):
    """A folder holds no readable record of a run."""


def read_record(folder: Path) -> dict[str, Any]:
    """The record (metrics.json) of a run.

    Raises:
        RecordError: there is none, or it was not written by this software.
    """
    file = folder / RECORD if folder.is_dir() else folder
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{folder} is not the folder of a run: it has no {RECORD}") from error
    except ValueError as error:
        raise RecordError(f"{file} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RecordError(f"{file} was not written by pins-ext train")
    return record


def render(records: Sequence[dict[str, Any]], title: str | None = None) -> str:
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
    notes = [*filter(None, [standard_error(records)]), *(note for r in records for note in r.get("notes", ()))]
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


def standard_error(records: Sequence[dict[str, Any]]) -> str:
    """How far an accuracy may be off, being measured on so many examples; nothing for other metrics."""
    errors, sizes = [], set()
    for record in records:
        score = record["final"].get("metrics", {}).get("eval_accuracy")
        n = record.get("data", {}).get("examples", {}).get("validation")
        if record["final"].get("metric") != "eval_accuracy" or score is None or not n:
            return ""
        errors.append(f"{100 * math.sqrt(score * (1 - score) / n):.1f}")
        sizes.add(n)
    if len(sizes) != 1:
        return ""
    low, high = min(errors, key=float), max(errors, key=float)
    size = low if low == high else f"{low} to {high}"
    return f"{sizes.pop():,} validation examples: an accuracy has a standard error of {size} points (binomial)"


def _distinct(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs with the same label get a number, so that a legend tells them apart."""
    labels = [record.get("label", "run") for record in records]
    seen: dict[str, int] = {}
    distinct = []
    for record, label in zip(records, labels, strict=True):
        seen[label] = seen.get(label, 0) + 1
        distinct.append({**record, "label": f"{label} ({seen[label]})" if labels.count(label) > 1 else label})
    return distinct


def _heading(records: Sequence[dict[str, Any]]) -> str:
    if len(records) == 1:
        return f"{records[0]['label']} on {records[0].get('data', {}).get('task', 'a task')}"
    tasks = dict.fromkeys(record.get("data", {}).get("task", "a task") for record in records)
    return f"{len(records)} runs on {', '.join(tasks)}"


def _subtitle(records: Sequence[dict[str, Any]]) -> str:
    models = dict.fromkeys(record.get("model", {}).get("name", "a model") for record in records)
    dates = sorted(record.get("created", "")[:10] for record in records)
    versions = dict.fromkeys(record.get("versions", {}).get("pins_ext", "") for record in records)
    return " · ".join(filter(None, [", ".join(models), dates[-1], f"pins_ext {', '.join(versions)}"]))


def _tiles(record: dict[str, Any]) -> str:
    final, data, timings = record["final"], record.get("data", {}), record.get("timings", {})
    metric = final.get("metric")
    tiles = []
    if metric and metric in final.get("metrics", {}):
        baseline = data.get("baseline", {}).get(metric)
        below = "" if baseline is None else f"{data['baseline_name']} {_number(baseline)}"
        tiles.append((_number(final["metrics"][metric]), metric.removeprefix("eval_"), below))
    if final.get("weights"):
        zeros = f"{final['zeros']:,} of {final['weights']:,} weights are zero"
        tiles.append((percent(final["zeros"] / final["weights"], 2), "sparsity", zeros))
    tiles.append((f"{record['total_steps']:,}", "steps", f"{timings.get('train_seconds', 0):.0f} s of training"))
    if timings.get("pruning_share") is not None:
        each = f"{timings['pruning_ms']:.1f} of {timings['step_ms']:.0f} ms"
        tiles.append((percent(timings["pruning_share"]), "of a step is pruning", each))
    cells = "".join(
        f"<div><b>{escape(a)}</b><span>{escape(b)}</span><small>{escape(c)}</small></div>" for a, b, c in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _results(records: Sequence[dict[str, Any]]) -> str:
    mains = [r["final"].get("metric") for r in records]
    found = dict.fromkeys(name for r in records for name in r["final"].get("metrics", {}) if _shown(name))
    names = sorted(found, key=lambda name: name not in mains)
    head = ["run", *(name.removeprefix("eval_") for name in names), "sparsity", "zeros", "ms per step", "pruning"]
    rows = []
    for record in records:
        final, timings = record["final"], record.get("timings", {})
        weights = final.get("weights")
        rows.append(
            [
                record["label"],
                *(_number(final["metrics"].get(name)) for name in names),
                percent(final["zeros"] / weights, 2) if weights else "dense",
                f"{final['zeros']:,}" if weights else NOTHING,
                f"{timings['step_ms']:.0f}" if timings.get("step_ms") else NOTHING,
                percent(timings.get("pruning_share")),
            ]
        )
    for data in {r["data"]["task"]: r["data"] for r in records if r.get("data", {}).get("baseline")}.values():
        row = [data["baseline_name"], *(_number(data["baseline"].get(name)) for name in names)]
        rows.append([*row, *[NOTHING] * (len(head) - len(row))])
    return _table(head, rows)


def _shown(metric: str) -> bool:
    return not metric.endswith(("runtime", "per_second", "epoch", "preparation_time", "sparsity"))


def _details(record: dict[str, Any]) -> str:
    """Settings, tensors and versions of a run, folded away."""
    config = record.get("config", {})
    parts = []
    for part in ("task", "pruning", "self_regularization", "training"):
        values = config.get(part)
        if values:
            rows = [
                [key.replace("_", "-"), _plain(value)]
                for key, value in values.items()
                if value not in (None, "", [], {})
            ]
            parts.append(f"<h3>{escape(part.replace('_', '-'))}</h3>{_table(['setting', 'value'], rows)}")
    tensors = record["final"].get("tensors") or {}
    if tensors:
        rows = [
            [name, f"{t['weights']:,}", f"{t['zeros']:,}", percent(t["zeros"] / t["weights"], 2)]
            for name, t in tensors.items()
        ]
        parts.append(f"<h3>tensors</h3>{_table(['name', 'weights', 'zeros', 'sparsity'], rows)}")
    versions = " · ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    summary = f"Everything about {escape(record['label'])}"
    return f"<details><summary>{summary}</summary>{''.join(parts)}<p>{escape(versions)}</p></details>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _number(value: Any) -> str:
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
