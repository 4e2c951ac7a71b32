"""count_regions_ and the cutoffs of many regions against a stable sort, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cases import FLOATS, STATES, VALUES, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from region_counts import counted, keys_and_indices, mixed_brackets
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext
KINDS = [(s, d) for s in ("product", "deviation") for d in STATES] + [
    (s, d) for s in ("identity", "magnitude") for d in FLOATS
]
SHARDS = [ops.Shard((9, 3000), (3, 100)), None, ops.Shard((5, 7, 11), (1, 2, 3)), ops.Shard((40000,), (700,)), None]
SHAPES = [(5, 2500), (1000,), (3, 4, 6), (33000,), (0,)]


@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_counts(score: str, dtype: torch.dtype) -> None:
    for values in VALUES:
        sizes = [torch.Size(s).numel() for s in SHAPES]
        a = [x.view(s) for x, s in zip(tensors(sizes, dtype, values, seed=1), SHAPES, strict=True)]
        b = [x.view(s) for x, s in zip(tensors(sizes, dtype, values, seed=2), SHAPES, strict=True)]
        b = b if score in ("product", "deviation") else []
        layout, regions = ops.Layout.of(a, SHARDS, base=(1 << 33) - 50), torch.tensor([3, 0, 3, 1, 2])
        keys, indices = keys_and_indices(score, a, b, layout)
        for brackets in mixed_brackets(keys, indices, regions, bins=256):
            counts = torch.full((4, 257), -1)
            pins.count_regions_(counts, a, b, layout.places, layout.chunks, score, regions, brackets)
            assert torch.equal(counts, counted(keys, indices, regions, brackets, 256))


class One:
    """Tensors in regions, and what finds their cutoffs."""

    def __init__(self, scores: Sequence[Tensor], regions: Sequence[int], exact: bool = True) -> None:
        self.scores, self.of = list(scores), list(regions)
        self.layout = ops.Layout.of(self.scores, base=1000)
        self.search = ops.Search(self._count, exact)

    def _count(self, counts: Tensor, brackets: Tensor) -> Tensor:
        rows = torch.tensor(self.of if len(brackets) == 1 + max(self.of) else range(len(self.of)))
        args = (self.scores, [], self.layout.places, self.layout.chunks, "identity", rows, brackets)
        pins.count_regions_(counts, *args)
        return counts

    @property
    def regions(self) -> ops.Regions:
        members = [[i for i, r in enumerate(self.of) if r == region] for region in range(1 + max(self.of))]
        spans = [self.layout.span(i) for i in range(len(self.of))]
        ends = [(min(spans[i][0] for i in own), max(spans[i][1] for i in own)) for own in members]
        totals = [sum(self.scores[i].numel() for i in own) for own in members]
        return ops.Regions.of(ends, totals, torch.device("cpu"))

    def expected(self, region: int, n: int) -> tuple[int, int]:
        own = [i for i, r in enumerate(self.of) if r == region]
        keys = torch.cat([ref.order_key(self.scores[i]) for i in own])
        index = torch.cat([ref.global_index(self.layout.places[i]).flatten() for i in own])
        if not self.search.exact:
            n = min(n, keys.numel())
        threshold = ref.select(keys, index, n, self.search.exact)
        if self.search.exact and 0 < n < keys.numel() and int((keys < threshold[0]).sum()) == n:
            return threshold[0], 0  # no weight of the key is pruned
        return threshold


@settings(max_examples=150, deadline=None)
@given(
    levels=st.sampled_from([1, 3, 40, 10**6]),
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    share=st.lists(st.floats(-0.1, 1.1), min_size=6, max_size=6),
    exact=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
    astray=st.booleans(),
)
def test_cutoffs_are_those_of_each_region_alone(
    levels: int, sizes: list[int], share: list[float], exact: bool, seed: int, astray: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = [torch.randint(-levels, levels + 1, (n,), generator=g) / levels for n in sizes]
    regions = torch.randint(0, 3, (len(sizes),), generator=g)
    one = One(scores, torch.unique(regions, return_inverse=True)[1].tolist(), exact)
    wanted = [round(s * n) for s, n in zip(share, one.regions.totals, strict=False)]
    expected = [one.expected(r, n) for r, n in enumerate(wanted)]
    near = torch.tensor(expected) + (torch.randint(-(1 << 24), 1 << 24, (len(wanted), 1), generator=g) if astray else 0)
    near[:, 0].clamp_(0, ops.MAX_KEY)
    for before in (None, near):
        assert [tuple(row) for row in one.search.cutoffs(one.regions, wanted, before).tolist()] == expected


def test_more_regions_than_bins_of_full_size() -> None:
    """Fewer bins and more passes, in the same memory."""
    scores = [x.round(decimals=1) for x in torch.randn(3000, 9).unbind(0)]
    one = One(scores, range(3000))
    columns = []
    count = one.search.count
    search = ops.Search(lambda counts, rows: columns.append(counts.shape[1]) or count(counts, rows))
    found = search.cutoffs(one.regions, [4] * 3000)
    assert [tuple(row) for row in found.tolist()] == [one.expected(r, 4) for r in range(3000)]
    assert set(columns) == {1 + 1024}


@pytest.mark.parametrize("ties", [True, False])
def test_ranks_stop_when_all_is_settled(ties: bool) -> None:
    """Each pass is a collective then."""
    scores = torch.zeros(500) if ties else torch.randn(500).unique()
    one, passes = One([scores, scores], [0, 1]), []
    count = one.search.count
    search = ops.Search(lambda counts, rows: passes.append(1) or count(counts, rows), together=True)
    found = search.cutoffs(one.regions, [100, 200])
    assert found.tolist() == [list(one.expected(0, 100)), list(one.expected(1, 200))]
    assert len(passes) == (4 if ties else 3)
