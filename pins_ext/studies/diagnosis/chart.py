"""The picture of a diagnosis: predicted against measured with the diagonal, and both along the steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pins_ext.runs.svg import COLORS, STYLE
from pins_ext.studies.diagnosis.changes import Change
from pins_ext.studies.diagnosis.summary import EXTENTS, KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHADE = {"criterion": COLORS[0], "random": COLORS[1]}
_DECADES = 1e-3
"""Share of the largest change below which an axis is linear: random masks change the loss by far more than the rest."""


def draw(changes: Sequence[Change], title: str) -> str:
    """The picture as SVG text: a row per extent."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):  # type: ignore[arg-type]
        figure = Figure(figsize=(7.6, 3.1 * len(EXTENTS)), layout="constrained")
        grid = figure.subplots(len(EXTENTS), 2, squeeze=False)
        for (left, right), (extent, name) in zip(grid, EXTENTS.items(), strict=True):
            chosen = [c for c in changes if c.extent == extent]
            _scatter(left, chosen)
            _course(right, chosen)
            left.set_title(f"Change of the loss: {name}", loc="left", fontsize=9)
            right.set_title("along the steps", loc="left", fontsize=9)
        grid[0][0].legend(loc="best")
        grid[0][1].legend(loc="best")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _scatter(axes: Axes, changes: Sequence[Change]) -> None:
    """One point per mask; on the diagonal the prediction is right."""
    largest = _largest(changes)
    for kind in KINDS:
        points = [c for c in changes if c.kind == kind]
        x, y = [c.measured for c in points], [c.predicted for c in points]
        axes.plot(x, y, "o", color=_SHADE[kind], markersize=4, alpha=0.75, label=kind)
    axes.set_xscale("symlog", linthresh=_DECADES * largest)
    axes.set_yscale("symlog", linthresh=_DECADES * largest)
    ends = (-1.5 * largest, 1.5 * largest)
    axes.plot(ends, ends, color=COLORS[-1], linestyle=(0, (1, 2)), linewidth=1, label="as predicted")
    axes.set_xlabel("measured")
    axes.set_ylabel("predicted")
    _sparse(axes, largest, both=True)


def _course(axes: Axes, changes: Sequence[Change]) -> None:
    """Measured (solid) and predicted (dashed); of random masks the mean."""
    for kind in KINDS:
        steps = sorted({c.step for c in changes if c.kind == kind})
        for name, style in (("measured", "-"), ("predicted", (0, (3, 2)))):
            means = []
            for step in steps:
                values = [getattr(c, name) for c in changes if (c.step, c.kind) == (step, kind)]
                means.append(sum(values) / len(values))
            axes.plot(
                steps, means, color=_SHADE[kind], linestyle=style, marker="o", markersize=3, linewidth=1.2,
                label=f"{kind}, {name}",
            )  # fmt: skip
    largest = _largest(changes)
    axes.set_yscale("symlog", linthresh=_DECADES * largest)
    axes.set_xlabel("step")
    _sparse(axes, largest, both=False)


def _largest(changes: Sequence[Change]) -> float:
    return max((max(abs(c.predicted), abs(c.measured)) for c in changes), default=0.0) or 1.0


def _sparse(axes: Axes, largest: float, both: bool) -> None:
    """Few ticks, at the powers of ten that matter, in both signs."""
    ticks = [sign * largest * part for sign in (-1, 1) for part in (1, 1e-2)] + [0.0]
    for axis in (axes.xaxis, axes.yaxis) if both else (axes.yaxis,):
        axis.set_ticks(sorted(ticks))
        axis.set_major_formatter(lambda value, _: f"{value:.0e}" if value else "0")
