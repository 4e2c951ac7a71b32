"""Criteria made of AdamW's moments, and importance taken every k-th step: against the formulas in plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, exact, same, start, train
from torch import Tensor, nn

from pins_ext import PruneConfig, Pruner, reference
from pins_ext.optim import PinsAdamW, PinsSGD

ADAMW = [PinsAdamW, partial(torch.optim.AdamW, fused=True), torch.optim.AdamW]


def changed(**options: Any) -> PruneConfig:
    return PruneConfig(**(vars(CONFIG) | options))


def factors(p: Tensor, optimizer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp_avg, exp_avg_sq and the factors of the reference."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    t, (b1, b2) = float(state["step"]), group["betas"]
    row = torch.tensor([group["lr"], 1 / (1 - b1**t), 1 / (1 - b2**t)])
    return state["exp_avg"].clone(), state["exp_avg_sq"].clone(), row, p.detach().clone()


@pytest.mark.parametrize("optimizer_class", ADAMW)
def test_fisher_prunes_the_smallest_p_squared_v(optimizer_class: Any) -> None:
    model, optimizer, pruner = start(changed(criterion="fisher"), optimizer_class)
    assert not pruner.importance.tensors()
    before: list[list[Any]] = []

    def look() -> None:
        if pruner.step == 40:
            before.append([factors(p, optimizer) for p in pruner.parameters])

    train(model, optimizer, 41, before=look)
    scores = [reference.score("fisher", p, v, row[2]) for _, v, row, p in before[0]]
    keys = torch.cat([reference.order_key(s).flatten() for s in scores])
    kept = torch.cat([pruner.mask(name).flatten() for name in pruner.names])
    n = pruner.n_weights - round(pruner.schedule.remaining_ratio(40) * pruner.n_weights)
    oracle = torch.ones_like(kept)
    oracle[torch.argsort(keys, stable=True)[:n]] = False
    assert torch.equal(kept, oracle)
    train(model, optimizer, STEPS, skip=41)
    assert pruner.finalize()["zeros"] == exact(pruner)


@pytest.mark.parametrize("optimizer_class", ADAMW)
def test_moments_are_smoothed_window_by_window(optimizer_class: Any) -> None:
    config = changed(criterion="moments")
    model, optimizer, pruner = start(config, optimizer_class)
    assert set(pruner.importance.tensors()) == {"exp_avg_ipt", "exp_avg_unc"}
    p = pruner.parameters[0]
    averages = [torch.zeros_like(p), torch.zeros_like(p)]

    def look() -> None:
        if pruner.step and pruner.step % config.delta_t == 0:
            m, v, row, before = factors(p, optimizer)
            c = reference.moments(before, m, v, row)
            averages[:] = reference.fold(averages[0], averages[1], c, config.beta1, config.beta2)

    train(model, optimizer, 41, before=look)
    assert torch.equal(pruner.importance.exp_avg_ipt[0], averages[0])
    assert torch.equal(pruner.importance.exp_avg_unc[0], averages[1])
    train(model, optimizer, STEPS, skip=41)
    assert pruner.finalize()["zeros"] == exact(pruner)


@pytest.mark.parametrize("criterion", ["fisher", "moments"])
@pytest.mark.parametrize("policy", ["reference", "strict"])
def test_fused_and_hooked_agree_and_resume(criterion: str, policy: str, tmp_path: Any) -> None:
    config = changed(criterion=criterion, mask_policy=policy)
    models = []
    for optimizer_class in ADAMW[:2]:
        model, optimizer, pruner = start(config, optimizer_class)
        train(model, optimizer, STEPS)
        pruner.finalize()
        models.append(model)
    assert same(*models)
    model, optimizer, pruner = start(config)
    train(model, optimizer, 33)
    pruner.save(tmp_path / "p")
    resumed, its_own, other = start(config)
    resumed.load_state_dict(model.state_dict())
    its_own.load_state_dict(optimizer.state_dict())
    other.load(tmp_path / "p")
    train(resumed, its_own, STEPS, skip=33)
    other.finalize()
    assert same(resumed, models[0])


def test_other_states_are_refused_by_name() -> None:
    model, optimizer, _ = start(changed(criterion="fisher"), torch.optim.Adamax)
    with pytest.raises(ValueError, match=r"exp_avg.*Adamax"):
        train(model, optimizer, 2)


@pytest.mark.parametrize("criterion", ["fisher", "moments"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("optimizer_class", [PinsSGD, torch.optim.SGD])
def test_an_optimizer_without_moments_is_refused_at_once(optimizer_class: Any, momentum: float, criterion: str) -> None:
    """Every score would be 0, and the mask a choice by position."""
    model = Network(16)
    rest = [p for p in model.parameters() if p is not model.classifier.weight]
    optimizers = [torch.optim.AdamW(rest), optimizer_class([model.classifier.weight], lr=0.1, momentum=momentum)]
    config = changed(criterion=criterion, include=("classifier.weight",))
    with pytest.raises(ValueError, match=r"reads AdamW's moments, and \w*SGD, which steps classifier.weight, has none"):
        Pruner(model, optimizers, config, STEPS)
    config = changed(criterion=criterion, exclude=("classifier.weight",))
    assert Pruner(model, optimizers, config, STEPS).n_weights


def test_a_task_gradient_is_refused() -> None:
    model, optimizer, pruner = start(changed(criterion="moments"))
    pruner.score_gradients = lambda: {
        name: torch.zeros_like(p) for name, p in zip(pruner.names, pruner.parameters, strict=True)
    }
    with pytest.raises(ValueError, match="joint"):
        train(model, optimizer, 1)


def test_no_gradient_no_score() -> None:
    model = Network(16, classes=16)
    pruner = Pruner(model, PinsAdamW(model.parameters()), changed(criterion="fisher"), STEPS)
    with pytest.raises(RuntimeError, match="no gradient"):
        pruner.finalize()


@pytest.mark.parametrize("optimizer_class", ADAMW[:2])
@pytest.mark.parametrize("criterion", ["pins", "pins-update"])
def test_importance_every_takes_the_mean_of_those_steps(optimizer_class: Any, criterion: str) -> None:
    config = changed(criterion=criterion, delta_t=6, importance_every=3)
    model, optimizer, pruner = start(config, optimizer_class)
    p = pruner.parameters[0]
    window: list[Tensor] = []
    old: list[Tensor] = []

    def before() -> None:
        old[:] = [p.detach().clone(), p.grad.clone()]

    def after() -> None:
        if (pruner.step - 1) % 3 == 0:
            window.append(reference.instant_score(criterion, old[0], p.detach(), old[1], 3e-3))

    train(model, optimizer, 5, before=before, after=after)
    mean = reference.next_ipt(criterion, window[0], window[1], 1)
    assert len(window) == 2
    assert torch.equal(pruner.importance.ipt[0], mean)
    assert float(pruner.importance.accepted[0]) == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"importance_every": 3}, "importance_every"),
        ({"importance_every": 0}, "importance_every"),
        ({"importance_every": 5, "criterion": "fisher"}, "importance_every"),
        ({"beta2": 0.0, "criterion": "moments"}, "beta2"),
    ],
)
def test_settings_without_sense_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        changed(**options)


def test_cleared_moments_are_warned_of() -> None:
    model = Network(16, classes=16)
    optimizer: torch.optim.Optimizer = PinsAdamW(model.parameters())
    pruner = Pruner(model, optimizer, changed(criterion="fisher", mask_optimizer_state=True), STEPS)
    assert any("moments" in text for text in pruner.plan()["conflicts"])
    assert isinstance(model, nn.Module)
