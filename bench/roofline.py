"""The picture of a run: counted bytes per second under the measured bandwidths, and steps beside torch's AdamW."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pins_ext.runs.svg import COLORS

from .records import Record, Run
from .targets import AVERAGE, MASK, TIMES, main_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, ACCENT, _, _, _, PEER = COLORS
_INK, _SOFT, GRID = "#1f2937", "#6b7280", "#e8ebef"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.color": _SOFT,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "svg.hashsalt": "pins_ext",
}
# Bytes per step that must move, over those of a plain AdamW: what no implementation of ours can beat.
_FLOORS = {AVERAGE: 37.7 / 28, MASK: 44 / 28}
_BAR = 0.62


def draw(run: Run, path: Path) -> bool:
    """Write the picture; the file's ending chooses the format. False, and no file, if the run has nothing to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kernels, steps = _kernels(run.records), _steps(run.records)
    if not kernels and not steps:
        return False
    rows = max(len(kernels), len(steps), 4)
    with rc_context(STYLE):
        figure = Figure(figsize=(11.5 if kernels and steps else 6.5, 1.5 + 0.3 * rows), layout="constrained")
        panels = [panel for panel in ((_draw_kernels, kernels), (_draw_steps, steps)) if panel[1]]
        for axes, (paint, records) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            paint(axes, records)
        figure.suptitle(_title(run), x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def _title(run: Run) -> str:
    where = run.machine["name"] + (f", {run.machine['threads']} threads" if run.machine["device"] == "cpu" else "")
    return f"pins_ext on {where} · torch {run.machine['torch']} · {run.date}"


def _one_problem(records: Sequence[Record]) -> list[Record]:
    """The main records of the first shapes, size and dtype."""
    main = main_records(records)
    return [r for r in main if (r.shapes, r.weights, r.dtype) == (main[0].shapes, main[0].weights, main[0].dtype)]


def _kernels(records: Sequence[Record]) -> list[Record]:
    """What moves counted bytes: our operators and torch's fused optimizers."""
    found: dict[str, Record] = {}
    for record in _one_problem(records):
        moves = record.kind in ("kernel", "floor", "peer") and record.stem not in ("step", "clip")
        if moves and record.gbps and not record.case.startswith("select after"):
            found.setdefault(record.case, record)
    return list(found.values())


def _steps(records: Sequence[Record]) -> list[Record]:
    found: dict[tuple[str, str], Record] = {}
    for record in _one_problem(records):
        if record.stem == "step" and record.kind != "bandwidth" and record.median_s:
            found.setdefault((record.label, record.case), record)
    return list(found.values())


def _draw_kernels(axes: Axes, records: Sequence[Record]) -> None:
    labels = [f"{r.case}  ({r.bytes_per_weight:g} B)" for r in records]
    values = [r.gbps or 0 for r in records]
    colors = [OURS if r.kind == "kernel" else PEER for r in records]
    _bars(axes, labels, values, colors, [_text(r) for r in records])
    for name, style, side in (("copy", "-", "left"), ("read", ":", "right")):
        bandwidth = statistics.median(getattr(r, f"{name}_gbps") or 0 for r in records)
        axes.axvline(bandwidth, color=ACCENT, linewidth=1.3, linestyle=style)
        axes.text(bandwidth, -0.62, f" {name} {bandwidth:.1f} ", color=ACCENT, fontsize=8, va="bottom", ha=side)
    axes.set_xlim(0, 1.12 * max(*values, *(r.copy_gbps or 0 for r in records)))
    first = records[0]
    axes.set_xlabel(f"GB/s of counted bytes · {first.weights / 1e6:,.0f} M weights, {first.dtype}", loc="right")


def _text(record: Record) -> str:
    passes = f" · {record.passes:.1f} passes" if record.passes else ""
    return f"{record.gbps or 0:.1f}{passes}"


def _draw_steps(axes: Axes, records: Sequence[Record]) -> None:
    floors = {r.label: r.median_s or 1 for r in records if r.case.startswith("torch fused AdamW")}
    rows = [r for r in records if r.label in floors and not r.case.startswith("torch fused AdamW")]
    values = [(r.median_s or 0) / floors[r.label] for r in rows]
    labels = [r.case if r.kind == "step" else f"{_short(r.case)}, {r.label}" for r in rows]
    _bars(
        axes, labels, values, [OURS if r.kind == "step" else PEER for r in rows], [f"{v:.2f} {TIMES}" for v in values]
    )
    axes.set_xscale("log")
    axes.set_xlim(0.8, 2.2 * max(values, default=1))
    axes.axvline(1, color=ACCENT, linewidth=1.3)
    axes.text(1, -0.62, " torch fused AdamW", color=ACCENT, fontsize=8, va="bottom")
    for i, row in enumerate(rows):
        if row.case in _FLOORS and row.dtype == "float32":
            axes.plot([_FLOORS[row.case]] * 2, [i - 0.42, i + 0.42], color=_INK, linewidth=1.2)
    axes.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axes.minorticks_off()
    axes.set_xlabel(f"time, {TIMES} a torch fused AdamW step · black: floor by bytes", loc="right")


def _short(case: str) -> str:
    return case.partition(":")[0]


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], colors: Sequence[str], texts: Sequence[str]
) -> None:
    places = range(len(values))
    axes.barh(places, values, height=_BAR, color=colors, zorder=2)
    axes.set_yticks(places, labels)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for place, value, text in zip(places, values, texts, strict=True):
        axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
