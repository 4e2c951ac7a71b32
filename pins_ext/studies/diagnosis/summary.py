"""What the numbers of a diagnosis say: correlations and ratios, the tables, and a few honest sentences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pins_ext.studies.diagnosis.changes import FRACTIONS, Change
from pins_ext.studies.diagnosis.exchanges import Exchanges, difference_noise

EXTENTS = {
    "new": "newly pruned weights",
    "whole": "all pruned weights",
    "step": "step and all pruned weights",
}
KINDS = ("criterion", "random")

_CLEAR = 3.0
"""A change is clear when it is this many standard deviations of its rounding noise."""

Rows = list[list[str]]

NOT_SHOWN = (
    "What exchanges don't show: that training would end better with another mask, since kept weights go on learning; "
    "nor a bound over all masks, since a sample is tried; and the best of many is chosen on the batches it is measured "
    "on, so its gain is optimistic."
)


@dataclass(frozen=True)
class Agreement:
    """How predicted and measured changes of one kind go together over the masks.

    Attributes:
        n: changes.
        clear: those that stand out from rounding.
        predicted: mean over all.
        measured: mean over all.
        ratio: median of predicted / measured over the clear ones, if there are any.
        same_sign: share of equal signs among these.
        pearson: correlation over all; None for fewer than three changes, or equal ones.
        spearman: correlation of ranks, likewise.
    """

    kind: str
    extent: str
    n: int
    clear: int
    predicted: float
    measured: float
    ratio: float | None
    same_sign: float | None
    pearson: float | None
    spearman: float | None


def agreements(changes: Sequence[Change]) -> list[Agreement]:
    """One per extent and kind."""
    found = []
    for extent in EXTENTS:
        for kind in KINDS:
            chosen = [c for c in changes if (c.kind, c.extent) == (kind, extent)]
            if chosen:
                found.append(_agreement(kind, extent, chosen))
    return found


def _agreement(kind: str, extent: str, changes: Sequence[Change]) -> Agreement:
    from scipy import stats

    predicted, measured = [c.predicted for c in changes], [c.measured for c in changes]
    clear = [c for c in changes if _is_clear(c.measured, c.noise)]
    pearson = spearman = None
    if len(changes) >= 3 and len(set(predicted)) > 1 and len(set(measured)) > 1:
        pearson = float(stats.pearsonr(predicted, measured).statistic)
        spearman = float(stats.spearmanr(predicted, measured).statistic)
    return Agreement(
        kind,
        extent,
        len(changes),
        len(clear),
        statistics.fmean(predicted),
        statistics.fmean(measured),
        statistics.median(c.predicted / c.measured for c in clear) if clear else None,
        statistics.fmean(c.predicted * c.measured > 0 for c in clear) if clear else None,
        pearson,
        spearman,
    )


def _is_clear(measured: float, noise: float) -> bool:
    return abs(measured) > _CLEAR * noise


def fraction_ratios(changes: Sequence[Change], extent: str) -> dict[float, float]:
    """Median of predicted / measured when the criterion's weights go only a part of their way, where it is clear."""
    ratios = {}
    for part in FRACTIONS:
        chosen = [(c, c.fractions[part]) for c in changes if c.fractions and c.extent == extent]
        each = [part * c.predicted / measured for c, measured in chosen if _is_clear(measured, c.noise)]
        if each:
            ratios[part] = statistics.median(each)
    return ratios


# ---- sentences ------------------------------------------------------------------------------------------------------


def reading(changes: Sequence[Change], exchanges: Sequence[Exchanges]) -> list[str]:
    """What the numbers say, a sentence or two each."""
    return [*_about_prediction(changes), *(_about_exchanges(tried) for tried in exchanges)]


def _about_prediction(changes: Sequence[Change]) -> list[str]:
    by_name = {(a.kind, a.extent): a for a in agreements(changes)}
    sentences = []
    for extent in ("new", "whole"):
        own, random = by_name["criterion", extent], by_name["random", extent]
        sentences.append(
            f"{EXTENTS[extent].capitalize()}: the loss changes by {own.measured:+.2e} on average where first order "
            f"says {own.predicted:+.2e}, and for random weights by {random.measured:+.2e} where it says "
            f"{random.predicted:+.2e}. The sign is right at {_signs(own)} (random: {_signs(random)})"
            + (f", and the median of predicted / measured is {own.ratio:.2g}." if own.ratio is not None else ".")
        )
        parts = fraction_ratios(changes, extent)
        if parts and own.ratio is not None:
            smallest = min(parts)
            sentences.append(_about_parts(smallest, parts[smallest], own.ratio))
    return [*sentences, _about_step(changes, by_name["criterion", "step"])]


def _signs(agreement: Agreement) -> str:
    if agreement.same_sign is None:
        return "no mask, since no change stands out from rounding"
    return f"{round(agreement.same_sign * agreement.clear)} of {agreement.clear} changes that stand out from rounding"


