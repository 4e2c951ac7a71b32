"""The Pruner against a literal transcription of the released algorithm, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Network, train

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW
from pins_ext.reference import EagerPins

STEPS = 140
SIZES: dict[type, dict[str, int]] = {torch.optim.AdamW: {}, PinsAdamW: {"width": 16, "classes": 16}}


def pruned_run(delta_t: int, beta2: float, optimizer_class: type) -> tuple[Network, list[float | None]]:
    model = Network(**SIZES[optimizer_class])
    kwargs = {"foreach": False} if optimizer_class is torch.optim.AdamW else {}
    optimizer = optimizer_class(model.parameters(), lr=3e-3, weight_decay=0.01, **kwargs)
    config = PruneConfig(
        sparsity=0.8,
        beta2=beta2,
        delta_t=delta_t,
        warmup=20,
        cooldown=60,
        ties="reference",
        mask_policy="reference",
        parameter_set="released",
    )
    pruner = Pruner(model, optimizer, config, STEPS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    thresholds: list[float | None] = []

    def after() -> None:
        scheduler.step()
        thresholds.append(pruner.stats()["threshold"])

    train(model, optimizer, STEPS, after=after)
    return model, thresholds


def eager_run(delta_t: int, beta2: float, peer_of: type) -> tuple[Network, list[float | None]]:
    model = Network(**SIZES[peer_of])
    fused = peer_of is PinsAdamW
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, foreach=False, fused=fused)
    parts = ("attention.self", "attention.output.dense", "output.dense", "intermediate.dense")
    parameters = {n: p for n, p in model.named_parameters() if any(part in n for part in parts)}
    eager = EagerPins(parameters, STEPS, 20, 60, r_final=1 - 0.8, beta2=beta2, delta_t=delta_t)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    thresholds: list[float | None] = []

    def after() -> None:
        eager.after_step()
        scheduler.step()
        thresholds.append(eager.threshold)

    train(model, optimizer, STEPS, lambda: eager.before_step(optimizer.param_groups[0]["lr"]), after)
    return model, thresholds


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, PinsAdamW])
@pytest.mark.parametrize("beta2", [0.85, 0.99, 1, 0])
@pytest.mark.parametrize("delta_t", [1, 4, 10])
def test_weights_and_thresholds_equal_the_released_algorithm(delta_t: int, beta2: float, optimizer_class: type) -> None:
    expected, expected_thresholds = eager_run(delta_t, beta2, optimizer_class)
    model, thresholds = pruned_run(delta_t, beta2, optimizer_class)
    assert any(t is not None and t > 0 for t in thresholds)
    assert thresholds == expected_thresholds
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
    pruned = [p for n, p in model.named_parameters() if "layers" in n and "norm" not in n]
    assert sum(int((p == 0).sum()) for p in pruned) > 0.79 * sum(p.numel() for p in pruned)


class ReleasedPlaton(EagerPins):
    """PLATON as its released code computes it: |p g| with the weight after the optimizer's step, steps from 1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.t = 1

    @torch.no_grad()
    def after_step(self) -> None:
        for name, p in self.parameters.items():
            ipt, ea, eu = self.ipt[name], self.exp_avg_ipt[name], self.exp_avg_unc[name]
            c = (p * (p.grad if p.grad is not None else torch.zeros_like(p))).abs()
            local_step = self.t % self.delta_t
            if local_step == 0:
                ea.mul_(self.beta1).add_((1 - self.beta1) * ipt)
                eu.mul_(self.beta2).add_((1 - self.beta2) * (ipt - ea).abs())
                ipt.copy_(c)
            else:
                ipt.mul_(local_step).add_(c).div_(torch.tensor(float(local_step + 1)))
        super().after_step()


@pytest.mark.parametrize("delta_t", [1, 10])
def test_pins_update_is_platon_as_released(delta_t: int) -> None:
    """Bit for bit, once the count of steps begins at 1: its first window then holds one zero more."""

    def optimized(model: Network) -> torch.optim.Optimizer:
        return torch.optim.Adamax(model.parameters(), lr=3e-3, weight_decay=0.01, foreach=False)

    expected = Network()
    parts = ("attention.self", "attention.output.dense", "output.dense", "intermediate.dense")
    parameters = {n: p for n, p in expected.named_parameters() if any(part in n for part in parts)}
    eager = ReleasedPlaton(parameters, STEPS, 20, 60, r_final=1 - 0.8, delta_t=delta_t)
    train(expected, optimized(expected), STEPS - 1, after=eager.after_step)
    model = Network()
    optimizer = optimized(model)
    config = PruneConfig(
        sparsity=0.8, criterion="pins-update", delta_t=delta_t, warmup=20, cooldown=60, ties="reference",
        parameter_set="released",
    )  # fmt: skip
    pruner = Pruner(model, optimizer, config, STEPS)
    pruner.step = 1
    pruner.importance.accepted[0].fill_(1)
    train(model, optimizer, STEPS - 1)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert pruner.stats()["threshold"] == eager.threshold is not None
    assert pruner.stats()["sparsity"] > 0.79
