"""torch.compile around an optimizer's step: with a pruner in it the graph breaks, and every bit stays."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from models import batches, same
from torch import nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW, PinsSGD

CONFIG = PruneConfig(sparsity=0.75, delta_t=3, warmup=3, cooldown=6)
STEPS = 15


@pytest.mark.parametrize(
    ("optimizer_class", "backend"),
    [
        (PinsAdamW, "inductor"),
        (PinsSGD, "inductor"),
        (partial(torch.optim.AdamW, fused=True), "eager"),
        (partial(torch.optim.SGD, foreach=False), "inductor"),
    ],
)
def test_a_compiled_step_prunes_as_one_that_is_not(optimizer_class: Any, backend: str) -> None:
    torch.compiler.reset()
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 16))
        optimizer = optimizer_class(model.parameters(), lr=0.0625)
        pruner = Pruner(model, optimizer, CONFIG, STEPS)
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for x, y in batches(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                step()
        assert pruner.step == STEPS
        assert pruner.finalize()["zeros"] == 276
        models.append(model)
    assert same(*models)
