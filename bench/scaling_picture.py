"""The picture of a scaling run: an axis each, our step and torch's fused AdamW, and the fitted slope."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .roofline import ACCENT, GRID, OURS, PEER, STYLE
from .scaling import AXES, Point, abscissa, slope

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {
    "weights": "weights",
    "threads": "threads",
    "tensors": "tensors",
    "window": "steps from mask to mask",
    "sparsity": "sparsity",
}


def draw(found: Sequence[Point], title: str, path: Path) -> bool:
    """Write the picture; the file's ending chooses the format. False, and no file, if there is nothing to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = [axis for axis in AXES if any(p.axis == axis and p.seconds for p in found)]
    if not drawn:
        return False
    style: Any = STYLE
    with rc_context(style):
        figure = Figure(figsize=(3.4 * len(drawn), 3.4), layout="constrained")
        for axes, axis in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
            _panel(axes, axis, [p for p in found if p.axis == axis and p.seconds])
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def _panel(axes: Axes, axis: str, found: Sequence[Point]) -> None:
    from matplotlib.ticker import LogFormatter

    x = [p.value for p in found]
    axes.plot(x, [1e3 * (p.plain_seconds or math.nan) for p in found], "o--", color=PEER, label="torch fused AdamW")
    axes.plot(x, [1e3 * (p.seconds or math.nan) for p in found], "o-", color=OURS, label="pruning step")
    axes.set_yscale("log")
    scales = [axes.yaxis]
    if axis != "sparsity":
        axes.set_xscale("log")
        scales.append(axes.xaxis)
    for scale in scales:
        # Numbers, not powers of ten: many panels span less than a decade.
        scale.set_major_formatter(LogFormatter())
        scale.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    axes.set_xlabel(_NAMES[axis])
    axes.set_ylabel("ms a step")
    axes.grid(color=GRID, linewidth=0.8)
    fitted = slope(found)
    if fitted is not None:
        places, times = [abscissa(p) for p in found], [math.log(p.seconds or math.nan) for p in found]
        start = statistics.mean(times) - fitted * statistics.mean(places)
        axes.plot(x, [1e3 * math.exp(start + fitted * a) for a in places], ":", color=ACCENT, linewidth=1)
        axes.set_title(f"slope {fitted:+.2f}", loc="left", color=ACCENT, fontsize=9)
    axes.legend(frameon=False, fontsize=7)
