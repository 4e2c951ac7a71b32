"""What is measured on: shapes of real models, and random tensors with scores of a given spread. Never zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .shapes import DTYPES as NAMES
from .shapes import Shape, shapes_of

DTYPES = dict(zip(NAMES, (torch.float32, torch.bfloat16, torch.float16), strict=True))

_PIECE = 1 << 22


@dataclass(frozen=True)
class Problem:
    """One set of tensors to measure on.

    Attributes:
        name: of the shapes.
        shapes: of the tensors.
        dtype: of weights, gradients and moments; bfloat16 and float16 weights keep bfloat16 states.
        device: of the tensors.
        seed: of their random values.
        scores: one of SCORES.
        ratio: remaining ratio of the selection.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    device: torch.device
    scores: str = "lognormal-4"
    ratio: float = 0.2
    seed: int = 0

    @property
    def weights(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.float32 else torch.bfloat16

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of a weight and of a state."""
        return self.dtype.itemsize, self.state_dtype.itemsize

    @property
    def n_prune(self) -> int:
        return self.weights - round(self.ratio * self.weights)

    def turned(self, turn: int) -> Problem:
        """The same with other random numbers, for buffers that rotate."""
        return replace(self, seed=self.seed + 101 * turn)

    def smaller(self, most: int) -> Problem:
        """The same with about this many weights at most."""
        return self if self.weights <= most else replace(self, shapes=shapes_of(self.name, most))


class Draw:
    """Random tensors of a problem; the same seed gives the same numbers. On the CPU every piece is drawn in float32."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._generator = torch.Generator(problem.device).manual_seed(problem.seed)

    def normal(self, std: float = 1.0, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Weights or gradients, mean 0."""
        return self._fill(dtype or self.problem.dtype, lambda x: x.mul_(std))

    def positive(self, octaves: float, middle: float = -20.0, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Moments and averages: 2^N(middle, octaves^2)."""
        return self._fill(
            dtype or self.problem.state_dtype, lambda x: x.mul_(octaves * math.log(2)).add_(middle * math.log(2)).exp_()
        )

    def states(self) -> tuple[list[Tensor], list[Tensor]]:
        """Two averages whose product is the score, distributed as `problem.scores` says."""
        kind = self.problem.scores
        spread = {"lognormal-1": 1.0, "lognormal-8": 8.0}.get(kind, 4.0) / math.sqrt(2)
        a, b = self.positive(spread), self.positive(spread)
        for x, y in zip(a, b, strict=True):
            if kind == "zeros-80":
                for piece in x.view(-1).split(_PIECE):
                    dropped = torch.rand(piece.shape, generator=self._generator, device=piece.device) < 0.8
                    piece.masked_fill_(dropped, 0)
            elif kind == "equal":
                x.fill_(2.0**-20)
                y.fill_(2.0**-20)
            elif kind == "bf16-ties":
                for piece in (*x.view(-1).split(_PIECE), *y.view(-1).split(_PIECE)):
                    piece.copy_(piece.bfloat16())
        return a, b

    def _fill(self, dtype: torch.dtype, transform: Callable[[Tensor], Tensor]) -> list[Tensor]:
        tensors = list(self._empty(dtype))
        for tensor in tensors:
            for piece in tensor.view(-1).split(_PIECE):
                piece.copy_(transform(torch.randn(piece.shape, generator=self._generator, device=piece.device)))
        return tensors

    def _empty(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Uninitialised tensors; misaligned ones begin one element past an allocation's start."""
        for shape in self.problem.shapes:
            shift = int(self.problem.name == "misaligned")
            buffer = torch.empty(math.prod(shape) + shift, dtype=dtype, device=self.problem.device)
            yield buffer[shift:].view(shape)


def masks_of(problem: Problem, tensors: list[Tensor], density: float = 0.2) -> list[Tensor]:
    """Random packed masks that keep this share: uint8, as `ops.new_mask` lays them out."""
    from pins_ext import ops, reference

    generator = torch.Generator(problem.device).manual_seed(problem.seed + 1)
    masks = []
    for tensor in tensors:
        mask = ops.new_mask(tensor)
        for begin in range(0, tensor.numel(), _PIECE):
            n = min(_PIECE, tensor.numel() - begin)
            keep = torch.rand(n, generator=generator, device=problem.device) < density
            bits = reference.pack_bits(keep)
            mask[begin // 8 : begin // 8 + bits.numel()] = bits
        masks.append(mask)
    return masks
