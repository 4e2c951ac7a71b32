"""Steps in which some parameters have no gradient: experts that nothing is routed to, layers that are dropped."""

from __future__ import annotations

import gc
import random
from functools import partial
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, batches
from torch import nn

from pins_ext import Pruner
from pins_ext.ops import Layout
from pins_ext.optim import PinsAdamW, PinsSGD


def layouts() -> int:
    """Layouts that are alive: of the tables that the operators read, the only ones that grow with the model."""
    gc.collect()
    return sum(type(each) is Layout for each in gc.get_objects())


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("optimizer_class", [PinsAdamW, PinsSGD, partial(torch.optim.AdamW, foreach=False)])
def test_random_subsets_without_a_gradient_take_no_more_memory_with_every_step(
    optimizer_class: Any, pruned: bool
) -> None:
    model, drawn = Network(16, classes=16, blocks=3), random.Random(0)
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, CONFIG, STEPS) if pruned else None
    seen = []
    for i, (x, y) in enumerate(batches(50)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            if drawn.random() < 0.5:
                p.grad = None
        optimizer.step()
        if i in (7, 8, 9, 48, 49):
            seen.append(layouts())
    # No more than what two steps ask for.
    assert max(seen[3:]) <= max(seen[:3]) + 2
    assert pruner is None or pruner.step == 50
