"""masked_adamw_, masked_sgd_ and boundary_adamw_: the optimizer's one pass, with what pruning adds riding along."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Operands:
    """What one step of the optimizer reads and writes.

    Attributes:
        p: weights.
        g: gradients.
        m: first moments.
        v: second moments.
        ipt: importance.
        masks: bits.
        averages: exp_avg_ipt and exp_avg_unc.
        layout: of the tensors.
    """

    p: list[Tensor]
    g: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    ipt: list[Tensor]
    masks: list[Tensor]
    averages: tuple[list[Tensor], list[Tensor]]
    layout: ops.Layout

    @staticmethod
    def of(problem: Problem) -> _Operands:
        draw = Draw(problem)
        p, g, ipt = draw.normal(0.04), draw.normal(1e-4), draw.positive(3)
        m, v = draw.normal(1e-4), draw.positive(2, -26.0, problem.dtype)
        masks = masks_of(problem, p, problem.ratio)
        return _Operands(p, g, m, v, ipt, masks, draw.states(), ops.Layout.of(p))


@dataclass(frozen=True)
class _Calls:
    """The operators on these operands; with empty lists of ipt and masks they do without."""

    adamw: Callable[[list[Tensor], list[Tensor]], object]
    sgd: Callable[[list[Tensor], list[Tensor]], object]
    boundary: Callable[[], object]


def cases(problem: Problem, peers: bool = True) -> list[Case]:
    """Bytes counted: AdamW reads p, g and two moments and writes all but g; SGD has one moment; importance reads and
    writes ipt; a mask is one bit; a boundary reads and writes both averages and the mask."""
    weight, state = problem.sizes
    x = _Operands.of(problem)
    calls, n = _calls(problem, x), x.layout.total
    # Weights and moments; a state.
    w, s = problem.dtype, problem.state_dtype
    plain, full = 7 * weight, 7 * weight + 2 * state + 0.125
    p, m, ipt, masks = x.p, x.m, x.ipt, x.masks

    def case(
        name: str,
        run: Callable[[], object],
        counted: float,
        outputs: Callable[[], list[Tensor]],
        written: tuple[torch.dtype, ...],
    ) -> Case:
        return Case(name, lambda turn: run(), "kernel", n, counted, outputs=outputs, streams=Streams(written, (w,)))

    found = [
        case("masked_adamw_ alone", lambda: calls.adamw([], []), plain, lambda: [*p, *m, *x.v], (w, w, w)),
        case("masked_adamw_ + ipt", lambda: calls.adamw(ipt, []), plain + 2 * state, lambda: [*p, *ipt], (w, w, w, s)),
        case("masked_adamw_ + ipt + mask", lambda: calls.adamw(ipt, masks), full, lambda: [*p, *ipt], (w, w, w, s)),
        case("masked_sgd_ + ipt + mask", lambda: calls.sgd(ipt, masks), full - 2 * weight, lambda: [*p, *m, *ipt],
             (w, w, s)),
        case("boundary_adamw_", calls.boundary, plain + 4 * state + 0.25, lambda: [*p, *masks, *x.averages[0]],
             (w, w, w, s, s)),
    ]  # fmt: skip
    return found + (_peers(p, x.g, m, x.v, plain) if peers else [])


def _calls(problem: Problem, x: _Operands) -> _Calls:
    places, chunks, device = x.layout.places, x.layout.chunks, x.layout.places.device
    # As the optimizer and the pruner do: gradients alone are other tensors in every step.
    kernels, kept = torch.ops.pins_ext, ops.KeptLists()
    adamw_hyper = _table(_adamw_row(), len(x.p), device)
    sgd_hyper = _table((_LR, 0.0, 0.9, 1.0, 0.0, 0.0, -_LR, 0.0), len(x.p), device)
    accepted, key = torch.full((1,), 4.0, device=device), torch.tensor(reference.rounding_key(0, 7, 0)).to(device)
    boundary, first = _boundary(problem, x.averages, x.layout), torch.zeros_like(accepted)

    def run_adamw(ipt: list[Tensor], masks: list[Tensor]) -> None:
        *lists, masks_kept = kept.of((bool(ipt), bool(masks)), x.p, x.m, x.v, ipt, [], masks)
        kernels.masked_adamw_(*lists, x.g, masks_kept, places, chunks, adamw_hyper, accepted, key, "pins")

    def run_sgd(ipt: list[Tensor], masks: list[Tensor]) -> None:
        *lists, masks_kept = kept.of("sgd", x.p, x.m, ipt, [], masks)
        kernels.masked_sgd_(*lists, x.g, masks_kept, places, chunks, sgd_hyper, accepted, key, "pins")

    def run_boundary() -> None:
        rest = (places, chunks, adamw_hyper, first, key, "pins")
        lists = kept.of("boundary", x.p, x.m, x.v, x.ipt, [], x.masks, *x.averages)
        kernels.boundary_adamw_(*lists, x.g, *rest, **boundary)

    return _Calls(run_adamw, run_sgd, run_boundary)


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
