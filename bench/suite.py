"""From groups of cases to records: what runs, in which order, within which budget."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from pins_ext.contention import Neighbours

from . import memory
from .data import Problem
from .protocol import Case, Limits, bandwidth_cases, floor_cases, measure, reason, repeatable
from .records import Record, record_of

_SMALL = 1 << 20
"""Weights on which bitwise repeatability is tried: sixty chunks and more, for any number of threads."""


class Build(Protocol):
    """The cases of a problem, with or without peers."""

    def __call__(self, problem: Problem, peers: bool) -> list[Case]: ...


@dataclass(frozen=True)
class Group:
    """Cases that share operands and are interleaved.

    Attributes:
        stem: importance, select, pack, update, norm or step.
        build: makes the cases.
        peers: whether those too.
        operand_bytes: per weight, what building takes.
        label: tells groups of one stem apart.
    """

    stem: str
    problem: Problem
    build: Build
    peers: bool
    operand_bytes: float
    label: str = ""

    @property
    def name(self) -> str:
        """In short."""
        scores = f"{self.problem.scores} r={self.problem.ratio:g}" if self.label == "scores" else ""
        return " ".join(part for part in (self.stem, self.label, self.problem.name, scores) if part)

    @property
    def title(self) -> str:
        """As it stands above a table."""
        p = self.problem
        parts = [self.stem, self.label, p.name, f"{p.weights / 1e6:,.1f} M weights in {len(p.shapes):,} tensors"]
        parts.append({"float32": "fp32", "bfloat16": "bf16"}.get(str(p.dtype)[6:], str(p.dtype)[6:]))
        if self.stem in ("select", "pack"):
            parts += [p.scores, f"r = {p.ratio:g}"]
        return " · ".join(part for part in parts if part)


@dataclass
class Outcome:
    """records: in the order they were made. skipped: names of the groups that were not reached. interrupted: Ctrl-C."""

    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    interrupted: bool = False


class Watcher(Protocol):
    """Who follows a run: progress on a terminal, or nobody."""

    def group(self, group: Group, calls: int) -> None:
        """A group begins; about this many calls will be made."""

    def tick(self, name: str) -> None:
        """A case is about to be called."""

    def done(self, group: Group, records: Sequence[Record]) -> None:
        """The group's results."""


def run(
    groups: Sequence[Group],
    limits: Limits,
    budget: float | None,
    watcher: Watcher,
    bandwidth_bytes: int = 1 << 26,
    wait: float = 0.0,
) -> Outcome:
    """Measure the groups in order, most valuable first, until the budget in seconds is spent.

    Args:
        wait: seconds that may be spent waiting for other processes to rest.
    """
    outcome = Outcome()
    begin = time.perf_counter()
    if budget is not None:
        limits = replace(limits, deadline=begin + budget)
    longest = 0.0
    for i, group in enumerate(groups):
        spent = time.perf_counter() - begin
        if budget is not None and i > 0 and spent + 0.5 * longest > budget:
            outcome.skipped += [g.name for g in groups[i:]]
            break
        try:
            neighbours = Neighbours(group.problem.device, wait)
            records = _measure_group(group, limits, watcher, bandwidth_bytes, neighbours)
            wait = neighbours.left
        except KeyboardInterrupt:
            outcome.skipped += [g.name for g in groups[i:]]
            outcome.interrupted = True
            break
        longest = max(longest, time.perf_counter() - begin - spent)
        outcome.records += records
        watcher.done(group, records)
        gc.collect()
        if group.problem.device.type == "cuda":
            torch.cuda.empty_cache()
    return outcome


def _measure_group(
    group: Group, limits: Limits, watcher: Watcher, bandwidth_bytes: int, neighbours: Neighbours
) -> list[Record]:
    problem, device = group.problem, group.problem.device
    watcher.group(group, 0)
    needed, free = int(group.operand_bytes * problem.weights), memory.available(device)
    try:
        if needed > 0.9 * free:
            raise MemoryError(f"the operands need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        watcher.tick("bitwise repeatability")
        small = problem.smaller(_SMALL)
        same = repeatable(lambda: group.build(small, False))
        watcher.tick("drawing data")
        built = group.build(problem, group.peers)
        cases = [*bandwidth_cases(device, bandwidth_bytes), *floor_cases(built, device, bandwidth_bytes), *built]
        watcher.group(group, len(cases) * (limits.rounds + 1))
        seen = measure(cases, device, limits, watcher.tick, neighbours)
    except (MemoryError, torch.OutOfMemoryError, RuntimeError, ValueError) as error:
        text = f"out of memory: {error}" if isinstance(error, MemoryError) and str(error) else reason(error)
        return [record_of(group.stem, group.label, problem, Case("(whole group)", lambda turn: None), error=text)]
    return [
        record_of(
            group.stem,
            group.label,
            problem,
            case,
            seen[case.name],
            all_seen=seen,
            repeatable=same.get(case.name),
            others=neighbours.share,
        )
        for case in cases
    ]


def rotations(problem: Problem, bytes_per_weight: float) -> int:
    """Sets of buffers to rotate so that a call never finds its operands in the last-level cache."""
    working_set = max(1.0, bytes_per_weight * problem.weights)
    return min(8, max(1, -(-2 * memory.last_level_cache(problem.device) // int(working_set))))
