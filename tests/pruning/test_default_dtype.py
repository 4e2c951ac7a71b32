"""Training under another default dtype or device: what pruning keeps and hands over has its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, batches, exact, same
from torch import nn

from pins_ext import Pruner
from pins_ext.optim import PinsAdamW, PinsSGD

OPTIMIZERS = [PinsAdamW, PinsSGD, partial(torch.optim.AdamW, fused=True), partial(torch.optim.SGD, foreach=False)]


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The dtype; float32 is the default again afterwards."""
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_the_default_dtype_changes_nothing(optimizer_class: Any, default_dtype: torch.dtype) -> None:
    models = []
    for dtype in (torch.float32, default_dtype):
        model, data = Network(16, classes=16), list(batches(STEPS))
        torch.set_default_dtype(dtype)
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        pruner = Pruner(model, optimizer, CONFIG, STEPS)
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert pruner.finalize()["zeros"] == exact(pruner)
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize(
    "more", [{}, {"scope": "layer"}, {"pattern": "4x1"}, {"min_density": 0.1}, {"criterion": "fisher"}]
)
def test_the_default_device_changes_nothing(optimizer_class: Any, more: dict[str, Any]) -> None:
    """On one that holds no numbers, every tensor of the host's own would fail."""
    if more.get("criterion") == "fisher" and optimizer_class not in OPTIMIZERS[::2]:
        pytest.skip("only Adam has second moments")
    models = []
    for device in ("cpu", "meta"):
        model, data = Network(16, classes=16), list(batches(STEPS))
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        for x, y in data[:1]:  # torch's own optimizers make their states where the default says
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.device(device):
            pruner = Pruner(model, optimizer, dataclasses.replace(CONFIG, **more), STEPS)
            for x, y in data:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            pruner.finalize()
        models.append(model)
    assert same(*models)
