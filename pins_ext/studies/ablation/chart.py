"""The picture of a grid: every method's main metric with its deviation over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pins_ext.runs.svg import COLORS, STYLE
from pins_ext.studies.ablation.cells import text
from pins_ext.studies.ablation.table import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_WIDTH = 7.2
_APART = 0.08


def draw(lines: Sequence[Line], title: str, file: Path) -> None:
    """Write the picture as SVG: lines over the first varied number, or else a row per method; a panel per setting."""
    import matplotlib
    from matplotlib.figure import Figure

    axis = _number_axis(lines)
    panels = _panels(lines, axis)
    methods = list(dict.fromkeys(line.row.method for line in lines))
    columns = min(_COLUMNS, len(panels))
    height = 3.0 if axis else 1.0 + 0.32 * len(methods)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):  # type: ignore[arg-type]
        width = _WIDTH if columns == 1 else 3.6 * columns
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for i, axes in enumerate(grid.flat):
            if i >= len(panels):
                axes.set_visible(False)
                continue
            heading, inside = panels[i]
            axes.set_title(heading, loc="left", fontsize=9)
            if axis:
                _draw_over(axes, inside, methods, axis)
            else:
                _draw_methods(axes, inside, methods)
        if axis:
            handles, labels = grid.flat[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(methods)))
        figure.savefig(file, metadata={"Date": None, "Creator": None})


def _number_axis(lines: Sequence[Line]) -> str | None:
    """The first varied flag with several numbers for values."""
    for name in lines[0].row.combination:
        values = {text(line.row.combination[name]) for line in lines}
        if len(values) > 1 and all(_is_number(value) for value in values):
            return name
    return None


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _panels(lines: Sequence[Line], axis: str | None) -> list[tuple[str, list[Line]]]:
    """Lines by the values of the varied flags beside the axis, with a heading."""
    panels: dict[str, list[Line]] = {}
    for line in lines:
        rest = {name: value for name, value in line.row.combination.items() if name != axis}
        heading = ", ".join(_setting(name, value) for name, value in rest.items())
        panels.setdefault(heading, []).append(line)
    return list(panels.items())


def _setting(name: str, value: Any) -> str:
    return str(value) if name == "task" else f"{name} {text(value)}"


def _draw_over(axes: Axes, lines: Sequence[Line], methods: Sequence[str], axis: str) -> None:
    """A line per method over the varied number, with error bars; values stand evenly, methods a little apart."""
    values = sorted({float(line.row.combination[axis]) for line in lines})
    for i, method in enumerate(methods):
        points = sorted(
            (values.index(float(line.row.combination[axis])), spread.mean, spread.deviation or 0.0)
            for line in lines
            if line.row.method == method and (spread := line.spread(line.metric)) is not None
        )
        if points:
            place, mean, deviation = zip(*points, strict=True)
            x = [at + _APART * (i - (len(methods) - 1) / 2) for at in place]
            color = _color(method, methods)
            axes.errorbar(x, mean, deviation, color=color, linewidth=1.4, marker="o", markersize=4.5, label=method)
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(axis.replace("-", " "))
    axes.set_ylabel(_metric(lines))


def _draw_methods(axes: Axes, lines: Sequence[Line], methods: Sequence[str]) -> None:
    """A row per method: mean and deviation, and each seed as a faint dot."""
    by_method: Mapping[str, Line] = {line.row.method: line for line in lines}
    for i, method in enumerate(methods):
        line = by_method.get(method)
        spread = line.spread(line.metric) if line else None
        if line is None or spread is None:
            continue
        color, seeds = _color(method, methods), list(line.values(line.metric).values())
        axes.errorbar(spread.mean, i, xerr=spread.deviation or 0.0, color=color, marker="o", markersize=6)
        axes.plot(seeds, [i + 0.24] * len(seeds), "o", color=color, markersize=4, alpha=0.5, markeredgewidth=0)
    axes.set_yticks(range(len(methods)), list(methods))
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(_metric(lines))


def _color(method: str, methods: Sequence[str]) -> str:
    return COLORS[methods.index(method) % len(COLORS)]


def _metric(lines: Sequence[Line]) -> str:
    return lines[0].metric.removeprefix("eval_").replace("_", " ")
