"""Masks and `finalize` while nothing, or little, is known about the weights: never a choice by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FUSED_AND_HOOKED, Network, batches, train, zeros
from torch import nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW

FUSED_TORCH = FUSED_AND_HOOKED[0][1]
UNKNOWN = "no gradient has been seen"


def run(total: int, optimizer_class: Any = PinsAdamW, **options: Any) -> tuple[Network, Any, Pruner]:
    model = Network(16, classes=16)
    optimizer = optimizer_class(model.parameters(), lr=3e-3)
    config = PruneConfig(**({"sparsity": 0.5, "delta_t": 10, "warmup": 0, "cooldown": 2} | options))
    return model, optimizer, Pruner(model, optimizer, config, total)


def skip(model: nn.Module, optimizer: Any, steps: int) -> None:
    """Steps that a gradient scaler leaves out, because their gradients are infinite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for x, y in batches(steps):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()


def shares(pruner: Pruner) -> list[float]:
    """Share of zeros per tensor."""
    return [float((p == 0).float().mean()) for p in pruner.parameters]


@pytest.mark.parametrize("optimizer_class", [PinsAdamW, FUSED_TORCH])
@pytest.mark.parametrize("criterion", ["pins", "pins-signed", "pins-update", "platon", "movement"])
@pytest.mark.parametrize("beta2", [0.95, 1, 0])
def test_finalize_in_the_first_window_chooses_by_score(criterion: str, beta2: float, optimizer_class: Any) -> None:
    model, optimizer, pruner = run(8, optimizer_class, criterion=criterion, beta2=beta2)
    train(model, optimizer, 5)
    report = pruner.finalize()
    assert report["zeros"] == pruner.n_weights - round(0.5 * pruner.n_weights)
    assert max(shares(pruner)) < 1
    assert min(shares(pruner)) > 0


@pytest.mark.parametrize("options", [{}, {"criterion": "movement"}, {"scope": "layer"}, {"min_density": 0.1}], ids=str)
@pytest.mark.parametrize("optimizer_class", [PinsAdamW, FUSED_TORCH])
def test_finalize_without_a_gradient_is_refused(options: dict[str, Any], optimizer_class: Any) -> None:
    model, optimizer, pruner = run(20, optimizer_class, **options)
    with pytest.raises(RuntimeError, match=UNKNOWN):
        pruner.finalize()
    optimizer.step()
    with pytest.raises(RuntimeError, match=UNKNOWN):
        pruner.finalize()
    skip(model, optimizer, 12)
    with pytest.raises(RuntimeError, match=UNKNOWN):
        pruner.finalize()
    assert zeros(pruner) == 0
    train(model, optimizer, 1)
    assert pruner.finalize()["zeros"] > 0


def test_magnitude_needs_no_gradient() -> None:
    _, _, pruner = run(8, criterion="magnitude")
    report = pruner.finalize()
    assert report["zeros"] == pruner.n_weights // 2
    assert max(shares(pruner)) < 1


@pytest.mark.parametrize("policy", ["reference", "strict"])
def test_masks_due_before_the_first_window_ends_prune_nothing(policy: str) -> None:
    model, optimizer, pruner = run(30, delta_t=15, cooldown=25, mask_policy=policy)
    history: list[int] = []
    train(model, optimizer, 30, after=lambda: history.append(zeros(pruner)))
    wanted = pruner.n_weights - round(0.5 * pruner.n_weights)
    assert history == [0] * 15 + [wanted] * 15
    assert pruner.verify()["masked"]


def test_one_shot_waits_for_the_first_window() -> None:
    model, optimizer, pruner = run(30, delta_t=15, cooldown=25, schedule="one-shot")
    history: list[int] = []
    train(model, optimizer, 30, after=lambda: history.append(zeros(pruner)))
    wanted = pruner.n_weights - round(0.5 * pruner.n_weights)
    assert history == [0] * 15 + [wanted] * 15
    assert pruner.masks.frozen


def test_skipped_and_empty_windows_prune_nothing_until_gradients_come() -> None:
    model, optimizer, pruner = run(60, delta_t=4, cooldown=20)
    skip(model, optimizer, 9)
    optimizer.zero_grad()
    for _ in range(4):
        optimizer.step()
    assert zeros(pruner) == 0
    train(model, optimizer, 47)
    assert zeros(pruner) == pruner.n_weights - round(0.5 * pruner.n_weights)
    assert max(shares(pruner)) < 1


def test_what_is_known_is_part_of_the_saved_state() -> None:
    model, optimizer, pruner = run(8)
    train(model, optimizer, 5)
    _, _, other = run(8)
    other.load_state_dict(pruner.state_dict())
    other.finalize()
    pruner.finalize()
    assert all(torch.equal(a, b) for a, b in zip(pruner.masks.bits, other.masks.bits, strict=True))
