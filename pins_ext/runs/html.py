"""The HTML report of one run or several side by side: one self-contained file that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from html import escape
from typing import Any

from pins_ext.runs.charts import Picture, pictures
from pins_ext.runs.findings import comparison, no_better_than_baseline, size, standard_error
from pins_ext.runs.page import page
from pins_ext.runs.record import RunRecord, Timings

REPORT = "report.html"
NOTHING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def render(records: Sequence[RunRecord], title: str | None = None) -> str:
    """The report as HTML text.

    Args:
        records: one per run, as `read_record` returns them; several are drawn into the same axes.
        title: heading; by default the runs' model and task.
    """
    records = _distinct(records)
    heading = title or _heading(records)
    tasks = dict.fromkeys(record.data.task for record in records)
    apart = f"These runs are of several tasks ({', '.join(tasks)}): their scores and times are not to be compared."
    said = [apart if len(tasks) > 1 else "", *map(no_better_than_baseline, records), standard_error(records)]
    notes = [*filter(None, said), *(note for record in records for note in record.notes)]
    scores, *others = _figures(records)
    body = [
        f"<header><h1>{escape(heading)}</h1><p>{escape(_subtitle(records))}</p>{_finding(records)}</header>",
        _tiles(records[0]) if len(records) == 1 else "",
        f"<section><h2>Results</h2>{scores}{_results(records)}{_list(dict.fromkeys(notes))}</section>",
        f"<section><h2>Cost</h2>{_costs(records)}{_sizes(records)}</section>",
        _loading(records),
        f'<section><h2>Training</h2><div class="grid">{"".join(others)}</div></section>',
        "".join(_details(record) for record in records),
    ]
    return page(heading, "\n".join(body))


def _figures(records: Sequence[RunRecord]) -> list[str]:
    """The pictures as markup: that of the scores first, empty where there is none."""
    drawn = {p.title: p for p in pictures(records)}
    scores = drawn.pop("Scores", None)
    return [_figure(scores) if scores else "", *map(_figure, drawn.values())]


def _figure(picture: Picture) -> str:
    svg = picture.svg.replace("<svg", f'<svg role="img" aria-label="{escape(picture.told)}"', 1)
    caption = f"<figcaption><b>{escape(picture.title)}</b><span>{escape(picture.caption)}</span></figcaption>"
    return f"<figure>{caption}{svg}</figure>"


def _finding(records: Sequence[RunRecord]) -> str:
    said = comparison(records)
    return f'<p class="finding">{escape(said)}</p>' if said else ""


def percent(share: float | None, digits: int = 1) -> str:
    """A share as people read it: "80.0 %", or a dash for None."""
    return NOTHING if share is None else f"{100 * share:.{digits}f} %"


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
    several = len({record.data.task for record in records}) > 1
    task = ["task"] if several else []
    head = ["run", *task, *(name.removeprefix("eval_").replace("_", " ") for name in names), "sparsity", "zeros"]
    rows = []
    for record in records:
        final = record.final
        rows.append(
            [
                record.label,
                *([record.data.task] if several else []),
                *(_number(final.metrics.get(name)) for name in names),
                "dense" if final.sparsity is None else percent(final.sparsity, 2),
                f"{final.zeros:,}" if final.weights else NOTHING,
            ]
        )
    for data in {record.data.task: record.data for record in records if record.data.baseline}.values():
        row = [data.baseline_name, *([data.task] if several else [])]
        row += [_number(data.baseline.get(name)) for name in names]
        rows.append([*row, *[NOTHING] * (len(head) - len(row))])
    return _table("results", head, rows)


def _costs(records: Sequence[RunRecord]) -> str:
    """What a step took, and what the teacher of self-regularization added."""
    dense = {_trained_on(record): record.timings.step_ms for record in records[::-1] if not record.final.weights}
    head = ["run", "ms per step", "against dense", "of it pruning", "teacher", "teacher's memory", "peak memory"]
    rows = []
    for record in records:
        timings, teacher = record.timings, record.config.self_regularization
        step, peak = timings.step_ms, timings.peak_memory_mb
        without = dense.get(_trained_on(record))
        held = teacher.get("memory")
        memory = sum(n for n in held.values() if isinstance(n, (int, float))) if isinstance(held, Mapping) else 0
        rows.append(
            [
                record.label,
                f"{step:.0f}" if step else NOTHING,
                f"{step / without:.2f} {TIMES}" if step and without else NOTHING,
                percent(timings.pruning_share),
                _teacher(teacher, timings),
                _megabytes(memory),
                _megabytes(peak * 2**20 if peak else 0),
            ]
        )
    return _table("cost", head, rows)


def _trained_on(record: RunRecord) -> tuple[str, ...]:
    """What a step's time is of: only those of one model and one data set can be compared."""
    return record.model.name, record.data.task, record.data.source


def _teacher(settings: Mapping[str, Any], timings: Timings) -> str:
    if not settings or settings.get("teacher") == "none":
        return NOTHING
    forward = f", {timings.teacher_ms:.0f} ms per step" if timings.teacher_ms else ", one more forward pass"
    return f"{settings.get('teacher')}{forward}"


def _sizes(records: Sequence[RunRecord]) -> str:
    """Bytes on disk, dense and packed."""
    rows = []
    for record in records:
        found = size(record)
        if found is not None:
            whole = "the model" if record.model.weights else "the pruned tensors"
            smaller = f"{found.dense / found.packed:.1f} {TIMES}" if found.packed else NOTHING
            rows.append([record.label, whole, _megabytes(found.dense), _megabytes(found.packed), smaller])
    head = ["run", "on disk", "model.safetensors", "with save_sparse", "smaller"]
    return _table("size on disk", head, rows) if rows else ""


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count else NOTHING


def _loading(records: Sequence[RunRecord]) -> str:
    """The lines that load a result and make it small."""
    kind = next((record.model.auto_class for record in records if record.final.weights), "")
    if not kind.isidentifier():
        return ""
    lines = [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        'folder = "."  # the folder that holds metrics.json and model.safetensors',
        f"model = {kind}.from_pretrained(folder)  # its zeros are exact; pins_ext is not needed",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "",
        "import pins_ext",
        "",
        'pins_ext.save_sparse(model, "packed", tokenizer=tokenizer)  # a bit for each zero',
        'model = pins_ext.load_sparse("packed")',
    ]
    return f'<section><h2>Load it</h2><pre tabindex="0"><code>{escape(chr(10).join(lines))}</code></pre></section>'


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
            parts.append(f"<h3>{escape(part.replace('_', '-'))}</h3>{_table(part, ['setting', 'value'], rows)}")
    if tensors := record.final.tensors:
        rows = [
            [name, f"{tensor.weights:,}", f"{tensor.zeros:,}", percent(tensor.sparsity, 2)]
            for name, tensor in tensors.items()
        ]
        parts.append(f"<h3>tensors</h3>{_table('tensors', ['name', 'weights', 'zeros', 'sparsity'], rows)}")
    versions = " · ".join(f"{name} {version}" for name, version in record.versions.items())
    summary = f"Everything about {escape(record.label)}"
    return f"<details><summary>{summary}</summary>{''.join(parts)}<p>{escape(versions)}</p></details>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide; its name is for those who hear it."""
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{_row(row)}</tr>" for row in rows)
    frame = f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">'
    return f"{frame}<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _row(cells: Sequence[str]) -> str:
    first, *others = (escape(str(cell)) for cell in cells)
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others)


def _list(items: Iterable[str]) -> str:
    entries = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{entries}</ul>" if entries else ""
