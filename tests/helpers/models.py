"""Small models and one training loop, shared by the tests of the pruning floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.optim import PinsAdamW, PinsSGD
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.pruner import Pruner

STEPS = 60
CONFIG = PruneConfig(sparsity=0.8, delta_t=5, warmup=5, cooldown=20)


class Block(nn.Module):
    """A residual block named as BERT names its parts, so that the released parameter set finds it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": nn.Linear(width, width), "output": nn.ModuleDict({"dense": nn.Linear(width, width)})}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 2 * width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(2 * width, width)})
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """x: float [batch, width]."""
        x = x + self.attention["output"]["dense"](torch.tanh(self.attention["self"](x)))
        return self.norm(x + self.output["dense"](torch.relu(self.intermediate["dense"](x))))


class Network(nn.Module):
    """Blocks between an embedding and a classifier.

    Odd sizes by default. With `width` and `classes` of 16 every tensor is whole AVX-512 vectors: torch's fused AdamW
    rounds the rest of a last, partial vector differently from the vectors before it.
    """

    def __init__(self, width: int = 13, blocks: int = 2, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(7, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: float [batch, 7]; logits [batch, classes]."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def batches(steps: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches for everyone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(8, 7, generator=generator), torch.randint(3, (8,), generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
    seed: int = 1,
    skip: int = 0,
) -> None:
    """Train; `before` and `after` surround each optimizer step. The first `skip` batches are passed over."""
    for i, (x, y) in enumerate(batches(steps, seed)):
        if i < skip:
            continue
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if before is not None:
            before()
        optimizer.step()
        if after is not None:
            after()


def start(
    config: PruneConfig = CONFIG, optimizer_class: Any = PinsAdamW, **options: Any
) -> tuple[Network, Any, Pruner]:
    """A network of whole vectors, its optimizer and its pruner for a run of STEPS steps."""
    model = Network(16, classes=16)
    optimizer = optimizer_class(model.parameters(), **({"lr": 3e-3} | options))
    return model, optimizer, Pruner(model, optimizer, config, STEPS)


def exact(pruner: Pruner) -> int:
    """How many zeros there must be in the end."""
    return pruner.n_weights - round((1 - pruner.config.sparsity) * pruner.n_weights)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models are equal to the last bit."""
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def zeros(pruner: Pruner) -> int:
    """Zeros in the pruned parameters."""
    return sum(int((p == 0).sum()) for p in pruner.parameters)


# torch's unfused AdamW takes its square root from a library that is not correctly rounded; its fused one is.
FUSED_AND_HOOKED = [
    (PinsAdamW, partial(torch.optim.AdamW, fused=True), {"weight_decay": 0.01}),
    (
        PinsSGD,
        partial(torch.optim.SGD, foreach=False),
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    (PinsSGD, partial(torch.optim.SGD, foreach=False), {"lr": 0.05, "momentum": 0.8, "dampening": 0.1}),
    (PinsSGD, partial(torch.optim.SGD, foreach=False), {"lr": 0.05}),
]
WITHOUT_MOMENTS = {"lr": 0.05}
