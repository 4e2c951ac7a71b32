"""The pictures of a report: training records in, self-contained SVG out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pins_ext.runs.findings import interval, score
from pins_ext.runs.record import Entry, RunRecord
from pins_ext.runs.svg import COLORS, FAINT, INK, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 4.8, 2.6  # readable where a phone shows it at two thirds of an inch per inch
_MOST_ANNOTATED = 24
_LONGEST_LABEL = 28
_ON_DARK_CELL, _ON_LIGHT_CELL = "#fefefe", "#10233f"  # a map keeps its colours, and so does what is written on it


@dataclass(frozen=True)
class Picture:
    """A titled SVG.

    Attributes:
        title: its heading.
        caption: a sentence that says how to read it.
        svg: the drawing, in the page's own colours.
        told: what it shows, for those who don't see it.
    """

    title: str
    caption: str
    svg: str
    told: str


def pictures(records: Sequence[RunRecord]) -> list[Picture]:
    """Every picture these runs have data for: scores, then sparsity, loss, evaluations, threshold, churn, tensors."""
    records = [replace(record, label=_short(record.label)) for record in records]
    metric = records[0].final.metric.removeprefix("eval_").replace("_", " ")
    loss = "Of the task alone (CE), mean over each logging interval."
    if any(_with_distance(record) for record in records):
        loss += " Dashed: the distance from the teacher is in it."
    drawn = [
        _lines(
            records, "Sparsity", "Share of the prunable weights each mask zeroed. Dotted: schedule.", _draw_sparsity
        ),
        _lines(records, "Training loss", loss, _draw_loss),
        _lines(
            records,
            "Evaluation",
            f"{metric.capitalize()} during training. Hollow: the model was not at its target sparsity.",
            _draw_evaluation,
        ),
        _thresholds(records),
        _lines(records, "Mask churn", "Share of the prunable weights whose bit a new mask flipped.", _draw_churn),
    ]
    found = [_scores(records), *drawn, *map(_tensors, records)]
    return [picture for picture in found if picture]


def _short(label: str) -> str:
    """A label that leaves room for a chart beside it."""
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"


def scores_alone(records: Sequence[RunRecord], title: str | None = None) -> str | None:
    """The scores as an SVG file of its own, on white; None where fewer than two runs have one."""
    paint = _painter_of_scores(records, title)
    height = 0.7 + 0.42 * _bars(records) + (0.3 if title else 0)
    return svg_of(paint, (6.4, height), "scores", themed=False) if paint else None


# ---- scores ----------------------------------------------------------------------------------------------------------


def _scores(records: Sequence[RunRecord]) -> Picture | None:
    """Main metric of each run as a bar, with its interval where it is an accuracy, beside that of no model."""
    paint = _painter_of_scores(records)
    if paint is None:
        return None
    svg = svg_of(paint, (_WIDTH, 0.7 + 0.36 * _bars(records)), "scores")
    name = records[0].final.metric.removeprefix("eval_").replace("_", " ")
    caption = f"{name.capitalize()} at the end."
    if any(map(interval, records)):
        caption += " Whiskers: 95 % interval by the number of validation examples (Wilson)."
    told = ", ".join(f"{record.label} {value:.4f}" for record in records if (value := score(record)) is not None)
    return Picture("Scores", caption, svg, f"{name}: {told}") if svg else None


def _bars(records: Sequence[RunRecord]) -> int:
    return sum(score(record) is not None for record in records) + 1


def _painter_of_scores(records: Sequence[RunRecord], title: str | None = None) -> Callable[[Figure], bool] | None:
    scored = [(i, record, score(record)) for i, record in enumerate(records) if score(record) is not None]
    metrics = {record.final.metric for _, record, _ in scored}
    if len(scored) < 2 or len(metrics) > 1:
        return None
    data = records[0].data
    baseline = data.baseline.get(metrics.pop())

    def paint(figure: Figure) -> bool:
        axes = figure.subplots()
        if title:
            figure.suptitle(title)
        for row, (i, record, value) in enumerate(scored):
            assert value is not None
            axes.barh(row, value, color=COLORS[i % len(COLORS)], height=0.62)
            low, high = interval(record) or (value, value)
            if high > low:
                axes.plot([low, high], [row, row], color=INK, linewidth=1.4, marker="|", markersize=7)
            axes.annotate(f"{value:.3f}", (high, row), (5, 0), textcoords="offset points", va="center")
        names = [record.label for _, record, _ in scored]
        if baseline is not None:
            axes.barh(len(scored), baseline, color=FAINT, height=0.62)
            axes.annotate(f"{baseline:.3f}", (baseline, len(scored)), (5, 0), textcoords="offset points", va="center")
            names.append(data.baseline_name)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        return True

    return paint


# ---- lines over steps ------------------------------------------------------------------------------------------------


def _lines(
    records: Sequence[RunRecord],
    title: str,
    caption: str,
    draw: Callable[[Axes, RunRecord, str], bool],
) -> Picture | None:
    """One chart over steps with a line per run; None when no run has anything to draw."""
    drew: list[str] = []

    def paint(figure: Figure) -> bool:
        axes = figure.subplots()
        for i, record in enumerate(records):
            if draw(axes, record, COLORS[i % len(COLORS)]):
                drew.append(record.label)
        _over_steps(axes)
        if len(drew) > 1:
            axes.legend(loc="best")
        return bool(drew)

    svg = svg_of(paint, (_WIDTH, _HEIGHT), title)
    return Picture(title, caption, svg, f"{title} over steps of {', '.join(drew)}") if svg else None


def _thresholds(records: Sequence[RunRecord]) -> Picture | None:
    """The threshold of each run on an axis of its own: scores of different criteria have nothing in common."""
    drawn = [(i, record) for i, record in enumerate(records) if _positive_thresholds(record)]

    def paint(figure: Figure) -> bool:
        rows = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (i, record) in zip(rows, drawn, strict=True):
            points = _positive_thresholds(record)
            axes.plot([s for s, _ in points], [v for _, v in points], color=COLORS[i % len(COLORS)])
            _logarithmic(axes)
            axes.set_title(record.label, loc="left", fontsize=8.5)
            _over_steps(axes)
        for axes in rows[:-1]:
            axes.set_xlabel("")
        return True

    if not drawn:
        return None
    height = _HEIGHT if len(drawn) == 1 else 0.5 + 1.2 * len(drawn)
    svg = svg_of(paint, (_WIDTH, height), "Threshold")
    told = f"Threshold over steps of {', '.join(record.label for _, record in drawn)}"
    caption = "The score under which a weight was pruned, each run on its own logarithmic axis."
    return Picture("Threshold", caption, svg, told) if svg else None


def _over_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    axes.locator_params(axis="x", integer=True)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis of few plain numbers: matplotlib would write them as formulas."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}" if value < 1e-3 else f"{value:.3g}")


def _positive_thresholds(record: RunRecord) -> list[tuple[float, float]]:
    steps, values = _series(record.masks, "threshold")
    return [(step, value) for step, value in zip(steps, values, strict=True) if 0 < value < float("inf")]


def _series(entries: Sequence[Entry], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the entries that have one of this name."""
    points = [(entry["step"] or 0, value) for entry in entries if (value := entry.get(name)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _draw_sparsity(axes: Axes, record: RunRecord, color: str) -> bool:
    steps, achieved = _series(record.masks, "sparsity")
    if not steps:
        return False
    axes.plot(steps, achieved, color=color, label=record.label, marker="o", markersize=4, linewidth=1.6, alpha=0.75)
    axes.plot(*_series(record.schedule, "target_sparsity"), color=INK, linestyle=(0, (1, 2)), linewidth=1)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_ylim(0, 1)
    return True


def _with_distance(record: RunRecord) -> bool:
    """Whether the only loss that was logged is the joint one, the distance from a teacher in it."""
    regularized = record.config.self_regularization.get("teacher", "none") != "none"
    return regularized and not any(entry.get("task_loss") is not None for entry in record.history)


def _draw_loss(axes: Axes, record: RunRecord, color: str) -> bool:
    steps, loss = _series(record.history, "task_loss")
    if not steps:
        steps, loss = _series(record.history, "loss")
    style = "--" if _with_distance(record) else "-"
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, loss, style, color=color, label=record.label, marker=marker, markersize=4)
    axes.set_ylim(bottom=0)
    return bool(steps)


def _draw_evaluation(axes: Axes, record: RunRecord, color: str) -> bool:
    metric = record.final.metric
    steps, scores = _series(record.evaluations, metric)
    if len(steps) < 2:
        return False
    axes.plot(steps, scores, color=color, linewidth=1.2, label=record.label)
    at_target = [entry.get("at_target", True) for entry in record.evaluations if entry.get(metric) is not None]
    for step, value, there in zip(steps, scores, at_target, strict=True):
        axes.plot(step, value, "o", color=color, markerfacecolor=color if there else "white", markersize=4.5)
    axes.set_ylabel(metric.removeprefix("eval_"))
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
    svg = sparsity_map(shares, record.label)
    if svg is None:
        return None
    title = f"Sparsity per tensor, {record.label}"
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    told = f"{title}: from {100 * shares[least]:.0f} % in {least} to {100 * shares[most]:.0f} % in {most}"
    return Picture(title, "Darker: more of the tensor was pruned.", svg, told)


def sparsity_map(shares: Mapping[str, float], salt: str) -> str | None:
    """Sparsity per tensor as SVG: a map of layer by kind where the names are numbered, bars otherwise.

    Args:
        shares: of zeros, by the tensor's name; None is drawn without any.
        salt: makes the ids of one picture differ from those of another.
    """
    if not shares:
        return None
    numbered = {name: re.search(r"\.(\d+)\.", name) for name in shares}
    if all(numbered.values()):
        kinds = list(dict.fromkeys(_kind(name) for name in shares))
        layers = sorted({int(match[1]) for match in numbered.values() if match})
        cells = {(_kind(name), int(match[1])): shares[name] for name, match in numbered.items() if match}
        size = (_WIDTH, 0.9 + 0.3 * len(kinds))
        return svg_of(lambda figure: _draw_map(figure, cells, kinds, layers), size, salt)
    size = (_WIDTH, 0.8 + 0.2 * len(shares))
    return svg_of(lambda figure: _draw_bars(figure, shares), size, salt)


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
            ink = _ON_DARK_CELL if share > 0.55 else _ON_LIGHT_CELL
            axes.annotate(f"{100 * share:.0f}", at, ha="center", va="center", color=ink, fontsize=8)
    return True


def _draw_bars(figure: Figure, shares: Mapping[str, float]) -> bool:
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
