"""Small models and one training loop, shared by the tests of the pruning floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


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


def zeros(pruner) -> int:  # type: ignore[no-untyped-def]
    """Zeros in the pruned parameters."""
    return sum(int((p == 0).sum()) for p in pruner.parameters)
