"""A training whose gradients are drawn, and what it leaves: for tests of two ways to the same bits."""

from __future__ import annotations

from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from torch import Tensor, nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW, PinsSGD
from pins_ext.pruning.fused import FusedSlot

STEPS = 26


class Training:
    """A small model whose gradients are drawn, whatever its weights: runs that part company part for good."""

    def __init__(
        self, optimizer: str = "adamw", dtype: torch.dtype = torch.float32, device: str = "cpu", **settings: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(211, 101), nn.Linear(71, 33), nn.Linear(5, 1)).to(device, dtype)
        moments = settings.pop("moment_dtype", "float32")
        self.ugly = settings.pop("ugly", False)
        self.optimizer: PinsAdamW | PinsSGD
        if optimizer == "adamw":
            self.optimizer = PinsAdamW(self.model.parameters(), lr=1e-2, moment_dtype=moments)
        else:
            self.optimizer = PinsSGD(self.model.parameters(), lr=1e-2, momentum=0.9 if optimizer == "momentum" else 0)
        common = {"delta_t": 1, "sparsity": 0.7, "warmup": 3, "cooldown": 5, "include": ["*.weight"]}
        self.config = PruneConfig(**{**common, **settings})
        self.pruner = Pruner(self.model, self.optimizer, self.config, total_steps=STEPS)
        self.told: list[Any] = []

    def gradients(self, t: int) -> None:
        generator = torch.Generator().manual_seed(100 + t)
        for p in self.model.parameters():
            grad = torch.randn(p.shape, generator=generator)
            if self.ugly:
                grad[..., ::3] = 0  # ties
                grad.view(-1)[t % p.numel()] = float("nan")
            p.grad = grad.to(p.device, p.dtype)

    def step(self, t: int) -> None:
        self.gradients(t)
        self.optimizer.step()
        self.told.append((self.pruner.masks.counts(), self.pruner.masks.cutoff.tolist(), self.weights()))

    def weights(self) -> list[bytes]:
        return [p.detach().cpu().view(torch.uint8).numpy().tobytes() for p in self.model.parameters()]

    def tensors(self) -> list[Tensor]:
        """Weights, moments, masks, and of the importance what the next step reads."""
        states = [x for p in self.model.parameters() for x in self.optimizer.state[p].values() if isinstance(x, Tensor)]
        importance = self.pruner.importance
        kept = [*importance.ipt, *importance.exp_avg_ipt, *importance.exp_avg_unc, *importance.shadow]
        return [*self.model.parameters(), *states, *self.pruner.masks.bits, *kept]


def separately() -> Any:
    return patch.object(FusedSlot, "one_pass", PropertyMock(return_value=False))


def same(one: Training, other: Training) -> None:
    assert one.told == other.told
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(a.detach().cpu().view(torch.uint8), b.detach().cpu().view(torch.uint8))


def train(run: Training, steps: range = range(STEPS)) -> Training:
    for t in steps:
        run.step(t)
    return run
