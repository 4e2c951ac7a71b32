"""masked_adamw_, masked_sgd_ and boundary_adamw_: the optimizer's one pass, with what pruning adds riding along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from pins_ext import ops, reference

from .data import Draw, Problem, masks_of
from .protocol import Case, Streams
from .suite import Group

_LR, _DECAY, _BETA1, _BETA2, _EPS, _STEP = 3e-5, 1e-2, 0.9, 0.999, 1e-8, 100


def cases(problem: Problem, peers: bool = True) -> list[Case]:
    """Bytes counted: AdamW reads p, g and two moments and writes all but g; SGD has one moment; importance reads and
    writes ipt; a mask is one bit; a boundary reads and writes both averages and the mask."""
    weight, state = problem.sizes
    draw = Draw(problem)
    p, g, ipt = draw.normal(0.04), draw.normal(1e-4), draw.positive(3)
    m, v = draw.normal(1e-4), draw.positive(2, -26.0, problem.dtype)
    masks = masks_of(problem, p, problem.ratio)
    averages = draw.states()
    layout = ops.Layout.of(p)
    places, chunks, n, device = layout.places, layout.chunks, layout.total, layout.places.device
    kernels = torch.ops.pins_ext
    adamw_hyper = _table(_adamw_row(), len(p), device)
    sgd_hyper = _table((_LR, 0.0, 0.9, 1.0, 0.0, 0.0, -_LR, 0.0), len(p), device)
    accepted, key = torch.full((1,), 4.0, device=device), torch.tensor(reference.rounding_key(0, 7, 0)).to(device)

    def run_adamw(ipt: list[Tensor], masks: list[Tensor]) -> None:
        kernels.masked_adamw_(p, m, v, ipt, [], g, masks, places, chunks, adamw_hyper, accepted, key, "pins")

    def run_sgd(ipt: list[Tensor], masks: list[Tensor]) -> None:
        kernels.masked_sgd_(p, m, ipt, [], g, masks, places, chunks, sgd_hyper, accepted, key, "pins")

    boundary, first = _boundary(problem, averages, layout), torch.zeros_like(accepted)

    def run_boundary() -> None:
        rest = (places, chunks, adamw_hyper, first, key, "pins")
        kernels.boundary_adamw_(p, m, v, ipt, [], masks, *averages, g, *rest, **boundary)

    # Weights and moments; a state.
    w, s = problem.dtype, problem.state_dtype
    plain, full = 7 * weight, 7 * weight + 2 * state + 0.125
    found = [
        Case(
            "masked_adamw_ alone",
            lambda turn: run_adamw([], []),
            "kernel",
            n,
            plain,
            outputs=lambda: [*p, *m, *v],
            streams=Streams((w, w, w), (w,)),
        ),
        Case(
            "masked_adamw_ + ipt",
            lambda turn: run_adamw(ipt, []),
            "kernel",
            n,
            plain + 2 * state,
            outputs=lambda: [*p, *ipt],
            streams=Streams((w, w, w, s), (w,)),
        ),
        Case(
            "masked_adamw_ + ipt + mask",
            lambda turn: run_adamw(ipt, masks),
            "kernel",
            n,
            full,
            outputs=lambda: [*p, *ipt],
            streams=Streams((w, w, w, s), (w,)),
        ),
        Case(
            "masked_sgd_ + ipt + mask",
            lambda turn: run_sgd(ipt, masks),
            "kernel",
            n,
            full - 2 * weight,
            outputs=lambda: [*p, *m, *ipt],
            streams=Streams((w, w, s), (w,)),
        ),
        Case(
            "boundary_adamw_",
            lambda turn: run_boundary(),
            "kernel",
            n,
            plain + 4 * state + 0.25,
            outputs=lambda: [*p, *masks, *averages[0]],
            streams=Streams((w, w, w, s, s), (w,)),
        ),
    ]
    return found + (_peers(p, g, m, v, plain) if peers else [])


def _boundary(problem: Problem, averages: tuple[list[Tensor], list[Tensor]], layout: ops.Layout) -> dict[str, Any]:
    """Of a window of one step: what chooses its masks, and its fold. Decays of 1 leave the averages as they are."""
    scores = (*averages, layout.places, layout.chunks, "product")
    device = layout.places.device
    wanted = torch.tensor(problem.n_prune).to(device)
    threshold = torch.ops.pins_ext.select(*scores, wanted).reshape(1, 2)
    bracket = ops.bracket_around(threshold)
    counts = torch.zeros(1 + ops.BINS, dtype=torch.int64, device=device)
    torch.ops.pins_ext.count_(counts, *scores, bracket)
    return {
        "around": torch.ops.pins_ext.narrow(bracket, counts, wanted),
        "stats": torch.zeros(len(layout.places), 3, dtype=torch.int64, device=device),
        "threshold": threshold,
        "fold_rng": torch.tensor(reference.rounding_key(0, 7, 1)).to(device),
        "beta1": 1.0,
        "beta2": 1.0,
        "bracket": bracket,
        "counts": counts,
    }


def _peers(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], plain: float) -> list[Case]:
    """torch's fused optimizers on the same tensors; only they move the same bytes."""
    n = sum(t.numel() for t in p)
    steps = [torch.tensor(float(_STEP), device=t.device) for t in p]
    common = {"lr": _LR, "maximize": False, "foreach": False, "fused": True}

    def run_adamw(turn: int) -> None:
        own = {"amsgrad": False, "beta1": _BETA1, "beta2": _BETA2, "weight_decay": _DECAY, "eps": _EPS}
        adamw(p, g, m, v, [], steps, **own, **common)  # type: ignore[arg-type]

    def run_sgd(turn: int) -> None:
        own = {"weight_decay": 0.0, "momentum": 0.9, "dampening": 0.0, "nesterov": False}
        sgd(p, g, list(m), **own, **common)  # type: ignore[arg-type]

    return [
        Case("torch fused AdamW", run_adamw, "floor", n, plain, against="masked_adamw_ + ipt + mask"),
        Case("torch fused SGD", run_sgd, "floor", n, plain * 5 / 7, against="masked_sgd_ + ipt + mask"),
    ]


def _adamw_row() -> tuple[float, ...]:
    step_size, bias_sqrt = _LR / (1 - _BETA1**_STEP), math.sqrt(1 - _BETA2**_STEP)
    return _LR, 1 - _LR * _DECAY, 1 - _BETA1, _BETA2, 1 - _BETA2, -step_size, bias_sqrt, _EPS


def _table(row: Sequence[float], n: int, device: torch.device) -> Tensor:
    return torch.tensor([row] * n, dtype=torch.float32).to(device)


def group(problem: Problem, peers: bool) -> Group:
    """Everything of this stem on one problem."""
    weight, state = problem.sizes
    return Group("update", problem, cases, peers, operand_bytes=4 * weight + 3 * state + 0.125)
