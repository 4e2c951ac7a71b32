"""Steps that gradient scaling skips: every parameter counts its own, on its device, through every kind of copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import Network, batches, same
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from pins_ext.optim import PinsAdamW, PinsSGD

STEPS = 14
POISONED = {0, 1, 4, 8, 9}
UNFROZEN_AT = {"layers.0.norm.weight": 3, "layers.0.output.dense.weight": 4, "layers.1.output.dense.weight": 9}
WITHOUT_GRADIENT = {"classifier.weight": {4, 5}, "embed.bias": {8}}
DAMPENED = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}
# torch's fused SGD takes a skipped step for the first one too; its unfused one is not called for it.
PAIRS = [
    (partial(PinsAdamW, lr=1e-2), partial(torch.optim.AdamW, lr=1e-2, fused=True)),
    (partial(PinsSGD, **DAMPENED), partial(torch.optim.SGD, foreach=False, **DAMPENED)),
]
pairs = pytest.mark.parametrize(("fused_class", "torch_class"), PAIRS, ids=["adamw", "sgd"])


def train_scaled(model: nn.Module, optimizer: Optimizer, start: int = 0, stop: int = STEPS) -> None:
    """Steps from `start` to `stop`, some of them poisoned and not all with a gradient for every parameter."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, (x, y) in enumerate(batches(stop)):
        if step < start:
            continue
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        for name, p in model.named_parameters():
            if step < UNFROZEN_AT.get(name, 0) or step in WITHOUT_GRADIENT.get(name, ()):
                p.grad = None
        if step in POISONED:
            model.get_parameter("embed.weight").grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()


def network() -> Network:
    return Network(16, classes=16)


@pairs
def test_every_parameter_counts_the_steps_that_it_took(fused_class: Any, torch_class: Any) -> None:
    one, other = network(), network()
    optimizer, reference = fused_class(one.parameters()), torch_class(other.parameters())
    train_scaled(one, optimizer)
    train_scaled(other, reference)
    assert same(one, other)
    exported, expected = optimizer.state_dict()["state"], reference.state_dict()["state"]
    assert exported.keys() == expected.keys()
    assert all(exported[i]["step"] == state["step"] for i, state in expected.items() if "step" in state)


def deep_copied(model: Network, optimizer: Optimizer) -> Any:
    return copy.deepcopy((model, optimizer))


def pickled(model: Network, optimizer: Optimizer) -> Any:
    return pickle.loads(pickle.dumps((model, optimizer)))


def rolled_back(model: Network, optimizer: Optimizer) -> Any:
    """The same optimizer after three more skipped steps, loaded with its earlier state."""
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train_scaled(model, optimizer, 8, 10)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    return model, optimizer


@pairs
@pytest.mark.parametrize("way", [deep_copied, pickled, rolled_back])
@pytest.mark.parametrize("at", [2, 6])
def test_skipped_steps_survive_copies_and_end_with_a_loaded_state(
    fused_class: Any, torch_class: Any, way: Callable[[Network, Optimizer], Any], at: int
) -> None:
    one, other = network(), network()
    optimizer = fused_class(one.parameters())
    train_scaled(one, optimizer, 0, at)
    one, optimizer = way(one, optimizer)
    train_scaled(one, optimizer, at)
    train_scaled(other, torch_class(other.parameters()))
    assert same(one, other)


@pairs
@pytest.mark.parametrize("at", [2, 6])
def test_torch_goes_on_from_a_state_with_skipped_steps(fused_class: Any, torch_class: Any, at: int) -> None:
    one, other = network(), network()
    optimizer, successor = fused_class(one.parameters()), torch_class(one.parameters())
    train_scaled(one, optimizer, 0, at)
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in successor.param_groups:
        group["fused"] = isinstance(successor, torch.optim.AdamW)
    train_scaled(one, successor, at)
    train_scaled(other, torch_class(other.parameters()))
    assert same(one, other)


@pytest.mark.parametrize("moment_dtype", ["bfloat16", "8bit"])
def test_what_is_rounded_after_a_skipped_step_is_so_after_loading_too(moment_dtype: str) -> None:
    one, loaded = network(), network()
    optimizer, again = (PinsAdamW(m.parameters(), lr=1e-2, moment_dtype=moment_dtype) for m in (one, loaded))
    train_scaled(one, optimizer, 0, 6)
    loaded.load_state_dict(one.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, own in ((one, optimizer), (loaded, again)):
        train_scaled(model, own, 6, 8)
    assert same(one, loaded)
    moments = ([s["exp_avg"] for s in own.state.values()] for own in (optimizer, again))
    assert all(map(torch.equal, *moments))


class HostReads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for: on a GPU each time is a synchronisation."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused_class", [pair[0] for pair in PAIRS], ids=["adamw", "sgd"])
def test_a_scaled_step_reads_nothing_back(fused_class: Any) -> None:
    model = network()
    optimizer = fused_class(model.parameters())
    train_scaled(model, optimizer, 0, 9)
    assert len({id(state["skipped"]) for state in optimizer.state.values()}) > 1
    optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.ones(1)
    with HostReads() as reads:
        optimizer.step()
    assert reads.count == 0
    with reads:
        float(Tensor([1.0]))
    assert reads.count == 1
