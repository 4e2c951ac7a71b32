"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from pins_ext import ops  # noqa: F401  (registers the operators before the machine is described)
from pins_ext.contention import QUIET

from . import (
    bench_importance,
    bench_norm,
    bench_pack,
    bench_select,
    bench_small,
    bench_step,
    bench_update,
    machine,
    scaling,
    scaling_picture,
)
from .data import DTYPES, Problem
from .options import STEMS
from .protocol import Limits
from .records import Run
from .roofline import draw
from .screen import DISTURBED, Screen, key_of, targets_table
from .shapes import RATIOS, SCORES, shapes_of
from .suite import Group, run
from .targets import lines

GROUPS: dict[str, list[Callable[[Problem, bool], Group | None]]] = {
    "select": [bench_select.group],
    "step": [
        *(partial(bench_step.group, delta_t=n) for n in (10, 1)),
        partial(bench_step.lean_group, delta_t=10),
        *(partial(bench_step.eager_group, delta_t=n) for n in (10, 1)),
    ],
    "clip": [partial(bench_step.clipped_group, delta_t=10)],
    "update": [bench_update.group],
    "importance": [bench_importance.group],
    "pack": [bench_pack.group],
    "norm": [bench_norm.group],
}
"""What makes the groups of a stem from a problem, with or without peers; the most valuable first, and no peers' own."""

_QUICK_PARAMS, _QUICK_BUDGET = 8_000_000, 80.0


