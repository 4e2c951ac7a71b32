"""Parameter groups of the fused optimizers: options they refuse, and momentum that not every group or step has."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, same, train, zeros
from torch import nn

from pins_ext import Pruner
from pins_ext.optim import PinsAdamW, PinsSGD

OPTIONS = ["amsgrad", "maximize", "differentiable"]
PAIRS = [(PinsAdamW, torch.optim.AdamW), (PinsSGD, torch.optim.SGD)]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("fused_class", [PinsAdamW, PinsSGD])
def test_an_option_that_is_not_there_is_refused_in_a_group(fused_class: Any, option: str) -> None:
    one, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"{fused_class.__name__} has no {option}: set it to False"):
        fused_class([{"params": [one], option: True}])
    optimizer = fused_class([{"params": [one], option: False}])
    with pytest.raises(ValueError, match=option):
        optimizer.add_param_group({"params": [other], option: True})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [other]})


@pytest.mark.parametrize(("fused_class", "torch_class"), PAIRS)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_checkpoint_with_an_option_that_is_not_there_changes_nothing(
    fused_class: Any, torch_class: Any, option: str
) -> None:
    model = Network()
    foreign = torch_class(model.parameters(), lr=0.5)
    foreign.param_groups[0][option] = True
    optimizer = fused_class(model.parameters(), lr=0.25)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"{fused_class.__name__} has no {option}: set it to False"):
        optimizer.load_state_dict(foreign.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups in turn: without momentum, with it, and with dampened momentum."""
    parameters = list(model.parameters())
    return [
        {"params": parameters[0::3], "dampening": 0.5},
        {"params": parameters[1::3], "momentum": 0.9, "nesterov": True},
        {"params": parameters[2::3], "momentum": 0.8, "dampening": 0.3},
    ]


@pytest.mark.parametrize("copied", [False, True])
def test_momentum_may_come_go_and_come_back(copied: bool) -> None:
    models = []
    for optimizer_class, options in ((PinsSGD, {}), (torch.optim.SGD, {"foreach": False})):
        model = Network(16, classes=16)
        optimizer = optimizer_class(groups(model), lr=0.05, **options)
        for start, momentum in ((0, 0.0), (3, 0.9), (6, 0.0), (9, 0.7)):
            if copied:
                model, optimizer = copy.deepcopy((model, optimizer))
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.param_groups[0]["momentum"] = momentum
            train(model, optimizer, start + 3, skip=start)
        assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
        models.append(model)
    assert same(*models)


def test_a_group_with_momentum_may_join_one_without() -> None:
    models = []
    for optimizer_class, options in ((PinsSGD, {}), (torch.optim.SGD, {"foreach": False})):
        model = Network(16, classes=16)
        first, *others = groups(model)
        optimizer = optimizer_class([first], lr=0.05, **options)
        train(model, optimizer, 4)
        assert not optimizer.state_dict()["state"]
        for group in others:
            optimizer.add_param_group(group)
        train(model, optimizer, 8, skip=4)
        models.append(model)
    assert same(*models)


def test_groups_with_and_without_momentum_are_pruned_as_by_hooks() -> None:
    models, pruners = [], []
    for optimizer_class, options in ((PinsSGD, {}), (torch.optim.SGD, {"foreach": False})):
        model = Network(16, classes=16)
        optimizer = optimizer_class(groups(model), lr=0.05, **options)
        pruners.append(Pruner(model, optimizer, CONFIG, STEPS))
        train(model, optimizer, STEPS)
        models.append(model)
    assert same(*models)
    assert torch.equal(pruners[0].masks.cutoff, pruners[1].masks.cutoff)
    assert zeros(pruners[0]) == zeros(pruners[1]) > 0


def test_a_checkpoint_may_name_a_buffer_that_is_not_there() -> None:
    """Older releases of torch.optim.SGD wrote such ones."""
    models = []
    for named in (False, True):
        model = Network(16, classes=16)
        optimizer = PinsSGD(model.parameters(), lr=0.05, momentum=0.9, dampening=0.5)
        if named:
            places = range(len(optimizer.param_groups[0]["params"]))
            state = {i: {"momentum_buffer": None} for i in places}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        train(model, optimizer, 3)
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
def test_groups_may_be_reordered_and_lose_a_parameter_between_steps(pruned: bool, stays: bool) -> None:
    """A parameter is known by its identity: its rate is that of the group which it is in now; in none, it rests."""
    models = []
    for optimizer_class in (PinsAdamW, partial(torch.optim.AdamW, fused=True)):
        model = Network(16, classes=16)
        layers, rest = [list(layer.parameters()) for layer in model.layers], [model.embed, model.classifier]
        last = {"params": [p for module in rest for p in module.parameters()]}
        groups = [{"params": layers[0], "lr": 1e-2}, {"params": layers[1], "lr": 1e-3}, last]
        optimizer = optimizer_class(groups, lr=3e-3)
        pruner = Pruner(model, optimizer, CONFIG, STEPS) if pruned else None
        train(model, optimizer, 5)
        optimizer.param_groups.reverse()
        weight = layers[0][0]
        if not stays:
            optimizer.param_groups[2]["params"] = layers[0][1:]
        before = weight.detach().clone()
        # The first mask falls behind these steps: it zeroes the weights of a resting parameter too.
        train(model, optimizer, 10, skip=5)
        assert torch.equal(weight, before) != stays
        train(model, optimizer, STEPS, skip=10)
        assert pruner is None or pruner.finalize()["zeros"] == 2458
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize(
    ("optimizer_class", "group", "message"),
    [
        (PinsAdamW, {"betas": (1.5, 0.9)}, r"betas must be in \[0, 1\), got \(1\.5, 0\.9\)"),
        (PinsAdamW, {"lr": -1.0}, r"lr must not be negative, got -1\.0"),
        (PinsSGD, {"momentum": -0.5}, "momentum must not be negative"),
        (PinsSGD, {"nesterov": True}, "Nesterov momentum requires a momentum"),
    ],
)
def test_hyperparameters_of_a_group_are_checked(optimizer_class: Any, group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_class([{"params": [nn.Parameter(torch.zeros(2))]} | group])


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    model = nn.Linear(2, 2)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = PinsAdamW(model.parameters())
    with pytest.raises(ValueError, match="a parameter group has no eps: it is that of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
