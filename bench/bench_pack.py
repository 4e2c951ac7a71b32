"""pack_ and apply_mask_: a threshold into mask bits, mask bits into zeros."""

from __future__ import annotations

import torch

from pins_ext import ops

from .data import Draw, Problem, masks_of
from .protocol import Case, Streams
from .suite import Group, rotations


def cases(problem: Problem, peers: bool = True) -> list[Case]:
    """Bytes counted: pack_ reads two averages and the old bits and writes the new; apply_mask_ reads bits and weights
    and writes weights."""
    weight, state = problem.sizes
    sets = []
    for i in range(rotations(problem, weight + 2 * state)):
        draw = Draw(problem.turned(i))
        sets.append((draw.normal(0.04), *draw.states()))
    layout = ops.Layout.of(sets[0][0])
    places, chunks, n = layout.places, layout.chunks, layout.total
    kernels, kept = torch.ops.pins_ext, ops.KeptLists()
    masks = masks_of(problem, sets[0][0], problem.ratio)
    packed = [mask.clone() for mask in masks]
    stats = torch.zeros(len(masks), 3, dtype=torch.int64, device=places.device)
    wanted = torch.tensor(problem.n_prune).to(places.device)
    threshold = kernels.select(*sets[0][1:], places, chunks, "product", wanted).reshape(1, 2)
    score = ops.score_of_key(threshold)

    def pack(turn: int) -> None:
        packed_kept, a, b = kept.of(("pack", turn % len(sets)), packed, *sets[turn % len(sets)][1:])
        kernels.pack_(packed_kept, stats, a, b, places, chunks, "product", threshold)

    def apply(turn: int) -> None:
        lists = kept.of(("apply", turn % len(sets)), sets[turn % len(sets)][0], masks)
        kernels.apply_mask_(*lists, places, chunks)

    def both(turn: int) -> None:
        pack(turn)
        apply(turn)

    def eager(turn: int) -> None:
        for p, a, b in zip(*sets[turn % len(sets)], strict=True):
            p.masked_fill_(a * b < score, 0.0)

    scores, weights = Streams((), (problem.state_dtype,) * 2), Streams((problem.dtype,))
    found = [
        Case("pack_", pack, "kernel", n, 2 * state + 0.25, outputs=lambda: [*packed, stats], streams=scores),
        Case("apply_mask_", apply, "kernel", n, 2 * weight + 0.125, outputs=lambda: sets[0][0], streams=weights),
        Case("pack_ + apply_mask_", both, "kernel", n, 2 * state + 2 * weight + 0.375, outputs=lambda: sets[0][0]),
    ]
    peer = [Case("eager score < threshold, masked_fill_", eager, "peer", n, against="pack_ + apply_mask_")]
    return found + (peer if peers else [])


def group(problem: Problem, peers: bool) -> Group:
    """Everything of this stem on one problem."""
    weight, state = problem.sizes
    return Group("pack", problem, cases, peers, operand_bytes=weight + 2 * state + 0.25)
