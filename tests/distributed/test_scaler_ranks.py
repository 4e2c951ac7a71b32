"""GradScaler and clipping over ranks: a gradient that is not finite on one of them is skipped by all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, digest, inject, masks, sharded, whole
from torch import nn

from pins_ext import PruneConfig, Pruner
from pins_ext.distributed.shards import local, shard_of
from pins_ext.optim import FusedOptimizer

SKIPPED = 7


def spoil(model: nn.Module) -> None:
    """Make one gradient infinite, which lies on the first rank."""
    name, p = next((name, p) for name, p in model.named_parameters() if p.dim() == 2)
    shard = shard_of(name, p)
    assert p.grad is not None
    if shard is None or not any(shard.start):
        local(p.grad)[0, 0] = float("inf")


def scaled(how: str, kind: str, clips: bool) -> dict[str, Any]:
    """Train with a scaler, whose factors are powers of two: the gradients come back to the last bit."""
    model = sharded(how)
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5)
    told: dict[str, Any] = {"masks": [], "scales": [], "norms": []}
    for step in range(STEPS):
        inject(model, step)
        factor = float(scaler.scale(torch.ones(())))
        for p in model.parameters():
            assert p.grad is not None
            local(p.grad).mul_(factor)
        if step == SKIPPED:
            spoil(model)
        if clips:
            scaler.unscale_(optimizer)
            assert isinstance(optimizer, FusedOptimizer)
            told["norms"].append(float(optimizer.clip_grad_norm_(0.2)))
        scaler.step(optimizer)
        scaler.update()
        told["scales"].append(scaler.get_scale())
        told["masks"].append(masks(pruner))
    told["steps"], told["weights"] = pruner.step, digest(whole(p) for p in model.parameters())
    return told


@pytest.mark.parametrize(("kind", "clips"), [("PinsAdamW", True), ("PinsSGD", False), ("SGD", False)])
@pytest.mark.parametrize(("size", "how"), [(2, "rows"), pytest.param(4, "both", marks=pytest.mark.slow)])
def test_all_ranks_skip_a_step_that_is_not_finite_on_one(size: int, how: str, kind: str, clips: bool) -> None:
    alone = scaled("whole", kind, clips)
    assert alone["scales"][SKIPPED] == alone["scales"][SKIPPED - 1] / 2
    assert len(set(alone["masks"])) > 4
    for told in run(size, scaled, how, kind, clips):
        assert str(told) == str(alone)
