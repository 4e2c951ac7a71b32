"""accumulate_ and fold_: a gradient into the window, a window into the averages."""

from __future__ import annotations

import torch
from torch import Tensor

from pins_ext import ops, reference

from .data import Draw, Problem
from .protocol import Case, Streams
from .suite import Group, rotations

_LR, _BETA1, _BETA2 = 3e-5, 0.85, 0.95


def cases(problem: Problem, peers: bool = True) -> list[Case]:
    """Bytes counted: accumulate_ reads p, g, ipt and writes ipt; fold_ reads three states and writes two."""
    weight, state = problem.sizes
    sets = []
    for i in range(rotations(problem, 2 * weight + state)):
        draw = Draw(problem.turned(i))
        sets.append((draw.normal(0.04), draw.normal(1e-4), draw.positive(3), draw.positive(3), draw.positive(3)))
    layout = ops.Layout.of(sets[0][0])
    places, chunks, n, device = layout.places, layout.chunks, layout.total, layout.places.device
    kernels, kept = torch.ops.pins_ext, ops.KeptLists()
    lr = torch.full((len(problem.shapes),), _LR, device=device)
    accepted = torch.full((1,), 4.0, device=device)
    keys = [torch.tensor(reference.rounding_key(0, 7, stream)).to(device) for stream in range(2)]
    bracket = ops.bracket_around(torch.tensor([reference.order_key(torch.tensor(2.0**-42)).item(), 0]).to(device))
    counts = torch.zeros(1 + ops.BINS, dtype=torch.int64, device=device)

    def accumulate(turn: int) -> None:
        p, g, ipt, _, _ = sets[turn % len(sets)]
        ipt, p = kept.of(("accumulate", turn % len(sets)), ipt, p)
        kernels.accumulate_(ipt, p, g, places, chunks, lr, accepted, keys[0], "pins")

    def fold(turn: int, bracket: Tensor | None = None, counts: Tensor | None = None) -> None:
        _, _, ipt, ea, eu = sets[turn % len(sets)]
        lists = kept.of(("fold", turn % len(sets)), ea, eu, ipt)
        kernels.fold_(*lists, places, chunks, accepted, keys[1], _BETA1, _BETA2, bracket=bracket, counts=counts)

    def eager_accumulate(turn: int) -> None:
        for p, g, ipt, _, _ in zip(*sets[turn % len(sets)], strict=True):
            c = ((-p * g) + (_LR * g * g)).abs()
            ipt.mul_(4).add_(c).div_(5)

    def eager_fold(turn: int) -> None:
        for _, _, ipt, ea, eu in zip(*sets[turn % len(sets)], strict=True):
            ea.mul_(_BETA1).add_((1 - _BETA1) * ipt)
            eu.mul_(_BETA2).add_((1 - _BETA2) * (ipt - ea).abs())

    _, _, ipt, ea, eu = sets[0]
    w, s = problem.dtype, problem.state_dtype
    into, over = Streams((s,), (w, w)), Streams((s, s), (s,))
    found = [
        Case("accumulate_", accumulate, "kernel", n, 2 * weight + 2 * state, outputs=lambda: ipt, streams=into),
        Case("fold_", fold, "kernel", n, 5 * state, outputs=lambda: [*ea, *eu], streams=over),
        Case(
            "fold_ + count",
            lambda turn: fold(turn, bracket, counts),
            "kernel",
            n,
            5 * state,
            outputs=lambda: [*ea, *eu, counts],
            streams=over,
        ),
    ]
    eager = [
        Case("eager accumulate", eager_accumulate, "peer", n, against="accumulate_"),
        Case("eager fold", eager_fold, "peer", n, against="fold_ + count"),
    ]
    return found + (eager if peers else [])


def group(problem: Problem, peers: bool) -> Group:
    """Everything of this stem on one problem."""
    weight, state = problem.sizes
    return Group("importance", problem, cases, peers, operand_bytes=2 * weight + 3 * state)
