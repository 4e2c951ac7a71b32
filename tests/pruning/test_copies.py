"""Deep copies of what is being pruned: they are pruned as well, or say that they are not."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, exact, same, start, train, zeros

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW, PinsSGD

OPTIMIZERS = [PinsAdamW, PinsSGD, partial(torch.optim.AdamW, fused=True)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_copy_of_all_three_is_pruned_like_the_original(optimizer_class: Any, order: tuple[int, ...]) -> None:
    original = start(CONFIG, optimizer_class)
    train(original[0], original[1], 22)
    several: Any = copy.deepcopy([original[i] for i in order])
    model, optimizer, pruner = (several[order.index(i)] for i in range(3))
    assert pruner.step == 22
    train(model, optimizer, STEPS, skip=22)
    assert original[2].step == 22
    assert zeros(original[2]) < exact(original[2])
    train(original[0], original[1], STEPS, skip=22)
    assert same(model, original[0])
    assert pruner.finalize()["zeros"] == exact(pruner) == zeros(pruner)


@pytest.mark.parametrize("criterion", ["pins-update", "movement", "magnitude"])
def test_a_copy_is_pruned_alike_by_every_kind_of_state(criterion: str) -> None:
    config = PruneConfig(criterion=criterion, sparsity=0.8, delta_t=5, warmup=5, cooldown=20)
    original = start(config)
    train(original[0], original[1], 22)
    model, optimizer, pruner = copy.deepcopy(original)
    train(model, optimizer, STEPS, skip=22)
    train(original[0], original[1], STEPS, skip=22)
    assert same(model, original[0])
    assert pruner.finalize()["zeros"] == exact(pruner)


def test_a_masked_view_is_not_copied() -> None:
    model, optimizer, pruner = start()
    train(model, optimizer, 22)
    with pruner.masked_view(), pytest.raises(RuntimeError, match="inside masked_view"):
        copy.deepcopy((model, optimizer, pruner))


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_copy_without_its_pruner_says_so_at_its_first_step(optimizer_class: Any) -> None:
    model, optimizer, pruner = start(CONFIG, optimizer_class)
    train(model, optimizer, 3)
    copied, other = copy.deepcopy((model, optimizer))
    with pytest.warns(UserWarning, match="copy of one that a Pruner takes part in, and prunes nothing"):
        train(copied, other, 4, skip=3)
    pruner.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(copied, other, 5, skip=4)
        train(model, optimizer, 5, skip=3)
        train(*copy.deepcopy((model, optimizer)), 6, skip=5)


def test_a_copy_gets_a_pruner_of_its_own_and_is_quiet() -> None:
    model, optimizer, _ = start(CONFIG, partial(torch.optim.AdamW))
    copied, other = copy.deepcopy((model, optimizer))
    pruner = Pruner(copied, other, CONFIG, STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(copied, other, 3)
    assert pruner.step == 3


def test_hooks_of_the_user_s_own_stay_as_they_are() -> None:
    model, optimizer, _ = start(CONFIG, partial(torch.optim.AdamW))
    copied, other = copy.deepcopy((model, optimizer))
    seen: list[Any] = []
    other.register_step_pre_hook(lambda *called: seen.append(called))
    with pytest.warns(UserWarning, match="prunes nothing"):
        train(copied, other, 3)
    assert len(seen) == 3
    assert (
        optimizer.state_dict()["param_groups"][0].keys() == torch.optim.AdamW([torch.zeros(1)]).param_groups[0].keys()
    )
