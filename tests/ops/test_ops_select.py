"""sample, count_, collect_, settle_around, tie_index, select and pack_ on the CPU against a stable sort, exactly."""

from __future__ import annotations

from importlib import import_module
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cases import FLOATS, LISTS, STATES, VALUES, index_of, masks_of, tensor, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext
SELECT = import_module("pins_ext.ops.select")  # the name is also an operator's
MAX_INDEX = torch.iinfo(torch.int64).max
# Kinds that read two states, and those that read one tensor, which may be a parameter.
KINDS = [(s, d) for s in ("product", "deviation") for d in STATES] + [
    (s, d) for s in ("identity", "magnitude") for d in FLOATS
]


def keys_of(score: str, a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Order key of every weight of the list, int64 [N]."""
    keys = [ref.order_key(ref.score(score, x, b[i] if b else None)) for i, x in enumerate(a)]
    return torch.cat(keys) if keys else torch.zeros(0, dtype=torch.int64)


def operands(
    score: str, dtype: torch.dtype, sizes: list[int], values: str = "normal"
) -> tuple[list[Tensor], list[Tensor]]:
    """The two operands of a score; the second empty where it is not read."""
    a = tensors(sizes, dtype, values, seed=1, misaligned=len(sizes) == 1)
    return a, tensors(sizes, dtype, values, seed=2) if score in ("product", "deviation") else []


def ranks(keys: Tensor) -> Tensor:
    """The oracle: place of every weight in a stable sort, int64 [N]; the first n_prune are pruned."""
    places = torch.empty_like(keys)
    places[torch.from_numpy(np.argsort(keys.numpy(), kind="stable"))] = torch.arange(keys.numel())
    return places


def pruned_by_threshold(keys: Tensor, threshold: Tensor) -> Tensor:
    """What a threshold says, boolean [N], for a list that starts at global index 0."""
    return ~ref.keep_mask(keys, torch.arange(keys.numel()), (int(threshold[0]), int(threshold[1])))


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_select_prunes_exactly_the_first_of_a_stable_sort(score: str, dtype: torch.dtype, sizes: str) -> None:
    for values in VALUES:
        a, b = operands(score, dtype, LISTS[sizes], values)
        layout, keys = ops.Layout.of(a), keys_of(score, a, b)
        n, rank = keys.numel(), ranks(keys)
        for n_prune in sorted({0, 1, n // 5, n // 2, n - 1, n, n + 3}):
            threshold = pins.select(a, b, layout.places, layout.chunks, score, torch.tensor(n_prune))
            assert torch.equal(pruned_by_threshold(keys, threshold), rank < n_prune)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_select_by_the_released_rule(dtype: torch.dtype, values: str) -> None:
    a, b = operands("product", dtype, LISTS["chunk"] + LISTS["many"], values)
    layout, keys = ops.Layout.of(a), keys_of("product", a, b)
    for n_prune in (0, 1, 1000, 40000, keys.numel()):
        threshold = pins.select(a, b, layout.places, layout.chunks, "product", torch.tensor(n_prune), False)
        assert tuple(threshold.tolist()) == ref.select(keys, torch.arange(keys.numel()), n_prune, exact=False)


@settings(max_examples=150, deadline=None)
@given(
    levels=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 300), max_size=6),
    share=st.floats(-0.1, 1.1),
    exact=st.booleans(),
    special=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_select_property(levels: int, sizes: list[int], share: float, exact: bool, special: bool, seed: int) -> None:
    """Few distinct scores, so that most thresholds fall among ties."""
    g = torch.Generator().manual_seed(seed)
    a = [torch.randint(-levels, levels + 1, (n,), generator=g) / levels for n in sizes]
    if special:
        a = [
            torch.where(torch.rand(x.shape, generator=g) < 0.2, tensor(x.numel(), x.dtype, "special", seed), x)
            for x in a
        ]
    layout, keys = ops.Layout.of(a), keys_of("identity", a, [])
    n_prune = round(share * keys.numel())
    threshold = pins.select(a, [], layout.places, layout.chunks, "identity", torch.tensor(n_prune), exact)
    if exact:
        assert torch.equal(pruned_by_threshold(keys, threshold), ranks(keys) < n_prune)
    else:
        n_prune = min(n_prune, keys.numel())
        assert tuple(threshold.tolist()) == ref.select(keys, torch.arange(keys.numel()), n_prune, exact=False)


@settings(max_examples=60, deadline=None)
@given(lo=st.integers(0, 2**32 - 1), octaves=st.floats(0, 3), seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_select_from_an_earlier_bracket(lo: int, octaves: float, seed: int, share: float) -> None:
    """A bracket that hits, and any that misses, ends at the same threshold."""
    a, b = [tensor(4000, torch.float32, "special", seed)], [tensor(4000, torch.float32, "normal", seed + 1)]
    layout, keys = ops.Layout.of(a), keys_of("product", a, b)
    n_prune = round(share * 4000)
    near = int(keys.sort().values[min(n_prune, 3999)])
    for key in (lo, near):
        bracket = ops.bracket_around(torch.tensor([key, 0]), octaves)
        counts = torch.zeros(1 + ops.BINS, dtype=torch.int64)
        pins.count_(counts, a, b, layout.places, layout.chunks, "product", bracket)
        args = (a, b, layout.places, layout.chunks, "product", torch.tensor(n_prune))
        before = counts.clone()
        threshold = pins.select(*args, bracket=bracket, counts=counts)
        assert torch.equal(counts, before)
        assert torch.equal(pruned_by_threshold(keys, threshold), ranks(keys) < n_prune)


@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_count(score: str, dtype: torch.dtype) -> None:
    for values in VALUES:
        a, b = operands(score, dtype, [0, 1, 20000, 700], values)
        layout, keys = ops.Layout.of(a), keys_of(score, a, b)
        middle = int(keys.sort().values[keys.numel() // 2])
        for lo, hi in ((0, ref.MASK32), (middle, middle), (middle, ref.MASK32), (max(middle - 5000, 0), middle)):
            shift = max(0, (hi - lo).bit_length() - 16)
            counts = torch.full((1 + ops.BINS,), -1)
            bracket = torch.tensor([lo, hi, shift, 0, 0])
            pins.count_(counts, a, b, layout.places, layout.chunks, score, bracket)
            inside = keys[(keys >= lo) & (keys <= hi)]
            assert int(counts[0]) == int((keys < lo).sum())
            assert torch.equal(counts[1:], torch.bincount((inside - lo) >> shift, minlength=ops.BINS))
    before = counts.clone()
    pins.count_(counts, a, b, layout.places, layout.chunks, score, torch.tensor([0, 0, 0, 0, 1]))
    assert torch.equal(counts, before)


@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_sample_draws_keys_of_weights(score: str, dtype: torch.dtype) -> None:
    a, b = operands(score, dtype, LISTS["many"] + [5000], "special")
    layout, keys = ops.Layout.of(a), keys_of(score, a, b)
    drawn = pins.sample(a, b, layout.places, layout.chunks, score, 500)
    assert torch.isin(drawn, keys).all()
    assert torch.equal(drawn, pins.sample(a, b, layout.places, layout.chunks, score, 500))
    every = pins.sample(a, b, layout.places, layout.chunks, score, keys.numel())
    assert torch.equal(every, keys)  # one weight per stratum
    nothing = ops.Layout.of([])
    assert pins.sample([], [], nothing.places, nothing.chunks, score, 3).tolist() == [0, 0, 0]


def test_sample_brackets_the_threshold() -> None:
    a, b = operands("product", torch.float32, [300000])
    layout, keys = ops.Layout.of(a), keys_of("product", a, b)
    drawn = pins.sample(a, b, layout.places, layout.chunks, "product", 4096)
    ordered = keys.sort().values
    for share in (0.01, 0.2, 0.5, 0.8, 0.99):
        position = int(share * keys.numel())
        lo, hi, *_ = pins.bracket_of(drawn, torch.tensor(position), keys.numel()).tolist()
        assert lo <= int(ordered[position]) <= hi
        assert int(((keys >= lo) & (keys <= hi)).sum()) < 0.25 * keys.numel()


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_collect(score: str, dtype: torch.dtype, sizes: str) -> None:
    for values in VALUES:
        a, b = operands(score, dtype, LISTS[sizes], values)
        layout, keys = ops.Layout.of(a, base=2**33), keys_of(score, a, b)
        index = torch.cat([torch.zeros(0, dtype=torch.int64), *index_of(layout)])
        middle = int(keys.sort().values[keys.numel() // 2]) if keys.numel() else 5
        for lo, hi in ((middle, middle), (max(0, middle - 1000), middle + 1000), (0, ref.MASK32)):
            inside = (keys >= lo) & (keys <= hi)
            total = int(inside.sum())
            for size in {0, total, max(0, total - 1), total + 7}:
                found, candidates = torch.full((1,), -1), torch.full((2, size), -1)
                shift = max(0, (hi - lo).bit_length() - 16)
                pins.collect_(
                    found, candidates, a, b, layout.places, layout.chunks, score, torch.tensor([lo, hi, shift, 0, 0])
                )
                if total > size:
                    assert int(found) > size
                    continue
                assert int(found) == total
                rows = candidates[:, candidates[1, :total].argsort()]
                assert torch.equal(rows, torch.stack([keys[inside], index[inside]]))
                assert bool((candidates[:, total:] == -1).all())


def test_collect_leaves_a_resolved_bracket() -> None:
    a, b = operands("product", torch.float32, [100])
    layout = ops.Layout.of(a)
    found, candidates = torch.full((1,), -1), torch.full((2, 200), -1)
    bracket = torch.tensor([0, ref.MASK32, 16, 0, 1])
    pins.collect_(found, candidates, a, b, layout.places, layout.chunks, "product", bracket)
    assert found.tolist() == [0]
    assert bool((candidates == -1).all())


def narrowest(lo: int, hi: int, rank: int, resolved: bool) -> list[int]:
    """A bracket in the finest bins that there are."""
    return [lo, hi, max(0, (hi - lo).bit_length() - 16), rank, int(resolved)]


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_settle_around(score: str, dtype: torch.dtype, sizes: str) -> None:
    """Brackets that hold the weight, and those beside which it lies, against a stable sort."""
    for values in VALUES:
        a, b = operands(score, dtype, LISTS[sizes], values)
        layout, keys = ops.Layout.of(a, base=2**33), keys_of(score, a, b)
        if not keys.numel():
            continue
        index = torch.cat(index_of(layout))
        order = torch.from_numpy(np.argsort(keys.numpy(), kind="stable"))
        ordered, middle = keys[order], int(keys[order[keys.numel() // 2]])
        for lo, hi in ((0, ref.MASK32), (max(0, middle - 1000), min(middle + 1000, ref.MASK32)), (middle, middle)):
            for position in sorted({0, keys.numel() // 3, keys.numel() // 2, keys.numel() - 1}):
                bracket = torch.tensor([lo, hi, max(0, (hi - lo).bit_length() - 16), -7, 0])
                work = (a, b, layout.places, layout.chunks, score, bracket, torch.tensor(position))
                found, tie = pins.settle_around(*work)
                key, expected = int(ordered[position]), 0
                if key == lo == hi:
                    wanted = narrowest(lo, hi, position - int((keys < lo).sum()), True)
                elif key < lo:
                    wanted = narrowest(0, lo - 1, position, False)
                elif key > hi:
                    wanted = narrowest(hi + 1, ref.MASK32, position - int((keys <= hi).sum()), False)
                else:
                    wanted = narrowest(key, key, 0, True)
                    tied = position > 0 and int(ordered[position - 1]) == key
                    expected = int(index[order[position]]) if tied else 0
                assert found.tolist() == wanted
                assert tie.tolist() == [expected]


def test_settle_around_leaves_a_resolved_bracket() -> None:
    a, b = operands("product", torch.float32, [100])
    layout, bracket = ops.Layout.of(a), torch.tensor([7, 7, 0, 3, 1])
    found, tie = pins.settle_around(a, b, layout.places, layout.chunks, "product", bracket, torch.tensor(5))
    assert torch.equal(found, bracket)
    assert tie.tolist() == [0]


def test_settle_around_more_weights_than_are_written_down() -> None:
    """4 M at most; a selection then counts, and ends at the same threshold."""
    assert SELECT.LISTED == 2**22
    a = [torch.arange(2**22 + 5, dtype=torch.float32)]
    layout, bracket = ops.Layout.of(a), torch.tensor([0, ref.MASK32, 20, 0, 0])
    tables, position = (layout.places, layout.chunks), torch.tensor(2**21)
    found, tie = pins.settle_around(a, [], *tables, "identity", bracket, position)
    assert found.tolist() == [0, ref.MASK32, 16, 0, 0]
    assert tie.tolist() == [0]
    few = [a[0][:-5]]
    layout = ops.Layout.of(few)
    found, _ = pins.settle_around(few, [], layout.places, layout.chunks, "identity", bracket, position)
    assert found.tolist()[4] == 1
    assert float(ops.score_of_key(found[None, :2])) == 2**21


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("misled", ["everything", "below", "above", "one key", "counted"])
def test_select_from_a_sample_that_misleads(misled: str, values: str) -> None:
    """Whatever bracket a sample gives, and where so many compete that none is settled whole."""
    a, b = operands("product", torch.float32, LISTS["chunk"], values)
    layout, keys = ops.Layout.of(a), keys_of("product", a, b)
    rank, key = ranks(keys), int(keys.sort().values[keys.numel() // 2])
    wrong = {
        "everything": torch.tensor([0, ref.MASK32, 16, 0, 0]),
        "below": torch.tensor([0, 3, 0, 0, 0]),
        "above": torch.tensor([ref.MASK32 - 3, ref.MASK32, 0, 0, 0]),
        "one key": torch.tensor([key, key, 0, 0, 0]),
    }
    begun = (lambda self: wrong[misled]) if misled in wrong else SELECT.Scored.begun
    with (
        patch.object(SELECT.Scored, "begun", begun),
        patch.object(SELECT, "ONE_PASS", 0 if misled == "counted" else 10**9),
    ):
        for n_prune in (1, keys.numel() // 3, keys.numel() // 2, keys.numel() - 1):
            for exact in (True, False):
                threshold = pins.select(a, b, layout.places, layout.chunks, "product", torch.tensor(n_prune), exact)
                if exact:
                    assert torch.equal(pruned_by_threshold(keys, threshold), rank < n_prune)
                else:
                    expected = ref.select(keys, torch.arange(keys.numel()), n_prune, exact=False)
                    assert tuple(threshold.tolist()) == expected


def test_samples_are_enough_for_one_pass() -> None:
    for total in (0, 1, 16384, 85_000_000, 400_000_000, 10**10):
        size = SELECT.samples_of(total, on_host=True)
        assert min(total, SELECT.SAMPLES) <= size <= max(SELECT.SAMPLES, 500_000)
        if total <= SELECT.ONE_PASS:
            # Eight standard deviations of a sample's rank, at the widest.
            assert 4 * total <= SELECT.INSIDE * size**0.5 * 1.01 or total <= 16384
        assert SELECT.samples_of(total, on_host=False) == min(total, SELECT.SAMPLES)


@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_tie_index(dtype: torch.dtype) -> None:
    a = tensors(LISTS["chunk"] + LISTS["many"], dtype, "ties")
    layout, keys, index = ops.Layout.of(a, base=10**10), keys_of("identity", a, []), None
    index = torch.cat(index_of(layout))
    key = int(ref.order_key(torch.tensor(0.5)))
    equal = index[keys == key]
    for rank in (-1, 0, 1, 2, equal.numel() // 2, equal.numel() - 1, equal.numel(), equal.numel() + 5):
        bracket = torch.tensor([key, key, 0, rank, 1])
        expected = 0 if rank <= 0 else int(equal[rank]) if rank < equal.numel() else MAX_INDEX
        assert pins.tie_index(a, [], layout.places, layout.chunks, "identity", bracket).tolist() == [expected]


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_pack(score: str, dtype: torch.dtype, sizes: str) -> None:
    for values in VALUES:
        a, b = operands(score, dtype, LISTS[sizes], values)
        layout, keys = ops.Layout.of(a, base=2**33), keys_of(score, a, b)
        index = index_of(layout)
        ordered = keys.sort().values
        some = int(ordered[keys.numel() // 2]) if keys.numel() else 5
        last = layout.total - 1
        for key, tie in (
            (some, 0),
            (some, MAX_INDEX),
            (some, last - keys.numel() // 3),
            (0, 0),
            (ref.MASK32, MAX_INDEX),
        ):
            _, masks = masks_of(a)
            stats = torch.full((len(a), 3), -1)
            pins.pack_(masks, stats, a, b, layout.places, layout.chunks, score, torch.tensor([[key, tie]]))
            old, _ = masks_of(a)
            for i, bits in enumerate(masks):
                own = keys_of(score, [a[i]], b[i : i + 1])
                keep = ref.keep_mask(own, index[i], (key, tie))
                assert torch.equal(bits, ref.pack_bits(keep))
                expected = [int(keep.sum()), int((keep != old[i]).sum()), int((own == ref.NAN_KEY).sum())]
                assert stats[i].tolist() == expected


def test_pack_with_a_threshold_per_tensor() -> None:
    a = tensors([100, 0, 20000, 65], torch.float32)
    layout = ops.Layout.of(a)
    keys, index = [ref.order_key(x) for x in a], index_of(layout)
    thresholds = torch.tensor([[int(k.median()) if k.numel() else 0, 10050] for k in keys])
    masks, stats = [ops.new_mask(x) for x in a], torch.zeros(4, 3, dtype=torch.int64)
    pins.pack_(masks, stats, a, [], layout.places, layout.chunks, "identity", thresholds)
    for bits, k, i, (key, tie) in zip(masks, keys, index, thresholds.tolist(), strict=True):
        assert torch.equal(bits, ref.pack_bits(ref.keep_mask(k, i, (key, tie))))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 63, 64, 65, 1000])
def test_a_new_mask_keeps_everything(n: int) -> None:
    assert torch.equal(ops.new_mask(torch.empty(n)), ref.pack_bits(torch.ones(n, dtype=torch.bool)))
    assert int(ops.set_bits(ops.new_mask(torch.empty(n)))) == n
    keep = torch.rand(n) < 0.5
    assert int(ops.set_bits(ref.pack_bits(keep))) == int(keep.sum())
