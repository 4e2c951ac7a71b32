"""select, count_, sample: from stored averages to the exact threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pins_ext import ops

from .baselines import selection_cases
from .data import Draw, Problem
from .protocol import Case, Streams
from .suite import Group, rotations

_KIND = "product"


def cases(problem: Problem, peers: bool = True) -> list[Case]:
    """Bytes counted: one read of both averages. What `select` takes beyond that time is the number of its passes."""
    sets = [Draw(problem.turned(i)).states() for i in range(rotations(problem, read_bytes(problem)))]
    layout = ops.Layout.of(sets[0][0])
    places, chunks, n = layout.places, layout.chunks, layout.total
    wanted = torch.tensor(problem.n_prune).to(places.device)
    kernels, kept = torch.ops.pins_ext, ops.KeptLists()

    def averages(turn: int) -> tuple[Sequence[Tensor], ...]:
        return kept.of(turn % len(sets), *sets[turn % len(sets)])

    def select(turn: int) -> Tensor:
        return kernels.select(*averages(turn), places, chunks, _KIND, wanted)

    def counted(bracket: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.zeros(1 + ops.BINS, dtype=torch.int64, device=places.device)
        kernels.count_(counts, *averages(0), places, chunks, _KIND, bracket)
        return bracket, counts

    def select_after_fold(turn: int, bracket: Tensor, counts: Tensor) -> Tensor:
        return kernels.select(*averages(0), places, chunks, _KIND, wanted, bracket=bracket, counts=counts.clone())

    threshold = select(0)
    # The counts that a fold leaves behind: around the last threshold, and three octaves beside it.
    hit = counted(ops.bracket_around(threshold))
    miss = counted(ops.bracket_around(threshold + torch.tensor([3 << 23, 0]).to(threshold)))
    counts = hit[1].clone()
    samples = ops.samples_of(n, places.is_cpu)
    found = [
        Case("select", select, "kernel", n, read_bytes(problem)),
        Case(
            "select after a fold that counted",
            lambda turn: select_after_fold(turn, *hit),
            "kernel",
            n,
            read_bytes(problem),
        ),
        Case(
            "select after a fold that missed",
            lambda turn: select_after_fold(turn, *miss),
            "kernel",
            n,
            read_bytes(problem),
        ),
        Case(
            "count_",
            lambda turn: kernels.count_(counts, *averages(turn), places, chunks, _KIND, hit[0]),
            "kernel",
            n,
            read_bytes(problem),
            outputs=lambda: [counts],
            streams=Streams((), (problem.state_dtype,) * 2),
        ),
        Case("sample", lambda turn: kernels.sample(*averages(0), places, chunks, _KIND, samples), "kernel", n),
    ]
    return found + (selection_cases(*sets[0], problem.n_prune) if peers else [])


def scored_cases(problem: Problem) -> list[Case]:
    """`select` alone, for the table of score distributions and ratios; after a miss where the problem asks for it."""
    name = "select after a fold that missed" if problem.scores == "window-miss" else "select"
    return [case for case in cases(problem, peers=False) if case.name == name]


def read_bytes(problem: Problem) -> float:
    """Bytes per weight of one pass over the averages."""
    return 2.0 * problem.sizes[1]


def group(problem: Problem, peers: bool) -> Group:
    """Everything of this stem on one problem."""
    # Averages, materialised scores, and what sort takes.
    return Group("select", problem, cases, peers, operand_bytes=3 * problem.sizes[1])


def scored_group(problem: Problem) -> Group:
    """One line of the table of score distributions."""
    return Group("select", problem, lambda p, peers: scored_cases(p), False, 2 * problem.sizes[1], "scores")
