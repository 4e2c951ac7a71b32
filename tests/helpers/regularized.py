"""A small classifier and its training, shared by the tests of self-regularization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pins_ext.regularization.self_regularizer import SelfRegularizer


class Net(nn.Module):
    """A classifier with dropout, tied weights, a batch norm's buffers; it returns a dict and computes its own loss."""

    def __init__(self, classes: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6, dtype=dtype)
        self.again = nn.Linear(6, 6, bias=False, dtype=dtype)
        self.again.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6, dtype=dtype)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.dropout = nn.Dropout(0.3)
        self.classifier = nn.Linear(6, classes, dtype=dtype)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(self.dropout(torch.tanh(self.norm(self.again(torch.tanh(self.first(x)))))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def batches(steps: int, start: int = 0) -> list[dict[str, Tensor]]:
    result = []
    for i in range(start, start + steps):
        generator = torch.Generator().manual_seed(i)
        x, labels = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        result.append({"x": x, "labels": labels})
    return result


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(
    model: nn.Module, reg: SelfRegularizer | None, steps: int, start: int = 0, optimizer: Any = None
) -> list[Any]:
    """Train with an explicit regularizer; the model's weights after each step."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.05)
    history = []
    for inputs in batches(steps, start):
        outputs = model(**inputs)
        loss = outputs["loss"] if reg is None else reg(outputs, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if reg is not None:
            reg.step()
        history.append(weights(model))
    return history
