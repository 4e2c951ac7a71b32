"""sum_of_squares: the norm of all gradients, and clipping, which the update's pass then does for nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pins_ext import ops

from .data import Draw, Problem
from .protocol import Case, Streams
from .suite import Group, rotations


def cases(problem: Problem, peers: bool = True) -> list[Case]:
    """Bytes counted: each gradient is read once; torch's clip_grad_norm_ reads it twice and writes it."""
    weight, _ = problem.sizes
    sets = [Draw(problem.turned(i)).normal(1e-4) for i in range(rotations(problem, weight))]
    layout = ops.Layout.of(sets[0])
    kernels, n = torch.ops.pins_ext, layout.total

    def norm(turn: int) -> Tensor:
        return kernels.sum_of_squares(sets[turn % len(sets)], layout.places, layout.chunks)

    found = [
        Case("sum_of_squares", norm, "kernel", n, weight, streams=Streams((), (problem.dtype,))),
        Case("norm + clip factor", lambda turn: ops.clip_factor(norm(turn), 1.0)[1], "kernel", n, weight),
    ]
    if not peers:
        return found
    parameters = [torch.nn.Parameter(g, requires_grad=False) for g in sets[0]]
    for p, g in zip(parameters, sets[0], strict=True):
        p.grad = g
    return [
        *found,
        Case("torch get_total_norm", lambda turn: get_total_norm(sets[turn % len(sets)]), "peer", n, weight,
             against="sum_of_squares"),
        # With a norm far above the gradients' they keep their values, and torch multiplies all the same.
        Case("torch clip_grad_norm_", lambda turn: clip_grad_norm_(parameters, 1e9), "peer", n, 3 * weight,
             against="norm + clip factor"),
    ]  # fmt: skip


def group(problem: Problem, peers: bool) -> Group:
    """Everything of this stem on one problem."""
    weight, _ = problem.sizes
    return Group("norm", problem, cases, peers, operand_bytes=weight)
