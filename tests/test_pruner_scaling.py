"""Steps that a gradient scaler skips, and optimizers that are skipped alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FUSED_AND_HOOKED, Network, batches
from torch import nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW

FUSED_TORCH = FUSED_AND_HOOKED[0][1]
CONFIG = {"sparsity": 0.5, "delta_t": 5, "warmup": 2, "cooldown": 5}


def train_scaled(model: nn.Module, optimizers: list[Any], steps: int, skipped: dict[int, list[nn.Parameter]]) -> None:
    """Train under a gradient scaler; `skipped` maps a step to the parameters whose gradients are infinite in it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for i, (x, y) in enumerate(batches(steps)):
        model.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        for p in skipped.get(i, []):
            p.grad = torch.full_like(p, float("inf"))
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("optimizer_class", [PinsAdamW, FUSED_TORCH])
@pytest.mark.parametrize("clear", [False, True])
def test_a_skipped_step_still_gets_its_mask(optimizer_class: Any, clear: bool) -> None:
    model = Network(16, classes=16)
    optimizer = optimizer_class(model.parameters(), lr=3e-3)
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG, mask_optimizer_state=clear), 30)
    train_scaled(model, [optimizer], 11, {10: list(model.parameters())})
    assert pruner.masked
    report = pruner.verify()
    assert report["zeros"] == pruner.n_weights - round(pruner.schedule.remaining_ratio(10) * pruner.n_weights) > 0
