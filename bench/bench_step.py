"""Whole steps through Pruner and PinsAdamW, beside torch's fused AdamW."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from pins_ext.optim import PinsAdamW
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.pruner import Pruner

from .baselines import EagerStep
from .data import Draw, Problem
from .protocol import Case
from .suite import Group

# The gradient's share of the score, lr g^2, is then as large as the weight's, p g: pruned weights compete, as in
# training they grow back, and from window to window the threshold moves by some hundredths of an octave. In fine-tuning
# it moved by 0.01 to 0.1 at the final ratio, and by octaves while the ratio fell quickly: for those windows see "select
# after a fold that missed".
_LR, _WEIGHT, _GRADIENT = 3e-2, 0.04, 1.0
_COMPILING = 30.0
"""Seconds, about, of torch.compile on two cores: beyond the patience of a quick run."""


def gradient_sets(problem: Problem) -> int:
    """Three; one where 6.5 G weights and their states fill a GPU of 139 GB."""
    return 3 if problem.weights < 4_000_000_000 else 1


class Model(nn.Module):
    """Nothing but prunable parameters. Sets of gradients take turns: no two windows have the same mean."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        draw = Draw(problem)
        self.weights = nn.ParameterList(nn.Parameter(p) for p in draw.normal(_WEIGHT))
        # A ParameterList looks each one up by the name of its number.
        self.tensors = list(self.weights)
        self._gradients = [draw.normal(_GRADIENT) for _ in range(gradient_sets(problem))]
        if len(self._gradients) == 3:
            # Of one size, with a sum of zero, so that the weights stay where they are.
            for x, y, z in zip(*self._gradients, strict=True):
                y.mul_(math.sqrt(0.75)).sub_(x, alpha=0.5)
                torch.add(x, y, out=z).neg_()

    def averages(self, delta_t: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Per weight, exp_avg_ipt and exp_avg_unc after many windows of these gradients.

        A window of which one set of gradients has one step more than the others deviates by a share of 1 / delta_t.
        From zeros, or from numbers that do not belong to the weights, the first thresholds would move by octaves.
        """
        for p, *gradients in zip(self.weights, *self._gradients, strict=True):
            scores = [(_LR * g * g - p.detach() * g).abs() for g in gradients]
            mean = sum(scores[1:], start=scores[0]) / len(scores)
            spread = [(c - mean).abs() for c in scores] if len(scores) > 1 else [mean]
            yield mean, sum(spread[1:], start=spread[0]) / (len(spread) * delta_t)

    def backward(self, turn: int) -> None:
        """Put the gradients of one step in place."""
        for p, g in zip(self.tensors, self._gradients[turn % len(self._gradients)], strict=True):
            p.grad = g


def cases(problem: Problem, delta_t: int, eager: bool = False) -> list[Case]:
    """Ours beside torch's fused AdamW, or beside the eager ones. One call is a window and its boundary.

    Bytes counted per step: update, ipt and mask at every step, and once a window what `_boundary_bytes` says.
    """
    weight, state = problem.sizes
    model = Model(problem)
    counted = 7 * weight + 2 * state + 0.125 + _boundary_bytes(state, delta_t) / delta_t
    own = _ours(problem, model, name_of(delta_t), counted, delta_t)
    return [own, *_eager_cases(problem, model, delta_t)] if eager else [own, _floor(problem, model, delta_t)]


def lean_cases(problem: Problem, delta_t: int) -> list[Case]:
    """The same with less beside the weights: statistics in bfloat16, or taken from AdamW's moments, or none.

    Bytes counted per step: `moments` reads p, m and v at a window's end and has no ipt, `fisher` reads p and v twice.
    """
    weight, state = problem.sizes
    model = Model(problem)
    update, half = 7 * weight + 0.125, torch.bfloat16.itemsize
    halved = update + 2 * half + _boundary_bytes(half, delta_t) / delta_t
    moments = update + (3 * weight + 8 * state + 0.25) / delta_t
    fisher = update + (4 * weight + 0.25) / delta_t
    return [
        _ours(problem, model, lean_name_of(delta_t, "bfloat16"), halved, delta_t, state_dtype="bfloat16"),
        _ours(problem, model, lean_name_of(delta_t, "moments"), moments, delta_t, criterion="moments"),
        _ours(problem, model, lean_name_of(delta_t, "fisher"), fisher, delta_t, criterion="fisher"),
        _floor(problem, model, delta_t, lean_name_of(delta_t, "bfloat16")),
    ]


def _ours(
    problem: Problem,
    model: Model,
    name: str,
    counted: float,
    delta_t: int,
    criterion: str = "pins",
    state_dtype: str | None = None,
    clips: bool = False,
) -> Case:
    """Steps through Pruner and PinsAdamW; `counted` bytes per weight and step."""
    optimizer = PinsAdamW(model.tensors, lr=_LR)
    state_dtype = state_dtype or ("float32" if problem.state_dtype == torch.float32 else "bfloat16")
    pruner = _pruner(problem, model, optimizer, delta_t, criterion, state_dtype)
    importance = pruner.importance

    def setup() -> None:
        _first(model, optimizer)
        if criterion == "pins":
            _settle(model, delta_t, importance.exp_avg_ipt, importance.exp_avg_unc)

    def clip_and_step() -> None:
        # Half the norm of the gradients: they are multiplied.
        optimizer.clip_grad_norm_(0.5 * math.sqrt(problem.weights) * _GRADIENT)
        optimizer.step()

    return Case(
        name,
        partial(_window, model, delta_t, clip_and_step if clips else optimizer.step),
        "step",
        problem.weights,
        counted,
        delta_t,
        setup=setup,
        outputs=lambda: [*model.tensors, *importance.ipt, *importance.exp_avg_unc, *pruner.masks.bits],
    )


def _floor(problem: Problem, model: Model, delta_t: int, against: str | None = None) -> Case:
    """torch's AdamW; its seven operands are counted."""
    plain = torch.optim.AdamW(model.tensors, lr=_LR, fused=True)
    return Case(
        FLOOR,
        partial(_window, model, delta_t, plain.step),
        "floor",
        problem.weights,
        7 * problem.sizes[0],
        delta_t,
        against=against or name_of(delta_t),
        setup=partial(_first, model, plain),
    )


def _boundary_bytes(state: int, delta_t: int) -> float:
    """What a window's boundary moves beside its steps' update and ipt, with `state` bytes of each statistic.

    The last step's pass reads and writes both averages and leaves ipt, and the next one's reads them. A window of one
    step reads and writes them in its own pass, and has no ipt.
    """
    return (2 if delta_t == 1 else 5) * state + 0.25


def _settle(model: Model, delta_t: int, exp_avg_ipt: Iterable[Tensor], exp_avg_unc: Iterable[Tensor]) -> None:
    for a, b, (ipt, unc) in zip(exp_avg_ipt, exp_avg_unc, model.averages(delta_t), strict=True):
        a.copy_(ipt)
        b.copy_(unc)


def clipped_cases(problem: Problem, delta_t: int) -> list[Case]:
    """Clipping and step, as fine-tuning recipes do them: `pins` and `fisher` beside torch's clip and fused AdamW.

    Bytes counted per step: the norm reads g; torch's clip reads it twice and writes it; `fisher` reads p and v twice at
    a window's end.
    """
    weight, state = problem.sizes
    model = Model(problem)
    update = 8 * weight + 0.125
    pins = update + 2 * state + _boundary_bytes(state, delta_t) / delta_t
    fisher = update + (4 * weight + 0.25) / delta_t
    return [
        _ours(problem, model, clipped_name_of(delta_t, "pins"), pins, delta_t, clips=True),
        _ours(problem, model, clipped_name_of(delta_t, "fisher"), fisher, delta_t, criterion="fisher", clips=True),
        _clipped_floor(problem, model, delta_t),
    ]


def _clipped_floor(problem: Problem, model: Model, delta_t: int) -> Case:
    plain = torch.optim.AdamW(model.tensors, lr=_LR, fused=True)

    def clip_and_step() -> None:
        # Far above the gradients' norm: they keep their values, and torch multiplies all the same.
        torch.nn.utils.clip_grad_norm_(model.tensors, 1e12)
        plain.step()

    return Case(
        CLIPPED_FLOOR,
        partial(_window, model, delta_t, clip_and_step),
        "floor",
        problem.weights,
        10 * problem.sizes[0],
        delta_t,
        against=clipped_name_of(delta_t, "pins"),
        setup=partial(_first, model, plain),
    )


def _pruner(
    problem: Problem, model: Model, optimizer: PinsAdamW, delta_t: int, criterion: str, state_dtype: str
) -> Pruner:
    config = PruneConfig(
        1 - problem.ratio,
        criterion=criterion,
        delta_t=delta_t,
        schedule="constant",
        warmup=0,
        cooldown=2,
        include=("*",),
        state_dtype=state_dtype,
    )
    return Pruner(model, optimizer, config, total_steps=1 << 40)


def _window(model: Model, delta_t: int, step: Callable[[], object], turn: int) -> None:
    for i in range(delta_t):
        model.backward(turn * delta_t + i)
        step()


def _first(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """The moments are made by the first step."""
    model.backward(0)
    optimizer.step()


FLOOR = "torch fused AdamW, no pruning"
CLIPPED_FLOOR = "torch clip_grad_norm_ + fused AdamW, no pruning"


def clipped_name_of(delta_t: int, criterion: str) -> str:
    """Name of our case that clips."""
    return f"clip + step, deltaT = {delta_t}, {criterion}"


def lean_name_of(delta_t: int, what: str) -> str:
    """Name of our case with less beside the weights: statistics in bfloat16, or a criterion."""
    return f"{name_of(delta_t)}, {'statistics in bfloat16' if what == 'bfloat16' else what}"


def name_of(delta_t: int) -> str:
    """Name of our case."""
    return "mask step, deltaT = 1" if delta_t == 1 else f"average step, deltaT = {delta_t}"


def _eager_cases(problem: Problem, model: Model, delta_t: int) -> list[Case]:
    n, item = problem.weights, problem.dtype.itemsize

    def peer(name: str, fused: bool, compiled: bool, beside: int, slow: bool) -> Case:
        made: list[EagerStep] = []

        def setup() -> None:
            made.append(EagerStep(list(model.weights), problem.ratio, delta_t, _LR, fused, compiled))
            _settle(model, delta_t, made[0].eager.exp_avg_ipt.values(), made[0].eager.exp_avg_unc.values())

        return Case(
            name,
            lambda turn: _window(model, delta_t, made[0].step, turn),
            "peer",
            n,
            steps=delta_t,
            against=name_of(delta_t),
            slow=slow,
            needs=n * (5 * item + beside),
            setup=setup,
            predict=lambda: _COMPILING * compiled + _expected(problem, delta_t, fused),
        )

    # Beside states and moments: scores, their concatenation, and what the selection takes.
    return [
        peer("eager, tuned: fused AdamW, topk(sorted=False)", True, False, 2 * item + 28, False),
        peer("eager, torch.compile: fused AdamW, topk(sorted=False)", True, True, 2 * item + 28, False),
        peer("eager, released: AdamW, cat + kthvalue", False, False, 3 * item + 8, True),
    ]


def _expected(problem: Problem, delta_t: int, fused: bool) -> float:
    """Seconds that one eager window will take, from one on a 64th of the weights."""
    small = problem.smaller(max(1 << 18, problem.weights // 64))
    model = Model(small)
    eager = EagerStep(list(model.weights), problem.ratio, delta_t, _LR, fused)
    begin = 0.0
    for i in range(2 * delta_t):
        if i == delta_t:
            begin = time.perf_counter()
        model.backward(i)
        eager.step()
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)
    return (time.perf_counter() - begin) * problem.weights / small.weights


def group(problem: Problem, peers: bool, delta_t: int) -> Group:
    """Ours beside torch's fused AdamW, with or without peers.

    Eager steps have a group of their own: they take gigabytes and return them, and what the system does with those
    falls into the steps that follow. It made them up to twice as long.
    """
    weight, state = problem.sizes
    # Weights, gradients, the moments of two optimizers; states.
    operand_bytes = (5 + gradient_sets(problem)) * weight + 3 * state
    return Group("step", problem, partial(_cases_at, delta_t, False), peers, operand_bytes, f"deltaT = {delta_t}")


def eager_group(problem: Problem, peers: bool, delta_t: int) -> Group | None:
    """Ours beside eager steps; None without peers."""
    weight, state = problem.sizes
    operand_bytes = (3 + gradient_sets(problem)) * weight + 3 * state
    label = f"deltaT = {delta_t}, eager peers"
    return Group("step", problem, partial(_cases_at, delta_t, True), True, operand_bytes, label) if peers else None


def lean_group(problem: Problem, peers: bool, delta_t: int) -> Group:
    """Ours with less beside the weights; torch's fused AdamW is measured with or without peers."""
    weight, state = problem.sizes
    # Statistics in bfloat16, and two averages of `moments`.
    operand_bytes = (9 + gradient_sets(problem)) * weight + 6 + 2 * state
    return Group("step", problem, partial(_lean_cases_at, delta_t), peers, operand_bytes, f"deltaT = {delta_t}, lean")


def clipped_group(problem: Problem, peers: bool, delta_t: int) -> Group:
    """Clipping and step; torch's is measured with or without peers."""
    weight, state = problem.sizes
    operand_bytes = (7 + gradient_sets(problem)) * weight + 3 * state
    return Group("clip", problem, partial(_clipped_cases_at, delta_t), peers, operand_bytes, f"deltaT = {delta_t}")


def _lean_cases_at(delta_t: int, problem: Problem, peers: bool) -> list[Case]:
    return lean_cases(problem, delta_t)


def _clipped_cases_at(delta_t: int, problem: Problem, peers: bool) -> list[Case]:
    return clipped_cases(problem, delta_t)


def _cases_at(delta_t: int, eager: bool, problem: Problem, peers: bool) -> list[Case]:
    # Repeatability is asked of ours alone.
    return cases(problem, delta_t, eager)[: None if peers or not eager else 1]
