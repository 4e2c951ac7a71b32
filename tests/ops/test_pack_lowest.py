"""pack_lowest_ and pack_around_ on the CPU: masks, statistics and threshold of `select` and `pack_`, exactly."""

from __future__ import annotations

import sys
from unittest.mock import patch

import pytest
import torch
from cases import LISTS, VALUES, clones, masks_of, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_select import KINDS, keys_of, operands, ranks
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext


def counted(
    a: list[Tensor], b: list[Tensor], layout: ops.Layout, score: str, key: int, octaves: float
) -> dict[str, Tensor]:
    """What a fold leaves behind that counted around this key."""
    bracket = ops.bracket_around(torch.tensor([key, 0]), octaves)
    counts = torch.zeros(1 + ops.BINS, dtype=torch.int64)
    pins.count_(counts, a, b, layout.places, layout.chunks, score, bracket)
    return {"bracket": bracket, "counts": counts}


def check(
    a: list[Tensor], b: list[Tensor], score: str, n_prune: int, rank: Tensor | None = None, **given: Tensor
) -> None:
    """Against both passes of the kernels, and against a stable sort of the reference's keys: every weight's rank."""
    layout = ops.Layout.of(a)
    rank = ranks(keys_of(score, a, b)) if rank is None else rank
    work, target = (a, b, layout.places, layout.chunks, score), torch.tensor(n_prune)
    split = masks_of(a)[1]
    masks, stats, own = clones(split), *torch.full((2, len(a), 3), -1)
    threshold = pins.select(*work, target).reshape(1, 2)
    pins.pack_(split, stats, *work, threshold)
    found = ops.pack_lowest_(masks, own, *work, target, **given)
    assert torch.equal(found, threshold)
    assert torch.equal(own, stats)
    assert all(map(torch.equal, masks, split))
    kept = torch.cat([ops.unpack_bits(m, x.shape) for m, x in zip(masks, a, strict=True)]) if a else rank.bool()
    assert torch.equal(~kept, rank < n_prune)


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_masks_are_those_of_select_and_pack(score: str, dtype: torch.dtype, sizes: str) -> None:
    for values in VALUES:
        a, b = operands(score, dtype, LISTS[sizes], values)
        layout, keys = ops.Layout.of(a), keys_of(score, a, b)
        n, rank, ordered = keys.numel(), ranks(keys), keys.sort().values
        for n_prune in sorted({0, 1, n // 5, n // 2, n - 1, n, n + 3}):
            check(a, b, score, n_prune, rank)
            if n:
                near = int(ordered[min(max(n_prune, 0), n - 1)])
                check(a, b, score, n_prune, rank, **counted(a, b, layout, score, near, 0.125))


@settings(max_examples=60, deadline=None)
@given(lo=st.integers(0, 2**32 - 1), octaves=st.floats(0, 3), levels=st.integers(2, 400), share=st.floats(0, 1))
def test_from_a_bracket_that_hits_or_misses(lo: int, octaves: float, levels: int, share: float) -> None:
    a = tensors([2000, 1, 999], torch.float32, "normal", seed=levels)
    a = [(x * levels).round() / levels for x in a]
    n_prune = round(share * 3000)
    check(a, [], "magnitude", n_prune, **counted(a, [], ops.Layout.of(a), "magnitude", lo, octaves))


@pytest.mark.parametrize("values", VALUES)
def test_a_bin_of_more_weights_than_are_ordered(values: str) -> None:
    a, b = operands("product", torch.float32, LISTS["chunk"], values)
    # The package has a function of the module's name.
    with patch.object(sys.modules["pins_ext.ops.select"], "CANDIDATES", 3):
        check(a, b, "product", 30000)


def test_scores_with_a_factor_for_each_tensor() -> None:
    a, b = tensors([300, 700], torch.float32, seed=1), tensors([300, 700], torch.float32, seed=2)
    b, factors = [x.abs() for x in b], torch.tensor([3.0, 0.25])
    layout = ops.Layout.of(a)
    masks, stats = masks_of(a)[1], torch.zeros(2, 3, dtype=torch.int64)
    work = (a, b, layout.places, layout.chunks, "fisher")
    ops.pack_lowest_(masks, stats, *work, torch.tensor(400), factors=factors)
    scores = [(x * x) * (y * f) for x, y, f in zip(a, b, factors, strict=True)]
    pruned = ranks(torch.cat([ref.order_key(s) for s in scores])) < 400
    assert torch.equal(~torch.cat([ops.unpack_bits(m, x.shape) for m, x in zip(masks, a, strict=True)]), pruned)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = operands("product", torch.float32, [70000, 1, 50000], "ties")
        check(a, b, "product", 60000)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rank", [-1, 5])
def test_a_rank_outside_the_bracket_is_refused(rank: int) -> None:
    a = [torch.arange(5.0)]
    layout = ops.Layout.of(a)
    out = ([ops.new_mask(a[0])], torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    bracket = torch.tensor([0, ref.MASK32, 16, rank, 0])
    with pytest.raises(RuntimeError, match=f"bracket has rank {rank}, but only 5 weights inside"):
        ops.pack_around_(*out, a, [], layout.places, layout.chunks, "identity", bracket)
