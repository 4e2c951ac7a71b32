"""Which pruner an optimizer belongs to."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, exact, train, zeros

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW

CLASSES = pytest.mark.parametrize("optimizer_class", [PinsAdamW, torch.optim.AdamW])


@CLASSES
def test_an_old_pruner_lets_go_only_of_what_is_its_own(optimizer_class: Any) -> None:
    model = Network()
    optimizer = optimizer_class(model.parameters(), lr=3e-3)
    old = Pruner(model, optimizer, CONFIG, STEPS)
    old.detach()
    new = Pruner(model, optimizer, CONFIG, STEPS)
    old.detach()
    assert all(slot.attached for slot in new.slots)
    assert not all(slot.attached for slot in old.slots)
    train(model, optimizer, STEPS)
    assert zeros(new) == exact(new)


@CLASSES
def test_a_second_pruner_of_one_optimizer_is_refused_and_attaches_nothing(optimizer_class: Any) -> None:
    model = Network()
    free = optimizer_class(model.layers[0].parameters(), lr=3e-3)
    taken = optimizer_class(model.layers[1].parameters(), lr=3e-3)
    first = Pruner(model, taken, PruneConfig(include=("layers.1.output.dense.weight",)), STEPS)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="already belongs to a Pruner"):
            Pruner(model, [free, taken], CONFIG, STEPS)
    assert all(slot.attached for slot in first.slots)
    Pruner(model, free, PruneConfig(include=("layers.0.output.dense.weight",)), STEPS).detach()
    first.detach()
    assert all(slot.attached for slot in Pruner(model, [free, taken], CONFIG, STEPS).slots)


@CLASSES
def test_a_step_is_refused_while_a_graph_is_captured(optimizer_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays would repeat what the host decides; torch's capturable=True does not help a pruner."""
    model = torch.nn.Linear(8, 8)
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, PruneConfig(sparsity=0.5, delta_t=1, warmup=0, cooldown=1), 10)
    model(torch.ones(1, 8)).sum().backward()
    before = model.weight.clone()
    monkeypatch.setattr("pins_ext.ops.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"call step\(\) after the replay"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    assert pruner.step == 0
    monkeypatch.undo()
    optimizer.step()
    assert pruner.step == 1


@pytest.mark.parametrize("optimizer_class", [PinsAdamW, torch.optim.AdamW])
def test_a_pruner_that_was_not_made_leaves_its_optimizer_free(optimizer_class: Any) -> None:
    model = Network()
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="window of 100 steps"):
            Pruner(model, optimizer, PruneConfig(delta_t=100), 20)
    with pytest.raises(TypeError, match=r"total_steps must be an integer, got 20\.0"):
        Pruner(model, optimizer, PruneConfig(), 20.0)  # type: ignore[arg-type]
    Pruner(model, optimizer, PruneConfig(), 20)


def test_a_pruned_parameter_that_is_frozen_before_the_first_step_is_named() -> None:
    model = Network()
    optimizer = PinsAdamW(model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(), 20)
    model.get_parameter(pruner.names[0]).requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=f"{pruner.names[0]} is gone, or does not require gradients any more"):
        optimizer.step()
