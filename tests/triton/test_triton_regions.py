"""The Triton operator that counts regions, against plain tensors, interpreted and on a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATS, STATES, tensors
from region_counts import counted, keys_and_indices, mixed_brackets
from torch import Tensor
from triton_lists import LISTS, SHARD_SIZES, SHARDS, WARNINGS, layout_of, on, tables

from pins_ext import ops

pytestmark = WARNINGS

KINDS = [(s, d) for s in ("product", "deviation") for d in STATES] + [
    (s, d) for s in ("identity", "magnitude") for d in FLOATS
]


def check(device: str, score: str, a: list[Tensor], b: list[Tensor], layout: ops.Layout, turns: range) -> None:
    regions = torch.tensor([i % 3 for i in range(len(a))], dtype=torch.int64)
    keys, indices = keys_and_indices(score, a, b, layout)
    (a_, b_), work = on(device, a, b), tables(layout, device)
    for turn, brackets in enumerate(mixed_brackets(keys, indices, regions, bins=64) if len(a) else []):
        if turn in turns:
            counts = torch.full((len(brackets), 65), -1, device=device)
            own = regions.to(device), brackets.to(device)
            torch.ops.pins_ext.count_regions_(counts, a_, b_, *work, score, *own)
            assert torch.equal(counts.cpu(), counted(keys, indices, regions, brackets, 64))


@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_count_regions_kernel(device: str, score: str, dtype: torch.dtype) -> None:
    a = tensors([700, 1539, 0, 77], dtype, "special", seed=1)
    b = tensors([700, 1539, 0, 77], dtype, "special", seed=2) if score in ("product", "deviation") else []
    check(device, score, a, b, layout_of(a), range(1, 5))


@pytest.mark.parametrize("sizes", [name for name in LISTS if name not in ("none", "many")])
def test_count_regions_kernel_sizes(device: str, sizes: str) -> None:
    a = [(x * 2).round() / 2 for x in tensors(LISTS[sizes], torch.float32, seed=3)]
    check(device, "identity", a, [], layout_of(a), range(0, 6, 2) if sizes == "chunks" else range(6))


def test_count_regions_kernel_shards(device: str) -> None:
    a = [
        (x * 2).round().view(s)
        for x, s in zip(
            tensors([torch.Size(s).numel() for s in SHARD_SIZES], torch.float32, seed=4), SHARD_SIZES, strict=True
        )
    ]
    check(device, "identity", a, [], layout_of(a, SHARDS), range(6))
