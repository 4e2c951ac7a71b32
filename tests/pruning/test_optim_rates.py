"""Learning rates that live on a device are never read by the host, and do what numbers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CONFIG, Network, batches, same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pins_ext import Pruner
from pins_ext.optim import PinsAdamW, PinsSGD, adamw, sgd, step

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in READS
        return function(*args, **(kwargs or {}))


def run(optimizer_class: Any, lr: Any, options: dict[str, Any]) -> tuple[nn.Module, int]:
    """Weights after a few dense steps of two groups, and how often the host read a tensor in the optimizer's steps."""
    model = Network(16, classes=16)
    parameters = list(model.parameters())
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": lr / 2}]
    optimizer = optimizer_class(groups, lr=lr, **options)
    pruner, reads = Pruner(model, optimizer, CONFIG, 60), 0
    for x, y in batches(4):  # before the first mask
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with Reads() as counted:
            optimizer.step()
        reads += counted.count
    assert float(pruner.importance.ipt[0].sum()) > 0
    return model, reads


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(PinsAdamW, {}), (PinsSGD, {"momentum": 0.9})],
)
def test_a_rate_on_the_device_is_not_read(
    optimizer_class: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, _ = run(optimizer_class, 0.01, options)

    def host_rate(lr: Any) -> float | None:
        return None if isinstance(lr, Tensor) else float(lr)

    for module in (adamw, sgd, step):
        if hasattr(module, "host_rate"):
            monkeypatch.setattr(module, "host_rate", host_rate)
    tensors, reads = run(optimizer_class, torch.tensor(0.01, dtype=torch.float64), options)
    assert reads == 0
    assert same(numbers, tensors)


def test_rates_of_several_kinds_in_one_column() -> None:
    shared = torch.tensor(0.5)
    found = step.scalars_on([0.1, shared, torch.tensor(2.0), shared], torch.device("cpu"))
    assert found.dtype == torch.float64
    assert found.tolist() == [0.1, 0.5, 2.0, 0.5]
