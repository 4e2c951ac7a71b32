"""Steps that a gradient scaler skips, and optimizers that are skipped alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FUSED_AND_HOOKED, Network, batches
from torch import nn

from pins_ext import PruneConfig, Pruner, reference
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
    assert pruner.masks.applied
    report = pruner.verify()
    assert report["zeros"] == pruner.n_weights - round(pruner.schedule.remaining_ratio(10) * pruner.n_weights) > 0


def two_optimizers(second: Any) -> tuple[Network, list[Any], Pruner]:
    """A fused optimizer owns the first block, `second` the other one."""
    model = Network(16, classes=16)
    optimizers = [PinsAdamW(model.layers[0].parameters(), lr=3e-3), second(model.layers[1].parameters(), lr=3e-3)]
    return model, optimizers, Pruner(model, optimizers, PruneConfig(**CONFIG), 30)


@pytest.mark.parametrize("second", [PinsAdamW, FUSED_TORCH, torch.optim.AdamW])
def test_an_optimizer_can_be_skipped_alone(second: Any) -> None:
    model, optimizers, pruner = two_optimizers(second)
    block = list(model.layers[1].parameters())
    train_scaled(model, optimizers, 30, dict.fromkeys((0, 3, 11, 12, 29), block))
    assert pruner.finalize()["zeros"] == pruner.n_weights - round(0.5 * pruner.n_weights)
    assert pruner.step == 30


@pytest.mark.parametrize("second", [PinsAdamW, FUSED_TORCH, torch.optim.AdamW])
def test_a_window_is_the_mean_of_the_optimizers_own_gradients(second: Any) -> None:
    model, optimizers, pruner = two_optimizers(second)
    weight = model.layers[1].intermediate["dense"].weight
    i = [p is weight for p in pruner.parameters].index(True)
    expected, accepted = torch.zeros_like(weight), 0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step, (x, y) in enumerate(batches(4)):
        model.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if step == 1:
            weight.grad = torch.full_like(weight, float("inf"))
        else:
            c = reference.instant_score("pins", weight, weight, weight.grad / scaler.get_scale(), 3e-3)
            expected, accepted = reference.next_ipt("pins", expected, c, accepted), accepted + 1
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(pruner.importance.ipt[i], expected.detach(), rtol=0, atol=0)
    assert [float(a) for a in pruner.importance.accepted] == [4, 3]


@pytest.mark.parametrize("optimizer_class", [PinsAdamW, FUSED_TORCH])
@pytest.mark.parametrize("criterion", ["platon", "magnitude"])
def test_weights_that_were_not_stepped_keep_their_unmasked_value(optimizer_class: Any, criterion: str) -> None:
    model = Network(16, classes=16)
    optimizer = optimizer_class(model.parameters(), lr=3e-3)
    config = PruneConfig(**CONFIG, criterion=criterion, mask_policy="strict")
    pruner = Pruner(model, optimizer, config, 30)
    train_scaled(model, [optimizer], 27, {})
    before = [shadow.clone() for shadow in pruner.importance.shadow]
    train_scaled(model, [optimizer], 1, {0: list(model.parameters())})
    assert all(map(torch.equal, pruner.importance.shadow, before))
    pruner.parameters[0].grad = None
    for p in pruner.parameters[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [torch.equal(*pair) for pair in zip(pruner.importance.shadow, before, strict=True)] == [
        i == 0 for i in range(len(before))
    ]
    assert (~pruner.mask(pruner.names[0])).any()
    pruner.verify()
