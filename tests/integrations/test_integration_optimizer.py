"""The fused optimizers as a Trainer's `optimizer_cls_and_kwargs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bert import CONFIG, arguments, assert_at_target, model, pins, stock, weights

from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.optimizer import optimizer
from pins_ext.optim import PinsAdamW, PinsSGD
from pins_ext.pruning.fused import FusedSlot

ADAMW = {"optim": "adamw_torch_fused", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
SGD = {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True", "learning_rate": 0.02}


@pytest.mark.parametrize(("settings", "kind"), [(ADAMW, PinsAdamW), (SGD, PinsSGD)])
def test_it_trains_as_the_trainer_s_own(tmp_path: Path, settings: dict[str, Any], kind: type) -> None:
    args = arguments(tmp_path, save_strategy="no", weight_decay=0.3, **settings)
    stock_run = stock(model(), args)
    stock_run.train()
    ours = stock(model(), args, optimizer_cls_and_kwargs=optimizer(args))
    ours.train()
    groups = ours.optimizer.param_groups
    assert type(getattr(ours.optimizer, "optimizer", ours.optimizer)) is kind
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    named = {id(p): name for name, p in ours.model.named_parameters()}  # type: ignore[union-attr]
    undecayed = {named[id(p)] for p in groups[1]["params"]}
    assert undecayed == {name for name in named.values() if "bias" in name or "LayerNorm" in name}
    for option in ("betas", "eps", "momentum", "nesterov"):
        assert [g.get(option) for g in groups] == [g.get(option) for g in stock_run.optimizer.param_groups]
    # Ulps in the last, partial vectors of odd tensors (see PinsAdamW) are carried on by the steps that follow.
    torch.testing.assert_close(weights(ours), weights(stock_run), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [ADAMW, SGD])
def test_it_prunes_in_its_own_pass(tmp_path: Path, settings: dict[str, Any]) -> None:
    args = arguments(tmp_path, save_strategy="no", **settings)
    run = stock(model(), args, PinsCallback(CONFIG), optimizer_cls_and_kwargs=optimizer(args))
    run.train()
    pruner = pins(run).pruner
    assert pruner is not None
    assert all(isinstance(slot, FusedSlot) for slot in pruner.slots)
    assert_at_target(pins(run))


def test_the_default_is_fused_adamw(tmp_path: Path) -> None:
    kind, options = optimizer(arguments(tmp_path))
    assert kind is PinsAdamW
    assert options == {"lr": 5e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def test_other_optimizers_are_told_to_use_hooks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adafactor has no pruning pass of its own"):
        optimizer(arguments(tmp_path, optim="adafactor"))
