"""The selection over many ranks: the cutoff of one process, and how many collectives it costs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from allocations import allocated
from ranks import run
from sharded import counted_collectives
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.select import select
from pins_ext.distributed.shards import local, shard_of

SELECT = import_module("pins_ext.distributed.select")

SHAPES = [(64, 48), (7, 33), (1, 5), (130, 70)]


def scores(kind: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if kind == "ties":  # most are zero, some are one of three values
        made = [((x.abs() * 2).floor() / 2 * (x > 0.3)).float() for x in made]
    return made


@contextmanager
def limited(limits: dict[str, int]) -> Iterator[None]:
    """With other limits of the module than its own."""
    with ExitStack() as stack:
        for name, limit in limits.items():
            stack.enter_context(patch.object(SELECT, name, limit))
        yield


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


def selects(how: str, expected: dict[tuple[str, int, bool], list[int]], limits: dict[str, int]) -> int:
    with limited(limits):
        return selects_with(how, expected)


def selects_with(how: str, expected: dict[tuple[str, int, bool], list[int]]) -> int:
    for (kind, n, exact), cutoff in expected.items():
        full = scores(kind, seed=1)
        ranks, parts, layout = spread(full, how)
        total = sum(x.numel() for x in full)
        assert int(ranks.sum(torch.tensor(sum(parts[i].numel() for i in ranks.owned)))) == total
        assert chosen(ranks, parts, layout, n, total, exact=exact) == cutoff, (kind, n, exact)
    return len(expected)


def collectives(how: str) -> list[dict[str, int]]:
    """A bracket that holds, one that the threshold has left, none; a bin and a key of too many weights."""
    told = []

    def tell(full: list[Tensor], n: int, cutoff: list[int], bracket: Tensor | None = None, **limits: int) -> None:
        ranks, parts, layout = spread(full, how)
        with limited(limits), counted_collectives() as counts:
            assert chosen(ranks, parts, layout, n, sum(x.numel() for x in full), bracket=bracket) == cutoff
        told.append(dict(counts))

    full = scores("normal", seed=1)
    total = sum(x.numel() for x in full)
    ranks, parts, layout = spread(full, how)
    cutoff, wide = (chosen(ranks, parts, layout, n, total) for n in (total // 2, 9 * total // 10))
    near = ops.bracket_around(torch.tensor(cutoff))
    far = near.clone()
    far[:2] += 1 << 24
    for bracket in (near, far, None):
        tell(full, total // 2, cutoff, bracket)
    tell(full, 9 * total // 10, wide, ROOM=1, GATHERED=2)
    zeros = [torch.zeros(100, 200) for _ in SHAPES]
    for limits in (
        {"GATHERED": dist.get_world_size() << 17},
        {"GATHERED": 1 << 15},
        {"GATHERED": 1 << 15, "LISTED": 1 << 14},
    ):
        tell(zeros, 23_123, [1 << 31, 23_123], **limits)
    return told


def without_a_warning() -> list[int]:
    full = scores("normal", seed=1)
    ranks, parts, layout = spread(full, "rows")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return chosen(ranks, parts, layout, 100, sum(x.numel() for x in full))


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
    assert run(size, selects, how, expected, {}) == [len(expected)] * size


@pytest.mark.parametrize(
    ("size", "how", "listed"),
    [
        (2, "columns", 1 << 20),
        (2, "rows", 0),
        pytest.param(4, "mesh", 500, marks=pytest.mark.slow),
        pytest.param(6, "mesh", 50, marks=pytest.mark.slow),
    ],
)
def test_the_cutoff_where_too_many_weights_are_in_a_bin(size: int, how: str, listed: int) -> None:
    expected = expectations()
    assert run(size, selects, how, expected, {"ROOM": 1, "GATHERED": 2, "LISTED": listed}) == [len(expected)] * size


@pytest.mark.parametrize(
    ("size", "how"),
    [
        (2, "rows"),
        pytest.param(3, "columns", marks=pytest.mark.slow),
        pytest.param(4, "mesh", marks=pytest.mark.slow),
        pytest.param(6, "mesh", marks=pytest.mark.slow),
    ],
)
def test_one_all_reduce_and_one_all_gather(size: int, how: str) -> None:
    """Of tensors cut over two dimensions of a mesh, over one, and over none, together."""
    once = {"all_reduce": 1, "all_gather": 1}
    for near, far, first, narrow, zeros, many, unlisted in run(size, collectives, how):
        assert near == first == zeros == once
        assert far == {"all_reduce": 2, "all_gather": 1}
        # One more finds the key, and none of its weights is pruned.
        assert narrow == {"all_reduce": 2}
        # The key takes one more, and the tie among 80,000 two in place of the gathering.
        assert many == unlisted == {"all_reduce": 4}


def test_no_name_of_torch_is_used_that_it_warns_of() -> None:
    first, second = run(2, without_a_warning)
    assert first == second


def tied(weights: int, count: int) -> Tensor:
    """Scores of which so many are one, in the middle, and no other is met twice."""
    made = torch.arange(1.0, weights + 1) / weights
    made[torch.arange(count) * (weights // count)] = 0.5
    return made.reshape(-1, 512)


def asked_for(limits: dict[str, int]) -> list[tuple[int, int]]:
    """Bytes that a rank asks for in selections of every kind, and what is planned."""
    mesh, size, told = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_world_size(), []
    with limited(limits):
        room = max(SELECT.ROOM, SELECT.GATHERED // size)
        weights = 3 * size * SELECT.LISTED
        # In turn: few, as many as are gathered, more, as many as a rank lists (on each with one more), and all.
        for count in (16, room - size, room + size, size * (SELECT.LISTED - 2), weights):
            tensor = distribute_tensor(tied(weights, count), mesh, [Shard(0)])
            layout = ops.Layout.of([local(tensor)], [shard_of("0", tensor)])
            ranks, n = Ranks([tensor]), int((tensor.full_tensor() < 0.5).sum()) + count // 2
            for bracket in (None, ops.bracket_around(torch.tensor([0xBF000000, 0]))):
                search = partial(chosen, ranks, [local(tensor)], layout, n, weights, bracket=bracket)
                told.append((allocated(search), SELECT.most_bytes(size, [local(tensor).numel()], weights)))
    return told


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_a_rank_asks_for_is_planned(size: int) -> None:
    """Within 5 %: gloo frees its copy of what was sent, 4 % of that, when it likes to."""
    told = run(size, asked_for, {})
    planned = told[0][0][1]
    assert all(asked <= 1.05 * planned for each in told for asked, _ in each)
    assert max(asked for each in told for asked, _ in each) >= 0.95 * planned
