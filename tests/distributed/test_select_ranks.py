"""The selection over many ranks: the cutoff of one process, and how many collectives it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from sharded import counted_collectives
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.select import select
from pins_ext.distributed.shards import local, shard_of

SHAPES = [(64, 48), (7, 33), (1, 5), (130, 70)]


def scores(kind: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if kind == "ties":  # most are zero, some are one of three values
        made = [((x.abs() * 2).floor() / 2 * (x > 0.3)).float() for x in made]
    return made


def spread(full: list[Tensor], how: str) -> tuple[Ranks, list[Tensor], ops.Layout]:
    """The ranks, this rank's parts and their layout; on a mesh each tensor is cut in another way."""
    size = dist.get_world_size()
    if how == "rows":
        mesh = init_device_mesh("cpu", (size,))
        placements = [(Shard(0),)] * 4
    elif how == "columns":
        mesh = init_device_mesh("cpu", (size,))
        placements = [(Shard(1),)] * 4
    else:
        mesh = init_device_mesh("cpu", (2, size // 2))
        placements = [
            (Shard(0), Shard(1)),
            (Shard(0), Shard(0)),
            (Replicate(), Shard(1)),
            (Replicate(), Replicate()),
        ]
    tensors = [distribute_tensor(x, mesh, p) for x, p in zip(full, placements, strict=True)]
    ranks = Ranks(tensors)
    parts = [local(t) for t in tensors]
    shards = [shard_of(str(i), t) for i, t in enumerate(tensors)]
    return ranks, parts, ops.Layout.of(parts, shards)


def chosen(ranks: Ranks, parts: list[Tensor], layout: ops.Layout, n: int, total: int, **options: Any) -> list[int]:
    owned = [parts[i] for i in ranks.owned]
    cutoff = select(ranks, owned, [], layout.subset(ranks.owned), "identity", torch.tensor(n), total, **options)
    return cutoff.tolist()


def selects(how: str, expected: dict[tuple[str, int, bool], list[int]]) -> int:
    for (kind, n, exact), cutoff in expected.items():
        full = scores(kind, seed=1)
        ranks, parts, layout = spread(full, how)
        total = sum(x.numel() for x in full)
        assert int(ranks.sum(torch.tensor(sum(parts[i].numel() for i in ranks.owned)))) == total
        assert chosen(ranks, parts, layout, n, total, exact=exact) == cutoff, (kind, n, exact)
    return len(expected)


def collectives() -> list[dict[str, int]]:
    """A bracket that holds, one that the threshold has left, none, and ties by the thousand."""
    told = []
    full = scores("normal", seed=1)
    total = sum(x.numel() for x in full)
    ranks, parts, layout = spread(full, "rows")
    cutoff = torch.tensor(chosen(ranks, parts, layout, total // 2, total))
    near, far = ops.bracket_around(cutoff), ops.bracket_around(cutoff, octaves=0.125) + 0
    far[:2] += 1 << 24
    for bracket in (near, far, None):
        with counted_collectives() as counts:
            assert chosen(ranks, parts, layout, total // 2, total, bracket=bracket) == cutoff.tolist()
        told.append(dict(counts))
    full = [torch.zeros(300, 200) for _ in SHAPES]
    ranks, parts, layout = spread(full, "rows")
    with counted_collectives() as counts:
        key = (1 << 31) + 0
        assert chosen(ranks, parts, layout, 70_123, 240_000) == [key, 70_123]
    told.append(dict(counts))
    return told


def expectations() -> dict[tuple[str, int, bool], list[int]]:
    """What one process finds."""
    found = {}
    for kind in ("normal", "ties"):
        full = scores(kind, seed=1)
        layout = ops.Layout.of(full)
        total = sum(x.numel() for x in full)
        for n in (0, 1, total // 3, total // 2, total - 7, total - 1, total):
            for exact in (True, False):
                cutoff = torch.ops.pins_ext.select(
                    full, [], layout.places, layout.chunks, "identity", torch.tensor(n), exact
                )
                found[kind, n, exact] = cutoff.tolist()
    return found


@pytest.mark.parametrize(
    ("size", "how"),
    [
        (2, "rows"),
        (2, "columns"),
        (4, "mesh"),
        *(pytest.param(n, "rows", marks=pytest.mark.slow) for n in (3, 6, 8)),
        *(pytest.param(n, "mesh", marks=pytest.mark.slow) for n in (6, 8)),
    ],
)
def test_the_cutoff_is_that_of_one_process(size: int, how: str) -> None:
    expected = expectations()
    assert len({tuple(cutoff) for cutoff in expected.values()}) > 12
    assert run(size, selects, how, expected) == [len(expected)] * size


def test_one_all_reduce_and_one_all_gather() -> None:
    for near, far, first, tied in run(2, collectives):
        assert near == {"all_reduce": 1, "all_gather_into_tensor": 1}
        assert far == {"all_reduce": 2, "all_gather_into_tensor": 1}
        # Of all keys a bin is too wide: its candidates may be too many, and are then counted once more.
        assert first["all_reduce"] <= 3
        assert first["all_gather_into_tensor"] == 1
        # The one key is found by two passes more, the tie among 240,000 by two.
        assert tied["all_reduce"] <= 5
