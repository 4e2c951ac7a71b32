"""The pictures of a report: training records in, self-contained SVG out."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pins_ext.runs.record import Entry, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue, orange, teal, plum, olive, grey: told apart by colour-blind readers, and in grey print by their lightness.
COLORS = ("#1d5fd1", "#d9730d", "#0f8b8d", "#8e3b8a", "#7a8b1f", "#6b7280")
_INK = "#1f2937"
_FAINT = "#9aa3af"
_GRID = "#e8ebef"

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    # Labels are text of the user's own: a dollar sign begins no formula.
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": "#4b5563",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_WIDTH, _HEIGHT = 6.0, 2.9
_MOST_ANNOTATED = 24


@dataclass(frozen=True)
class Picture:
    """A titled SVG with a sentence that says how to read it."""

    title: str
    caption: str
    svg: str


def pictures(records: Sequence[RunRecord]) -> list[Picture]:
    """Every picture these runs have data for: sparsity, loss, evaluations, threshold, churn, sparsity per tensor."""
    drawn = [
        _lines(
            records, "Sparsity", "Share of the prunable weights each mask zeroed. Dotted: schedule.", _draw_sparsity
        ),
        _lines(records, "Training loss", "Mean over each logging interval.", _draw_loss),
        _lines(
            records,
            "Evaluation",
            "During training. Hollow: the model was not at its target sparsity.",
            _draw_evaluation,
        ),
        _lines(records, "Threshold", "The score under which a weight was pruned. Logarithmic.", _draw_threshold),
        _lines(records, "Mask churn", "Share of the prunable weights whose bit a new mask flipped.", _draw_churn),
    ]
    return [picture for picture in drawn if picture] + [p for p in map(_tensors, records) if p]


def _lines(
    records: Sequence[RunRecord],
    title: str,
    caption: str,
    draw: Callable[[Axes, RunRecord, str], bool],
) -> Picture | None:
    """One chart over steps with a line per run; None when no run has anything to draw."""

    def paint(figure: Figure) -> bool:
        axes = figure.subplots()
        drew = [draw(axes, record, COLORS[i % len(COLORS)]) for i, record in enumerate(records)]
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        if sum(drew) > 1:
            axes.legend(loc="best")
        return any(drew)

    svg = _svg(paint, (_WIDTH, _HEIGHT), title)
    return Picture(title, caption, svg) if svg else None


def _series(entries: Sequence[Entry], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the entries that have one of this name."""
    points = [(entry["step"] or 0, value) for entry in entries if (value := entry.get(name)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _draw_sparsity(axes: Axes, record: RunRecord, color: str) -> bool:
    steps, achieved = _series(record.masks, "sparsity")
    if not steps:
        return False
    axes.plot(steps, achieved, color=color, label=record.label, marker="o", markersize=4, linewidth=1.6, alpha=0.75)
    axes.plot(*_series(record.schedule, "target_sparsity"), color=_INK, linestyle=(0, (1, 2)), linewidth=1)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_ylim(0, 1)
    return True


def _draw_loss(axes: Axes, record: RunRecord, color: str) -> bool:
    steps, loss = _series(record.history, "loss")
    axes.plot(steps, loss, color=color, label=record.label, marker="o" if len(steps) == 1 else "", markersize=4)
    axes.set_ylim(bottom=0)
    return bool(steps)


def _draw_evaluation(axes: Axes, record: RunRecord, color: str) -> bool:
    metric = record.final.metric
    steps, scores = _series(record.evaluations, metric)
    if len(steps) < 2:
        return False
    axes.plot(steps, scores, color=color, linewidth=1.2, label=record.label)
    at_target = [entry.get("at_target", True) for entry in record.evaluations if entry.get(metric) is not None]
    for step, score, there in zip(steps, scores, at_target, strict=True):
        axes.plot(step, score, "o", color=color, markerfacecolor=color if there else "white", markersize=4.5)
    axes.set_ylabel(metric.removeprefix("eval_"))
    return True


def _draw_threshold(axes: Axes, record: RunRecord, color: str) -> bool:
    steps, threshold = _series(record.masks, "threshold")
    positive = [(step, value) for step, value in zip(steps, threshold, strict=True) if 0 < value < float("inf")]
    if not positive:
        return False
    axes.plot([s for s, _ in positive], [v for _, v in positive], color=color, label=record.label)
    axes.set_yscale("log")
    return True


def _draw_churn(axes: Axes, record: RunRecord, color: str) -> bool:
    steps, churn = _series(record.masks, "churn")
    if not any(churn):
        return False
    axes.plot(steps, churn, color=color, label=record.label, marker="o", markersize=3, linewidth=1.2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.set_ylim(bottom=0)
    return True


def _tensors(record: RunRecord) -> Picture | None:
    """Sparsity per tensor: a map of layer by kind where the names are numbered, bars otherwise."""
    shares = {name: tensor.sparsity for name, tensor in record.final.tensors.items() if tensor.weights}
    if not shares:
        return None
    numbered = {name: re.search(r"\.(\d+)\.", name) for name in shares}
    if all(numbered.values()):
        kinds = list(dict.fromkeys(_kind(name) for name in shares))
        layers = sorted({int(match[1]) for match in numbered.values() if match})
        cells = {(_kind(name), int(match[1])): shares[name] for name, match in numbered.items() if match}
        size = (_WIDTH, 0.9 + 0.3 * len(kinds))
        svg = _svg(lambda figure: _draw_map(figure, cells, kinds, layers), size, record.label)
    else:
        size = (_WIDTH, 0.8 + 0.2 * len(shares))
        svg = _svg(lambda figure: _draw_bars(figure, shares), size, record.label)
    title = f"Sparsity per tensor, {record.label}"
    return Picture(title, "Darker: more of the tensor was pruned.", svg) if svg else None


def _kind(name: str) -> str:
    return re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")


def _draw_map(figure: Figure, cells: dict[tuple[str, int], float], kinds: list[str], layers: list[int]) -> bool:
    axes = figure.subplots()
    grid = [[cells.get((kind, layer), float("nan")) for layer in layers] for kind in kinds]
    axes.pcolormesh(grid, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
    axes.set_xticks([column + 0.5 for column in range(len(layers))], [str(layer) for layer in layers])
    axes.set_xlabel("layer")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if len(layers) <= _MOST_ANNOTATED:
        for (kind, layer), share in cells.items():
            at = (layers.index(layer) + 0.5, kinds.index(kind) + 0.5)
            ink = "white" if share > 0.55 else _INK
            axes.annotate(f"{100 * share:.0f}", at, ha="center", va="center", color=ink, fontsize=8)
    return True


def _draw_bars(figure: Figure, shares: dict[str, float]) -> bool:
    axes = figure.subplots()
    axes.barh(range(len(shares)), list(shares.values()), color=COLORS[0], height=0.7)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(_percent)
    axes.grid(axis="y", visible=False)
    return True


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.0f} %"


def _svg(paint: Callable[[Figure], bool], size: tuple[float, float], salt: str) -> str | None:
    """Draw on a figure of this size in inches; the SVG takes the page's font and width. None if paint drew nothing."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        if not paint(figure):
            return None
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = buffer.getvalue()
    return _page_fit(svg[svg.index("<svg") :])


def _page_fit(svg: str) -> str:
    """Metadata goes, the size becomes the page's, and text takes its font.

    Only tags are changed: a `<` in a label is escaped, so that what looks like one is one.
    """
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", svg)
    svg = re.sub(r"<svg\b[^<>]*>", lambda tag: re.sub(r' (width|height)="[^"]*"', "", tag[0]), svg, count=1)
    return re.sub(r"<text\b[^<>]*>", lambda tag: _inherited_font(tag[0]), svg)


def _inherited_font(tag: str) -> str:
    """A text's tag with the font of the page around it; its size stays. Before 3.11 matplotlib writes `font: 9px X`."""
    tag = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px; font-family: inherit", tag)
    return re.sub(r"font-family: [^;\"]+", "font-family: inherit", tag)
