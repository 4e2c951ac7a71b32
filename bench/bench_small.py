"""Operators over thousands of small tensors, each beside itself over one tensor of as many weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import bench_importance, bench_select, bench_update
from .data import Problem
from .protocol import Case
from .suite import Group

_MADE: tuple[tuple[Callable[[Problem, bool], list[Case]], str], ...] = (
    (bench_update.cases, "masked_adamw_ + ipt + mask"),
    (bench_importance.cases, "fold_ + count"),
    (bench_select.cases, "count_"),
)


def one_tensor(name: str) -> str:
    """Name of the case over a single tensor."""
    return f"{name}, one tensor"


def cases(problem: Problem, peers: bool = True) -> list[Case]:
    """Bytes counted: those of the operators' own stems."""
    single = replace(problem, name="flat", shapes=((problem.weights,),))
    found = []
    for make, name in _MADE:
        small, whole = (next(c for c in make(p, False) if c.name == name) for p in (problem, single))
        found += [small, replace(whole, name=one_tensor(name), kind="floor", against=name)]
    return found


def group(problem: Problem, peers: bool) -> Group:
    """Everything of this stem on one problem."""
    weight, state = problem.sizes
    # What three stems draw, of which two rotate over sets of tensors, twice.
    return Group("small", problem, cases, peers, operand_bytes=2 * (8 * weight + 12 * state))