def _about_step(changes: Sequence[Change], own: Agreement) -> str:
    sgd = statistics.fmean(c.predicted_sgd for c in changes if c.kind == "criterion" and c.predicted_sgd is not None)
    return (
        f"With the optimizer's step before the zeros, first order predicts {own.predicted:+.2e} on average "
        f"({sgd:+.2e} if the step were one of SGD), and {own.measured:+.2e} is measured."
    )


def _about_parts(part: float, small: float, full: float) -> str:
    how = f"When the weights go {_part(part)} of their way to zero that ratio is {small:.2g}"
    if abs(small - 1) > 0.25:
        return f"{how}: even a small part of the change is not first order alone."
    if abs(full - 1) > 0.25:
        return f"{how}: the gradient is right, and what is missed at full size is curvature and interaction."
    return f"{how}: first order holds all the way."


def _about_exchanges(tried: Exchanges) -> str:
    said = []
    for s in tried.strata:
        where = "near the threshold" if s.name == "near" else "anywhere"
        best = "the best lowers nothing" if s.best >= 0 else f"the best by {-s.best:.1e}{_relative(-s.best, tried)}"
        said.append(
            f"{where}, {len(s.lowering)} of {len(s.groups)} exchanges of {s.pairs:,} pairs lower the loss "
            f"({s.clear(tried.noise)} clearly above rounding), {best}; all at once change it by {s.together:+.1e}, "
            f"where the sum of their own changes is {s.total:+.1e}"
        )
    return f"At step {tried.step}: {'; '.join(said)}." if said else f"At step {tried.step} too few weights are pruned."


def _relative(gain: float, tried: Exchanges) -> str:
    if not tried.mask_change or not tried.random_change:
        return ""
    own, random = gain / abs(tried.mask_change), gain / abs(tried.random_change)
    return f" ({_share(own)} of what the mask changes, {_share(random)} of what random masks change)"


def _share(part: float) -> str:
    """A share to two digits, or to the whole percent where it is larger."""
    percent = 100 * part
    if percent < 0.001:
        return "less than 0.001 %"
    return f"{percent:.2g} %" if percent < 99.5 else f"{percent:,.0f} %"


# ---- tables ---------------------------------------------------------------------------------------------------------


def agreement_table(changes: Sequence[Change]) -> tuple[list[str], Rows]:
    """Head and rows."""
    head = ["zeroed", "chosen by", "n", "clear", "predicted", "measured", "ratio", "same sign", "Pearson", "Spearman"]
    rows = [
        [
            EXTENTS[a.extent],
            a.kind,
            str(a.n),
            str(a.clear),
            f"{a.predicted:+.2e}",
            f"{a.measured:+.2e}",
            _number(a.ratio),
            "-" if a.same_sign is None else f"{100 * a.same_sign:.0f} %",
            _number(a.pearson),
            _number(a.spearman),
        ]
        for a in agreements(changes)
    ]
    return head, rows


def fraction_table(changes: Sequence[Change]) -> tuple[list[str], Rows]:
    """Head and rows: predicted / measured on the way to zero, median over the criterion's masks."""
    head = ["predicted / measured at", *(_part(part) for part in FRACTIONS), "1"]
    full = {a.extent: a.ratio for a in agreements(changes) if a.kind == "criterion"}
    rows = []
    for extent in ("new", "whole"):
        ratios = fraction_ratios(changes, extent)
        rows.append([EXTENTS[extent], *(_number(ratios.get(part)) for part in FRACTIONS), _number(full.get(extent))])
    return head, rows


def exchange_table(exchanges: Sequence[Exchanges]) -> tuple[list[str], Rows]:
    """Head and rows: one per mask and stratum."""
    head = ["step", "exchanged", "pairs", "lower the loss", "clearly", "best", "sum", "at once", "noise"]
    rows = [
        [
            str(tried.step),
            s.name,
            f"{s.pairs:,}",
            f"{len(s.lowering)} of {len(s.groups)}",
            str(s.clear(tried.noise)),
            f"{s.best:+.1e}",
            f"{s.total:+.1e}",
            f"{s.together:+.1e}",
            f"{difference_noise(tried.noise):.0e}",
        ]
        for tried in exchanges
        for s in tried.strata
    ]
    return head, rows


def tables(changes: Sequence[Change], exchanges: Sequence[Exchanges]) -> list[tuple[str, list[str], Rows]]:
    """Title, head and rows of every table that has rows."""
    found = [
        ("Change of the loss, mean over the masks", *agreement_table(changes)),
        ("On the way to zero, the criterion's masks, median", *fraction_table(changes)),
        ("Exchanges of kept and pruned weights", *exchange_table(exchanges)),
    ]
    return [(title, head, rows) for title, head, rows in found if rows]


def print_summary(content: dict[str, Any], console: Console) -> None:
    """The tables and the sentences on the terminal."""
    for title, head, rows in content["tables"]:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title=title, title_justify="left")
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(table)
    console.print()
    for sentence in content["reading"]:
        console.print(sentence, soft_wrap=True)
    console.print()


def _part(part: float) -> str:
    return f"1/{round(1 / part)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