def main(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run; 0, or 130 when interrupted, with what was measured until then written."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 150)
    results = options.json.parent if options.json else results_folder()
    try:
        baseline = _baseline(options, device, results)
    except (OSError, ValueError) as error:
        parser.error(f"--baseline: {error}")
    if baseline is not None:
        console.print(f"[dim]baseline: {baseline.date}, {baseline.machine['name']}[/dim]")
    if options.scaling:
        return _scale(options, device, console, results)
    groups = plan(options, device)
    about = machine.describe(device)
    console.print(
        f"[bold]{about['name']}[/bold] · {about['threads']} threads · {about['cpu_capability']} · "
        f"torch {about['torch']}"
    )
    begin = time.perf_counter()
    before = {key_of(r): r for r in baseline.records} if baseline else None
    budget = options.budget or (_QUICK_BUDGET if options.quick else None)
    with Screen(console, len(groups), before) as screen:
        outcome = run(groups, limits_of(options, device), budget, screen, wait=options.wait)
    done = Run(
        about,
        datetime.date.today().isoformat(),
        {k: v for k, v in vars(options).items() if k not in ("json", "baseline", "wait")},
        round(time.perf_counter() - begin, 1),
        outcome.records,
        outcome.skipped,
    )
    console.print(targets_table(lines(done.records, device.type, all_targets=not options.stems)))
    if outcome.skipped:
        why = "interrupted" if outcome.interrupted else f"the budget of {budget:.0f} s is spent"
        console.print(f"[yellow]{why}; not reached:[/yellow] " + "; ".join(outcome.skipped))
    if done.others > QUIET:
        console.print(f"[yellow]other processes used up to {done.others:.0%} of the CPU: {DISTURBED}[/yellow]")
    path = options.json or results / file_name(done)
    done.save(path)
    picture = path.with_suffix(".svg")
    drawn = draw(done, picture)
    console.print(f"{done.seconds:.0f} s; wrote {path}{f' and {picture.name}' if drawn else ''}", soft_wrap=True)
    return 130 if outcome.interrupted else 0


def _scale(options: argparse.Namespace, device: torch.device, console: Console, results: Path) -> int:
    """`--scaling`: 0, or 130 when interrupted, with what was measured until then written."""
    usual = Limits.of(device, quick=True)
    limits = Limits(options.rounds or usual.rounds, usual.warmups, options.patience or 20.0, 2)
    base = options.params or (1_000_000 if options.quick else 8_000_000)
    largest = options.largest or (4_000_000 if options.quick else 64_000_000)
    wanted = scaling.points(base, largest, torch.get_num_threads(), device)
    about, found, code = machine.describe(device), [], 0
    columns = "{:<10}{:>15}{:>12}{:>12}{:>8}"
    console.print(columns.format("axis", "value", "ms a step", "torch's ms", "ratio"), highlight=False)
    dtype = DTYPES[options.dtype]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("points", total=len(wanted))
        try:
            for point in scaling.measured(wanted, dtype, device, limits, options.seed, options.wait):
                found.append(point)
                progress.advance(task)
                console.print(columns.format(*_scaling_cells(point)), highlight=False, markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            code = 130
    for axis, fitted in scaling.slopes(found).items():
        if fitted is not None:
            console.print(f"slope over {axis}: {fitted:+.2f}", highlight=False)
    if max((p.others or 0.0 for p in found), default=0.0) > QUIET:
        console.print(f"[yellow]other processes used the CPU: {DISTURBED}[/yellow]")
    date = datetime.date.today().isoformat()
    stem = [machine.file_stem(about["name"]), date, "scaling", *(["quick"] if options.quick else [])]
    path = options.json or results / ("-".join(stem) + ".json")
    kept = {k: v for k, v in vars(options).items() if k not in ("json", "baseline", "wait")}
    scaling.save(path, about, date, kept, found)
    picture = path.with_suffix(".svg")
    drawn = scaling_picture.draw(found, f"pins_ext on {about['name']} · torch {about['torch']} · {date}", picture)
    console.print(f"wrote {path}{f' and {picture.name}' if drawn else ''}", soft_wrap=True)
    return code


def _scaling_cells(point: scaling.Point) -> tuple[str, ...]:
    value = f"{point.value:,.0f}" if point.axis != "sparsity" else f"{point.value:g}"
    if not point.seconds or not point.plain_seconds:
        return point.axis, value, "none", "", f"  {point.error}"
    times = (f"{1e3 * t:.2f}" for t in (point.seconds, point.plain_seconds))
    return point.axis, value, *times, f"{point.seconds / point.plain_seconds:.2f}"


def limits_of(options: argparse.Namespace, device: torch.device) -> Limits:
    """The protocol's limits, changed as asked for."""
    usual = Limits.of(device, options.quick)
    return Limits(options.rounds or usual.rounds, usual.warmups, options.patience or usual.patience, usual.least)


def plan(options: argparse.Namespace, device: torch.device) -> list[Group]:
    """The groups to run, most valuable first."""
    stems = options.stems or list(STEMS)
    params = options.params or (_QUICK_PARAMS if options.quick else None)
    peers = not options.no_peers

    def problem(name: str, scores: str = "lognormal-4", ratio: float = 0.2) -> Problem:
        return Problem(name, shapes_of(name, params), DTYPES[options.dtype], device, scores, ratio, options.seed)

    groups: list[Group | None] = [
        make(problem(name), peers)
        for name in options.shapes
        for stem, made in GROUPS.items()
        if stem in stems
        for make in made
    ]
    if "scores" in stems:
        groups += [bench_select.scored_group(problem(options.shapes[0], *pair)) for pair in _scored(options)]
    if "shapes" in stems:
        others = [name for name in ("many-small", "misaligned", "flat") if name not in options.shapes]
        # torch's optimizers, too, find many small tensors dear; peers of selection would take minutes.
        groups += [
            made[0](problem(name), peers and stem == "update") for stem, made in GROUPS.items() for name in others
        ]
        groups.append(bench_small.group(problem("many-small"), peers))
    return [group for group in groups if group is not None]


def _scored(options: argparse.Namespace) -> list[tuple[str, float]]:
    """Pairs of distribution and ratio: the full table where one of them was asked for, otherwise two edges of it."""
    scores, ratios = options.scores or list(SCORES), options.ratios or list(RATIOS)
    table = [(s, r) for s in scores for r in ratios]
    if options.scores or options.ratios:
        return table
    return [(s, r) for s, r in table if s == "lognormal-4" or r == 0.2]


def results_folder() -> Path:
    """bench/results in a checkout; beside the caller once installed."""
    here = Path(__file__).resolve().parent
    return here / "results" if (here.parent / "setup.py").exists() else Path.cwd() / "bench-results"


def file_name(done: Run) -> str:
    """<machine>-<date>.json, and what was asked for beside the defaults: a partial run never overwrites a full one."""
    asked = done.options
    extras = [*asked["stems"], *(name for name in asked["shapes"] if asked["shapes"] != ["bert-base"])]
    extras += [f"{asked['params']:.2g}"] if asked["params"] else []
    extras += [asked["dtype"]] if asked["dtype"] != "fp32" else []
    extras += ["quick"] if asked["quick"] else []
    return "-".join([machine.file_stem(done.machine["name"]), done.date, *extras]).replace("+", "") + ".json"


def _baseline(options: argparse.Namespace, device: torch.device, results: Path) -> Run | None:
    if options.baseline is None:
        return None
    if options.baseline:
        return Run.load(Path(options.baseline))
    stem = machine.file_stem(machine.describe(device)["name"])
    saved = sorted(results.glob(f"{stem}-????-??-??{'-quick' if options.quick else ''}.json"))
    if not saved:
        raise ValueError(f"no saved run of this machine ({stem}-*.json)")
    return Run.load(saved[-1])
