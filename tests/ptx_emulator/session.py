"""What a test run has launched and found, and how it wants launches run."""

from __future__ import annotations

import ctypes
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .launch import FATAL, Finding, LaunchError, launch, merged
from .module import Entry

Ranges = list[tuple[int, int]]

COPIED = 1 << 30
"""Most bytes that are put back to run a launch again: past 2^31 weights they would be all of a machine's memory."""


def extent(x: torch.Tensor) -> tuple[int, int]:
    """Start and end of a contiguous tensor's memory."""
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()


@dataclass
class Session:
    """Launches of one process.

    Attributes:
        orders: extra runs of every launch, blocks in random orders and warps in random turns; none where more than
            COPIED bytes would have to be put back.
        random_turns: warps in random turns in the first run, too; turns: the seed.
        order_free: kernels whose memory may depend on the order of blocks.
        findings: with the test they were found in.
        launches: by kernel and target.
        coverage: by variant of a kernel, its entry and the threads that executed each instruction.
        tables: the last pointer tables built, by address: the tensors they point to.
    """

    orders: int = 0
    random_turns: bool = False
    turns: int = 0
    order_free: tuple[str, ...] = ("_collect_kernel",)
    test: str = ""
    findings: list[tuple[str, str]] = field(default_factory=list)
    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    coverage: dict[tuple[Any, ...], tuple[Entry, np.ndarray]] = field(default_factory=dict)
    tables: OrderedDict[int, list[torch.Tensor]] = field(default_factory=OrderedDict)
    thread_steps: int = 0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def remember(self, table: torch.Tensor, tensors: list[torch.Tensor]) -> None:
        """A launch that is given this table may touch these tensors."""
        self.tables[table.data_ptr()] = tensors
        self.tables.move_to_end(table.data_ptr())
        while len(self.tables) > 8:
            self.tables.popitem(last=False)

    def reachable(self, x: torch.Tensor) -> Ranges:
        """Memory that a launch may touch that is given this tensor."""
        return [extent(x), *map(extent, self.tables.get(x.data_ptr(), []))]

    def run(
        self,
        name: str,
        variant: tuple[Any, ...],
        entry: Entry,
        parameters: bytes,
        grid: tuple[int, ...],
        threads: int,
        shared: int,
        ranges: Ranges,
        free: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Run one launch, in every order asked for.

        Args:
            free: those of the ranges whose memory may depend on the order of blocks.

        Raises:
            LaunchError: what a GPU would not survive.
        """
        self.launches[name, entry.target] += 1
        _, coverage = self.coverage.setdefault((name, *variant), (entry, np.zeros(len(entry.code), np.uint64)))

        def once(**how: Any) -> None:
            result = launch(entry, parameters, grid, threads, shared, ranges, coverage=coverage, **how)
            self.thread_steps += result.thread_steps
            self._note(result.findings)

        again = self.orders if size(ranges) <= COPIED else 0
        before = snapshot(ranges) if again else []
        once(random_turns=self.random_turns, seed=self.turns)
        if not again:
            return
        compared = [] if name.split()[0] in self.order_free else [r for r in ranges if r not in free]
        after, expected = snapshot(ranges), snapshot(compared)
        for _ in range(again):
            restore(before)
            order = self.rng.permutation(int(np.prod(grid))).astype(np.int64)
            once(random_turns=True, seed=int(self.rng.integers(1 << 62)), order=order)
            if snapshot(compared) != expected:
                self.findings.append((self.test, f"{name} {variant}: another order of blocks leaves other memory"))
        restore(after)

    def _note(self, findings: list[Finding]) -> None:
        self.findings += [(self.test, f.text) for f in findings]
        for f in findings:
            if f.kind in FATAL:
                raise LaunchError(f.text)

    def summary(self) -> list[str]:
        """What ran, a line per kernel."""
        lines = [f"{sum(self.launches.values())} launches, {self.thread_steps:,} thread instructions"]
        for (name, target), n in sorted(self.launches.items()):
            shares = [(count > 0).mean() for key, (_, count) in self.coverage.items() if key[0] == name]
            executed = f"{min(shares):.0%} to {max(shares):.0%} of the instructions of each executed"
            lines.append(f"{name} {target}: {n} launches of {len(shares)} variants, {executed}")
        return lines


def size(ranges: Ranges) -> int:
    """Bytes in them, each once."""
    lo, hi = merged(ranges)
    return int(sum(hi) - sum(lo))


def snapshot(ranges: Ranges) -> list[tuple[int, bytes]]:
    lo, hi = merged(ranges)
    return [(int(a), ctypes.string_at(int(a), int(b - a))) for a, b in zip(lo, hi, strict=True)]


def restore(saved: list[tuple[int, bytes]]) -> None:
    for at, data in saved:
        ctypes.memmove(at, data, len(data))


SESSION = Session()
