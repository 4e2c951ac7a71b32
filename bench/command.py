"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from pins_ext import ops  # noqa: F401  (registers the operators before the machine is described)
from pins_ext.runs.options import Formatter

from . import (
    bench_importance,
    bench_norm,
    bench_pack,
    bench_select,
    bench_step,
    bench_update,
    machine,
    scaling,
    scaling_picture,
)
from .contention import QUIET
from .data import DTYPES, RATIOS, SCORES, SHAPES, Problem, shapes_of
from .protocol import Limits
from .records import Run
from .roofline import draw
from .screen import DISTURBED, Screen, key_of, targets_table
from .suite import Group, run
from .targets import lines

GROUPS: dict[str, list[Callable[[Problem, bool], Group]]] = {
    "select": [bench_select.group],
    "step": [partial(bench_step.group, delta_t=10), partial(bench_step.group, delta_t=1)],
    "clip": [partial(bench_step.clipped_group, delta_t=10)],
    "update": [bench_update.group],
    "importance": [bench_importance.group],
    "pack": [bench_pack.group],
    "norm": [bench_norm.group],
}
"""What makes the groups of a stem from a problem, with or without peers; the most valuable first."""

STEMS = (*GROUPS, "scores", "shapes")
_QUICK_PARAMS, _QUICK_BUDGET = 8_000_000, 80.0

_ABOUT = """Times every operator and the whole training step, interleaved with copy and read bandwidth and with what
PyTorch itself and the released algorithm offer. Prints a table per group and the targets, writes JSON and a picture.

stems: select, step, clip (clipping and step together), update, importance, pack, norm on one model's shapes, with
peers; scores: select over score distributions and remaining ratios; shapes: our operators on one flat tensor, 5,000
small ones, misaligned views. "of floor" is the share of a loop that moves the same tensors without arithmetic.
"""
_EXAMPLES = """examples:
  pins-ext bench --quick                          under two minutes on two cores
  pins-ext bench select step                      two stems, BERT-base's 85 M weights
  pins-ext bench --params 1.1e9 --device cuda     BERT's layers, repeated up to 1.1 G weights
  pins-ext bench --shapes llama-7b --dtype bf16   6.5 G weights with bf16 states
  pins-ext bench --scaling --largest 2.2e9        cost as the work grows; a few minutes without --largest
  pins-ext bench --baseline                       beside the newest saved run of this machine

Peers that run out of memory, refuse the size or would take too long stay in the table with the reason.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0, or 130 when interrupted, with what was measured until then written."""
    parser = _parser()
    options = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if options.stems and options.scaling:
        parser.error("--scaling measures steps: leave the stems out")
    if options.largest and not options.scaling:
        parser.error("--largest belongs to --scaling")
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pins-ext bench",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("stems", nargs="*", metavar="STEM", help=f"what to time: {', '.join(STEMS)}; all of them by default")
    add("--shapes", nargs="+", choices=SHAPES, default=["bert-base"], metavar="NAME", help=f"{', '.join(SHAPES)}")
    add("--params", type=count, metavar="N", help="number of weights, as 16e6 or 7e9; the model's own by default")
    add("--dtype", choices=DTYPES, default="fp32", metavar="NAME", help="fp32, bf16 or fp16; with 16 bits, bf16 states")
    add("--threads", type=int, metavar="N", help="CPU threads; torch's choice by default")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda; default cuda if there is one",
    )
    add("--quick", action="store_true", help="8 M weights, few samples, little patience with slow peers")
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="stop before the group that would pass it, and say what is left out",
    )
    add(
        "--scores",
        nargs="+",
        choices=SCORES,
        metavar="NAME",
        help=f"score distributions of the stem `scores`, at every ratio: {', '.join(SCORES)}",
    )
    add("--ratios", nargs="+", type=float, metavar="R", help="remaining ratios of the stem `scores`")
    add(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait up to this long in all until other processes rest",
    )
    add(
        "--scaling",
        action="store_true",
        help="instead of stems: a step over sizes, threads, numbers of tensors, windows and sparsities, with fitted "
        "slopes; --params is the size at which the others vary (8e6; --quick: 1e6)",
    )
    add("--largest", type=count, metavar="N", help="most weights of --scaling, up to 2.2e9 and more; default 64e6")
    add("--no-peers", action="store_true", help="our operators only")
    add("--rounds", type=int, metavar="N", help="samples per case; 11 on a CPU (--quick: 5), 50 on a GPU")
    add("--patience", type=float, metavar="SECONDS", help="time per case; a slow peer gets fewer samples, or none")
    add("--seed", type=int, default=0, help="of the random data")
    add("--baseline", nargs="?", const="", metavar="FILE", help="compare with a saved run; the newest of this machine")
    add("--json", type=Path, metavar="PATH", help="where to write; default bench/results/<machine>-<date>.json")
    return parser


def count(text: str) -> int:
    """A number of weights, also in scientific notation.

    Raises:
        argparse.ArgumentTypeError: not a positive whole number.
    """
    value = float(text)
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(value)


def limits_of(options: argparse.Namespace, device: torch.device) -> Limits:
    """The protocol's limits, changed as asked for."""
    usual = Limits.of(device, options.quick)
    return Limits(options.rounds or usual.rounds, usual.warmups, options.patience or usual.patience, usual.least)


def plan(options: argparse.Namespace, device: torch.device) -> list[Group]:
    """The groups to run, most valuable first.

    Raises:
        SystemExit: an unknown stem.
    """
    stems = options.stems or list(STEMS)
    if unknown := [stem for stem in stems if stem not in STEMS]:
        _parser().error(f"unknown stem {unknown[0]!r}; there are {', '.join(STEMS)}")
    params = options.params or (_QUICK_PARAMS if options.quick else None)
    peers = not options.no_peers

    def problem(name: str, scores: str = "lognormal-4", ratio: float = 0.2) -> Problem:
        return Problem(name, shapes_of(name, params), DTYPES[options.dtype], device, scores, ratio, options.seed)

    groups = [
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
        groups += [made[0](problem(name), False) for made in GROUPS.values() for name in others]
    return groups


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
