"""Cost as the work grows: a training step over sizes, threads, numbers of tensors, sparsities and window lengths."""

from __future__ import annotations

import gc
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pins_ext.contention import Neighbours
from pins_ext.files.atomic import write_file

from . import bench_step, memory
from .data import Problem
from .protocol import Limits, measure, reason
from .suite import Group

SCHEMA = 1
_LOGARITHMIC = ("weights", "threads", "tensors", "window")
AXES = (*_LOGARITHMIC, "sparsity")
_TENSORS = (1, 10, 100, 1000, 5000)
_SPARSITIES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_WINDOWS = (1, 2, 5, 10, 20, 50, 100)
_SIZES = (1_000_000, 4_000_000, 16_000_000, 64_000_000, 256_000_000, 1_000_000_000, 2_200_000_000)


@dataclass(frozen=True)
class Point:
    """One measurement: a step, averaged over a window, through Pruner and PinsAdamW.

    Attributes:
        axis: what varies around it, one of AXES.
        weights: pruned weights.
        threads: of the CPU.
        tensors: how many the weights lie in.
        window: steps from mask to mask.
        sparsity: share that is pruned.
        seconds: median time of a step; None where there is none.
        p5_s: its 5th percentile.
        p95_s: its 95th percentile.
        plain_seconds: median time of a step of torch's fused AdamW on the same tensors.
        others: share of the CPU that other processes used meanwhile.
        error: why there is no time.
    """

    axis: str
    weights: int
    threads: int
    tensors: int = 1
    window: int = 10
    sparsity: float = 0.8
    seconds: float | None = None
    p5_s: float | None = None
    p95_s: float | None = None
    plain_seconds: float | None = None
    others: float | None = None
    error: str | None = None

    @property
    def value(self) -> float:
        """Where it lies on its axis."""
        return float(getattr(self, self.axis))

    def problem(self, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
        """Its tensors, all of one size but for the last, which takes the rest."""
        size = self.weights // self.tensors
        shapes = [(size,)] * (self.tensors - 1) + [(self.weights - size * (self.tensors - 1),)]
        return Problem("flat", tuple(shapes), dtype, device, ratio=1 - self.sparsity, seed=seed)


def points(base: int, largest: int, threads: int, device: torch.device) -> list[Point]:
    """What is measured, axis by axis.

    Args:
        base: weights where another axis varies.
        largest: most weights.
        threads: most threads.
        device: a GPU has no axis of threads.
    """
    sizes = sorted({*(n for n in _SIZES if n <= largest), largest})
    counts = sorted({*(1 << i for i in range(threads.bit_length()) if 1 << i <= threads), threads})
    middle = Point("weights", base, threads)
    found = [replace(middle, weights=n) for n in sizes]
    if device.type == "cpu":
        found += [replace(middle, axis="threads", threads=n) for n in counts]
    found += [replace(middle, axis="tensors", tensors=n) for n in _TENSORS if n <= base]
    found += [replace(middle, axis="window", window=n) for n in _WINDOWS]
    return found + [replace(middle, axis="sparsity", sparsity=s) for s in _SPARSITIES]


def measured(
    wanted: Sequence[Point], dtype: torch.dtype, device: torch.device, limits: Limits, seed: int, wait: float
) -> Iterator[Point]:
    """The points with their times, one after another; what does not fit into memory says so.

    Args:
        wanted: see `points`.
        dtype: of the weights.
        device: where.
        limits: samples of each.
        seed: of the random data.
        wait: seconds in all that may be spent waiting for other processes to rest.
    """
    threads = torch.get_num_threads()
    try:
        for point in wanted:
            torch.set_num_threads(point.threads)
            neighbours = Neighbours(device, wait)
            try:
                yield _measured(point, dtype, device, limits, seed, neighbours)
            except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
                text = str(error) if isinstance(error, MemoryError) and str(error) else reason(error)
                yield replace(point, error=text)
            wait = neighbours.left
            gc.collect()
    finally:
        torch.set_num_threads(threads)


def _measured(
    point: Point, dtype: torch.dtype, device: torch.device, limits: Limits, seed: int, neighbours: Neighbours
) -> Point:
    problem = point.problem(dtype, device, seed)
    group: Group = bench_step.group(problem, False, point.window)
    needed, free = int(group.operand_bytes * problem.weights), memory.available(device)
    if needed > 0.9 * free:
        raise MemoryError(f"out of memory: the operands need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    ours, plain = bench_step.cases(problem, point.window)
    seen = measure([ours, plain], device, limits, neighbours=neighbours)
    for name in (ours.name, plain.name):
        if seen[name].error is not None:
            return replace(point, error=seen[name].error)
    times = sorted(seen[ours.name].seconds)
    return replace(
        point,
        seconds=statistics.median(times),
        p5_s=times[round(0.05 * (len(times) - 1))],
        p95_s=times[round(0.95 * (len(times) - 1))],
        plain_seconds=statistics.median(seen[plain.name].seconds),
        others=neighbours.share,
    )


def slope(found: Sequence[Point], of: Callable[[Point], float | None] = lambda p: p.seconds) -> float | None:
    """The fitted slope of an axis' points, by least squares; None with fewer than two.

    Of log time over the logarithm of weights, threads, tensors or window (1: time grows in proportion, 0: not at all,
    -1: it falls in inverse proportion); of log time over the sparsity itself.
    """
    xy = [(abscissa(p), math.log(t)) for p in found if (t := of(p))]
    if len({x for x, _ in xy}) < 2:
        return None
    return statistics.linear_regression([x for x, _ in xy], [y for _, y in xy]).slope


def abscissa(point: Point) -> float:
    """Where it lies for the fit: the logarithm of the value, but for sparsity."""
    return math.log(point.value) if point.axis in _LOGARITHMIC else point.value


def slopes(found: Sequence[Point]) -> dict[str, float | None]:
    """The slope of every axis."""
    return {axis: slope([p for p in found if p.axis == axis]) for axis in AXES}


def save(path: Path, machine: dict[str, Any], date: str, options: dict[str, Any], found: Sequence[Point]) -> None:
    """Write machine, date, options, points and slopes as JSON."""
    data = {"schema": SCHEMA, "kind": "scaling", "machine": machine, "date": date, "options": options}
    data |= {"points": [asdict(p) for p in found], "slopes": slopes(found)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(data, indent=1) + "\n")
