"""Importance in 8 bits over many windows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pins_ext import PruneConfig, Pruner

STEPS = 500


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_weights_without_gradients_lose_their_importance(state_dtype: str) -> None:
    """All but one input of a layer die early; what another layer has is small, but there to the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = PruneConfig(
        sparsity=0.5, criterion="platon", delta_t=1, warmup=STEPS - 30, cooldown=20, state_dtype=state_dtype
    )
    pruner = Pruner(model, optimizer, config, STEPS)
    generator = torch.Generator().manual_seed(1)
    for t in range(STEPS):
        gradients = torch.randn(64, 32, generator=generator), torch.randn(32, 64, generator=generator) * 1e-3
        if t >= 20:
            gradients[0][:, 1:] = 0
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        optimizer.step()
    pruner.finalize()
    assert not pruner.mask("0.weight")[:, 1:].any()
