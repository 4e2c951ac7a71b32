"""One window of pruning on random weights: accumulate, fold with counts, select, pack."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from cases import assert_all_same, rng_of, tensors
from torch import Tensor

from pins_ext import ops

pins = torch.ops.pins_ext
# A few hundred chunks, so that programs take several; odd ends; tensors of one chunk and less.
SIZES = [5_000_003, 1, 0, 16384, 99_991, 64, 777]


@dataclass
class Model:
    """The tensors of a model of random weights, and one window of pruning on them."""

    device: str
    dtype: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    values: str = "normal"
    sizes: list[int] = field(default_factory=lambda: SIZES)
    misaligned: bool = False

    def __post_init__(self) -> None:
        def random(dtype: torch.dtype, seed: int) -> list[Tensor]:
            made = tensors(self.sizes, dtype, self.values, seed, self.misaligned)
            if self.device == "cpu" or not self.misaligned:
                return [x.to(self.device) for x in made]
            return [torch.empty(x.numel() + 1, dtype=dtype, device=self.device)[1:].copy_(x) for x in made]

        self.params, self.grads = random(self.dtype, 1), random(self.dtype, 2)
        self.ipt, self.mean, self.unc = (random(self.state, seed) for seed in (3, 4, 5))
        layout = ops.Layout.of(self.params, base=(1 << 32) - 3_000_000)
        self.work = layout.places, layout.chunks
        self.masks = [ops.new_mask(p) for p in self.params]
        self.lr = torch.linspace(1e-5, 1e-3, len(self.sizes), device=self.device)
        self.one, self.rng = torch.ones(1, device=self.device), rng_of(1).to(self.device)
        self.n_prune = torch.tensor(sum(self.sizes) * 4 // 5, device=self.device)
        self.bracket = ops.bracket_around(torch.tensor([0x80000000 + (120 << 23), 0], device=self.device), octaves=4)
        self.counts = torch.zeros(1 + ops.BINS, dtype=torch.int64, device=self.device)
        self.stats = torch.zeros(len(self.sizes), 3, dtype=torch.int64, device=self.device)
        self.threshold = torch.zeros(2, dtype=torch.int64, device=self.device)

    def pointers(self, *lists: list[Tensor]) -> Tensor:
        return torch.tensor([[x.data_ptr() for x in row] for row in lists], device=self.device)

    def accumulate(self) -> None:
        args = (self.ipt, self.params, self.grads, *self.work, self.lr, self.one, self.rng, "pins")
        pins.accumulate_(*args, grad_scale=2 * self.one, clip=self.one / 3, found_inf=0 * self.one)

    def fold(self, pointers: Tensor | None = None) -> None:
        args = (self.mean, self.unc, self.ipt, *self.work, self.one, self.rng, 0.85, 0.95)
        pins.fold_(*args, bracket=self.bracket, counts=self.counts, pointers=pointers)

    def select(self, pointers: Tensor | None = None) -> None:
        args = (self.mean, self.unc, *self.work, "product", self.n_prune)
        counts = {"bracket": self.bracket, "counts": self.counts.clone()}
        self.threshold.copy_(pins.select(*args, **counts, pointers=pointers))

    def pack(self, pointers: Tensor | None = None) -> None:
        args = (self.masks, self.stats, self.mean, self.unc, *self.work, "product", self.threshold[None])
        pins.pack_(*args, pointers=pointers)

    def window(self) -> None:
        self.accumulate()
        self.fold()
        self.select()
        self.pack()

    def state_on_cpu(self) -> tuple[list[Tensor], list[Tensor]]:
        """Floating-point states, and everything that counts."""
        counts = [*self.masks, self.counts, self.threshold, self.stats]
        return [x.cpu() for x in (*self.ipt, *self.mean, *self.unc)], [x.cpu() for x in counts]


def assert_same_state(actual: Model, expected: Model) -> None:
    (floats, counts), (expected_floats, expected_counts) = actual.state_on_cpu(), expected.state_on_cpu()
    assert_all_same(floats, expected_floats)
    for x, y in zip(counts, expected_counts, strict=True):
        assert torch.equal(x, y)
