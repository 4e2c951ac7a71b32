"""The masked model for as long as somebody looks, and the weights bit for bit afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import STEPS, Network, exact, start, train, zeros
from torch import nn

from pins_ext import PruneConfig, Pruner
from pins_ext.regularization.self_regularizer import SelfRegularizer


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().view(torch.int32).clone() for p in model.parameters()]


def between_masks() -> tuple[Network, Any, Pruner]:
    """A run two steps after a mask of the schedule: weights have grown back."""
    model, optimizer, pruner = start()
    train(model, optimizer, 23)
    assert pruner.masks.chosen
    assert zeros(pruner) < sum(int((~pruner.mask(name)).sum()) for name in pruner.names)
    return model, optimizer, pruner


def test_it_shows_the_last_mask_and_puts_every_bit_back() -> None:
    model, _, pruner = between_masks()
    with torch.no_grad():
        pruner.parameters[0].view(-1)[:2] = torch.tensor([-0.0, float("nan")])
    before = bits(model)
    with pruner.masked_view():
        for name, p in zip(pruner.names, pruner.parameters, strict=True):
            assert not p[~pruner.mask(name)].any()
        assert zeros(pruner) >= sum(int((~pruner.mask(name)).sum()) for name in pruner.names) > 0
        with pruner.masked_view():
            pass
        assert pruner.masks.in_view
    assert all(map(torch.equal, bits(model), before))


def test_an_exception_puts_them_back_too() -> None:
    model, _, pruner = between_masks()
    before = bits(model)
    with pytest.raises(KeyError), pruner.masked_view():
        raise KeyError
    assert all(map(torch.equal, bits(model), before))
    assert not pruner.masks.in_view


def test_training_goes_on_as_if_nobody_had_looked() -> None:
    ends = []
    for looks in (False, True):
        model, optimizer, pruner = start()

        def after(pruner: Pruner = pruner, looks: bool = looks) -> None:
            if looks:
                with pruner.masked_view():
                    pass

        train(model, optimizer, STEPS, after=after)
        pruner.finalize()
        ends.append(bits(model))
    assert all(map(torch.equal, *ends))


def test_nothing_is_hidden_before_the_first_mask_or_after_the_last() -> None:
    model, optimizer, pruner = start()
    for _ in range(2):
        before = bits(model)
        with pruner.masked_view():
            assert all(map(torch.equal, bits(model), before))
            assert not pruner.masks.in_view
        train(model, optimizer, STEPS)


def test_a_step_inside_is_refused() -> None:
    model, optimizer, pruner = between_masks()
    before = bits(model)
    with pruner.masked_view(), pytest.raises(RuntimeError, match="inside masked_view"):
        optimizer.step()
    assert all(map(torch.equal, bits(model), before))


def test_other_masks_inside_are_refused() -> None:
    """What is hidden goes back to the places of the mask that hid it."""
    model, _, pruner = between_masks()
    state, before = copy.deepcopy(pruner.state_dict()), bits(model)
    for change in (pruner.finalize, lambda: pruner.load_state_dict(state)):
        with pruner.masked_view(), pytest.raises(RuntimeError, match=r"(finalize is called|a state is loaded) inside"):
            change()
        assert all(map(torch.equal, bits(model), before))
    assert not pruner.masks.frozen
    pruner.load_state_dict(state)
    assert pruner.finalize()["zeros"] == exact(pruner)


def test_plan_counts_what_is_hidden() -> None:
    _, _, pruner = start()
    assert pruner.plan()["view_bytes"] == 4 * pruner.plan()["zeros_at_the_end"]
    strict = Pruner(model := Network(), torch.optim.SGD(model.parameters()), PruneConfig(mask_policy="strict"), STEPS)
    assert strict.plan()["view_bytes"] == 0


@pytest.mark.parametrize("policy", ["latest", "best", "ema"])
def test_snapshots_are_of_the_masked_model_and_averages_of_the_trained_one(policy: str) -> None:
    model, _, pruner = between_masks()
    regularizer = SelfRegularizer(model, policy, weight=1.0, every=1, head="classification")
    regularizer.teacher.snapshots_in = pruner.masked_view
    before = bits(model)
    regularizer.step()
    regularizer.evaluated(1.0)
    teacher = regularizer.teacher.module
    assert teacher is not None
    copied = dict(teacher.named_parameters())
    pruned = [copied[name][~pruner.mask(name)] for name in pruner.names]
    assert any(bool(values.any()) for values in pruned) == (policy == "ema")
    assert all(map(torch.equal, bits(model), before))
