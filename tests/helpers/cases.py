"""Inputs of the operator tests: lists of tensors of awkward sizes, ugly values, and an exact comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATES = (torch.float32, torch.bfloat16)

# Sizes of the tensors of one list. 512 weights are a block, 16384 a chunk.
LISTS: dict[str, list[int]] = {
    "none": [],
    "empty": [0],
    "one": [1],
    "odd": [77],
    "block": [512, 1500],
    "chunk": [16384, 33333],
    "many": [1, 0, 63, 64, 65, 511, 513, 7, 0, 128] * 6,
}
VALUES = ("normal", "special", "equal", "zeros", "ties")

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    float("nan"),
    float("inf"),
    float("-inf"),
    1e-40,
    -1e-40,
    1e-45,
    3e38,
    -3e38,
    1e-20,
    1e20,
]


def tensor(n: int, dtype: torch.dtype, values: str = "normal", seed: int = 0, misaligned: bool = False) -> Tensor:
    """[n] weights: normal, all equal, zeros of both signs, a handful of bf16 values, or everything a float can be."""
    g = torch.Generator().manual_seed(seed * 7919 + n)
    x = torch.randn(n, generator=g)
    choice = torch.randint(0, 2**31, (n,), generator=g)
    if values == "equal":
        x = torch.full((n,), 0.37)
    elif values == "zeros":
        x = torch.where(choice % 2 == 0, 0.0, -0.0)
    elif values == "ties":
        x = (x * 2).round() / 2
    elif values == "special":
        ugly = torch.tensor(SPECIAL)[choice % len(SPECIAL)]
        x = torch.where(choice % 3 == 0, x, ugly)
    storage = torch.empty(n + 1, dtype=dtype)
    out = storage[1:] if misaligned else torch.empty(n, dtype=dtype)
    return out.copy_(x)


def tensors(
    sizes: Sequence[int], dtype: torch.dtype, values: str = "normal", seed: int = 0, misaligned: bool = False
) -> list[Tensor]:
    """One tensor per size."""
    return [tensor(n, dtype, values, seed * 1000 + i, misaligned) for i, n in enumerate(sizes)]


def clones(list_of_tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, to compare with what was there before."""
    return [t.clone() for t in list_of_tensors]


def index_of(layout: ops.Layout) -> list[Tensor]:
    """Global index of every weight, int64 [numel] per tensor."""
    return [ref.global_index(row) for row in layout.places]


def random_of(layout: ops.Layout, rng: Tensor) -> list[Tensor]:
    """32 random bits of every weight, int64 [numel] per tensor."""
    return [ref.random_bits(i, int(rng[0]), int(rng[1])) for i in index_of(layout)]


def folded_codes(averages: Sequence[tuple[Tensor, Tensor | None]], which: int) -> list[Tensor]:
    """One of the two averages of each tensor as a fold with `rng_of(1)` stores it in 8 bits."""
    found = [
        (x, ref.fold_bits(x.shape, int(rng_of(1)[0]))[which]) for pair in averages if (x := pair[which]) is not None
    ]
    return [ref.encode(x, False, bits, vanishes=True) for x, bits in found]


def rng_of(step: int) -> Tensor:
    """The `rng` argument of some step."""
    return torch.tensor(ref.rounding_key(seed=11, step=step, stream=0))


def masks_of(list_of_tensors: Sequence[Tensor], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Random boolean masks and their packed form."""
    g = torch.Generator().manual_seed(seed)
    masks = [torch.rand(t.shape, generator=g) < 0.6 for t in list_of_tensors]
    return masks, [ref.pack_bits(m) for m in masks]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same bits in every place, except that a NaN may be any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    width = {4: torch.int32, 2: torch.int16}[actual.element_size()]
    number = ~actual.isnan()
    different = actual[number].contiguous().view(width) != expected[number].contiguous().view(width)
    if different.any():
        got, wanted = (t[number][different][:3].tolist() for t in (actual, expected))
        raise AssertionError(f"{int(different.sum())} of {actual.numel()} differ, e.g. {got} != {wanted}")


def assert_all_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """`assert_same` for every tensor of two lists."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)
