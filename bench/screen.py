"""The terminal: a progress bar while it runs, a table per group, the targets at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pins_ext.contention import QUIET

from .records import Record
from .suite import Group
from .targets import DASH, TIMES, Line, shown

_COLUMNS = (
    "B/weight",
    "ms",
    f"p5 {DASH} p95",
    "GB/s",
    "of copy",
    "of floor",
    f"{TIMES} ours",
    "extra",
    "calls",
    "bits",
)
_NARROW, _WIDE = 7, 140
DISTURBED = "times are disturbed, those of torch's operators, which join their threads once per tensor, most"
_STYLES = {"stretch": "bold green", "pass": "green", "missed": "bold red", "not measured": "dim"}


class Screen:
    """Follows a run on a console. baseline: medians of an earlier run by key, to compare with."""

    def __init__(
        self, console: Console, groups: int, baseline: Mapping[tuple[object, ...], Record] | None = None
    ) -> None:
        self.console, self.baseline = console, baseline or {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[what]:<44}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._groups = self._progress.add_task("", total=groups, what="groups")
        self._calls = self._progress.add_task("", total=None, what="")

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def group(self, group: Group, calls: int) -> None:
        """A group begins."""
        self._progress.update(self._groups, what=group.name)
        self._progress.reset(self._calls, total=calls or None)

    def tick(self, name: str) -> None:
        """A case is about to be called."""
        self._progress.update(self._calls, advance=1, what=f"  {name[:42]}")

    def done(self, group: Group, records: Sequence[Record]) -> None:
        """Print the group's table."""
        self._progress.advance(self._groups)
        if self._progress.console.is_terminal:
            self._progress.stop()
        self.console.print(table(group.title, records, self.baseline, wide=self.console.width >= _WIDE))
        others = next((r.others for r in records if r.others is not None), 0.0)
        if others > QUIET:
            self.console.print(f"  [yellow]other processes used {others:.0%} of the CPU: {DISTURBED}[/yellow]")
        for record in records:
            if record.error:
                self.console.print(f"  {record.case}: [red]{escape(record.error)}[/red]", soft_wrap=True)
        self.console.print()
        if self._progress.console.is_terminal:
            self._progress.start()


def table(
    title: str,
    records: Sequence[Record],
    baseline: Mapping[tuple[object, ...], Record] | None = None,
    wide: bool = True,
) -> Table:
    """One group. A failed case keeps its row. wide: also memory, calls and repeatability."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    made.add_column("case", no_wrap=wide, max_width=60 if wide else 34)
    for name in _COLUMNS[: None if wide else _NARROW]:
        made.add_column(name, justify="right", no_wrap=True)
    if baseline:
        made.add_column("vs baseline", justify="right", no_wrap=True)
    for record in records:
        style = {"kernel": "bold", "step": "bold", "bandwidth": "dim", "floor": "italic"}.get(record.kind, "")
        cells = _cells(record)[: None if wide else 1 + _NARROW]
        made.add_row(*cells, *([_change(record, baseline)] if baseline else []), style=style)
    return made


def _cells(record: Record) -> list[str]:
    few = f" ({record.samples})" if 0 < record.samples < 5 else ""
    spread = f"{_ms(record.p5_s)} {DASH} {_ms(record.p95_s)}{few}" if record.samples > 1 else few.strip()
    bits = {True: "same", False: "[red]differ[/red]", None: ""}[record.repeatable]
    passes = f"{record.passes:.2f} passes" if record.passes else ""
    return [
        record.case,
        f"{record.bytes_per_weight:g}" if record.bytes_per_weight else "",
        _ms(record.median_s) if record.error is None else "[red]none[/red]",
        spread,
        f"{record.gbps:.2f}" if record.gbps else "",
        passes or (f"{record.share_of_copy:.0%}" if record.share_of_copy and record.kind != "bandwidth" else ""),
        f"{record.share_of_floor:.0%}" if record.share_of_floor else "",
        f"{record.times_ours:.2f}" if record.times_ours else "",
        f"{record.extra_bytes / 1e6:,.0f} MB" if record.extra_bytes is not None and record.kind != "bandwidth" else "",
        str(record.calls) if record.calls is not None and record.kind != "bandwidth" else "",
        bits,
    ]


def _change(record: Record, baseline: Mapping[tuple[object, ...], Record]) -> str:
    before = baseline.get(key_of(record))
    if before is None or not before.median_s or not record.median_s:
        return ""
    change = record.median_s / before.median_s
    style = "red" if change > 1.1 else "green" if change < 0.9 else ""
    return f"[{style}]{change:.2f}[/{style}]" if style else f"{change:.2f}"


def key_of(record: Record) -> tuple[object, ...]:
    """What makes two records of different runs comparable."""
    r = record
    return r.stem, r.label, r.case, r.shapes, r.weights, r.dtype, r.scores, r.ratio


def targets_table(lines: Sequence[Line]) -> Table:
    """The targets against what was measured, bad numbers as they are."""
    made = Table(
        title="targets", title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    made.add_column("metric", max_width=70)
    for name in ("pass", "stretch", "measured"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("", no_wrap=True)
    made.add_column("on", no_wrap=True)
    for line in lines:
        t, sign = line.target, "≥" if line.target.more else "≤"
        made.add_row(
            f"{t.metric}: {line.label}" if line.label else t.metric,
            f"{sign} {shown(t.least, t.unit)}",
            f"{sign} {shown(t.wish, t.unit)}",
            line.shown,
            f"[{_STYLES[line.verdict]}]{line.verdict}[/]",
            place(line.record),
        )
    return made


def place(record: Record | None) -> str:
    """Where a figure was measured."""
    return f"{record.weights / 1e6:,.1f} M, {record.shapes}, {record.dtype}" if record else ""


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
