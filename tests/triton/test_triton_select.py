"""The Triton operators that select and pack, against reference.py, interpreted and on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.language as tl
from cases import FLOATS, STATES, VALUES, index_of, masks_of, rng_of, tensors
from torch import Tensor
from triton_lists import (
    LISTS,
    SHARD_SIZES,
    SHARDS,
    SMALL,
    WARNINGS,
    counted,
    cpu,
    keys_of,
    layout_of,
    on,
    tables,
)

from pins_ext import ops
from pins_ext import reference as ref
from pins_ext.ops.bracket import bracket_of, cutoff, narrow, settle
from pins_ext.triton_kernels import count

pytestmark = WARNINGS

pins = torch.ops.pins_ext


# ---- sample, count_ ---------------------------------------------------------------------------------

# Kinds that read two states, and those that read one tensor, which may be a parameter.
KINDS = [(s, d) for s in ("product", "deviation") for d in STATES] + [
    (s, d) for s in ("identity", "magnitude") for d in FLOATS
]


def operands(
    score: str, dtype: torch.dtype, sizes: list[int], values: str = "normal"
) -> tuple[list[Tensor], list[Tensor]]:
    """The two operands of a score; the second empty where it is not read."""
    a = tensors(sizes, dtype, values, seed=1, misaligned=len(sizes) == 1)
    return a, tensors(sizes, dtype, values, seed=2) if score in ("product", "deviation") else []


@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_sample_kernel(device: str, score: str, dtype: torch.dtype) -> None:
    a, b = operands(score, dtype, [1, 0, 0, 63, 64, 500, 0], "special")
    layout, keys = layout_of(a), keys_of(score, a, b)
    a_, b_ = on(device, a, b)
    drawn = pins.sample(a_, b_, *tables(layout, device), score, 500)
    assert torch.isin(drawn.cpu(), keys).all()
    assert torch.equal(drawn, pins.sample(a_, b_, *tables(layout, device), score, 500))
    every = pins.sample(a_, b_, *tables(layout, device), score, keys.numel())
    assert torch.equal(every.cpu(), keys)  # one weight per stratum
    more = pins.sample(a_, b_, *tables(layout, device), score, 3 * keys.numel())
    assert torch.equal(more.cpu()[1::3], keys)


def test_sample_kernel_of_nothing(device: str) -> None:
    for sizes in ([], [0, 0]):
        a, b = on(device, *operands("product", torch.float32, sizes))
        layout = layout_of(a)
        assert pins.sample(a, b, *tables(layout, device), "product", 3).tolist() == [0, 0, 0]


def check_count(device: str, score: str, a: list[Tensor], b: list[Tensor], bracket: list[int]) -> None:
    layout, (a_, b_) = layout_of(a), on(device, a, b)
    counts = torch.full((1 + ops.BINS,), -1, device=device)
    pins.count_(counts, a_, b_, *tables(layout, device), score, torch.tensor(bracket, device=device))
    expected = counted(keys_of(score, a, b), bracket) if bracket[4] == 0 else torch.full((1 + ops.BINS,), -1)
    assert torch.equal(counts.cpu(), expected)


def whole_bracket(lo: int, hi: int, resolved: int = 0) -> list[int]:
    return [lo, hi, max(0, (hi - lo).bit_length() - 16), 0, resolved]


@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_count_kernel(device: str, score: str, dtype: torch.dtype) -> None:
    for values in VALUES:
        a, b = operands(score, dtype, [0, 1100], values)
        keys = keys_of(score, a, b).sort().values
        middle, upper = int(keys[550]), int(keys[825])
        for lo, hi in ((0, ref.MASK32), (middle, middle), (max(middle - 5000, 0), upper)):
            check_count(device, score, a, b, whole_bracket(lo, hi))


@pytest.mark.parametrize("sizes", LISTS)
def test_count_kernel_sizes(device: str, sizes: str) -> None:
    a, b = operands("product", torch.bfloat16, LISTS[sizes])
    check_count(device, "product", a, b, whole_bracket(0x70000000, 0xC0000000))


@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_count_kernel_counts_in_the_order_of_either_compiler(
    device: str, monkeypatch: pytest.MonkeyPatch, score: str, dtype: torch.dtype
) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("what is compiled has the order of this compiler")
    a, b = operands(score, dtype, [0, 2300, 17])
    for reorders in (True, False):
        monkeypatch.setattr(count, "REORDERS", tl.constexpr(reorders))
        check_count(device, score, a, b, whole_bracket(0x70000000, 0xC0000000))


def test_count_kernel_counts_ties_wherever_they_lie_in_the_bracket(device: str) -> None:
    """At both ends, at zero, in the middle, elsewhere, and outside; also in brackets of one, two and three keys."""
    scores = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 2e-45, 0.5, 1.0]).repeat_interleave(200)[torch.randperm(1400)]
    levels = sorted({int(k) for k in ref.order_key(scores)})
    for lo in levels[:-1]:
        for hi in {lo, lo + 1, lo + 2, *levels[2:]}:
            if hi >= lo:
                check_count(device, "identity", [scores], [], whole_bracket(lo, hi))


def test_count_kernel_leaves_a_resolved_bracket(device: str) -> None:
    a, b = operands("product", torch.float32, [700])
    check_count(device, "product", a, b, whole_bracket(5, 5, resolved=1))


# ---- collect_ ---------------------------------------------------------------------------------------


def check_collect(
    device: str,
    score: str,
    a: list[Tensor],
    b: list[Tensor],
    size: int,
    shards: list[ops.Shard | None] | None = None,
) -> None:
    layout, keys = layout_of(a, shards), keys_of(score, a, b)
    index = torch.cat([torch.zeros(0, dtype=torch.int64), *index_of(layout)])
    middle = int(keys.sort().values[keys.numel() // 2]) if keys.numel() else 5
    lo, hi = max(0, middle - 40), middle + 40
    inside = (keys >= lo) & (keys <= hi)
    total = int(inside.sum())
    found = torch.full((1,), -1, device=device)
    candidates = torch.full((2, size), -1, device=device)
    bracket = torch.tensor([lo, hi, 0, 0, 0], device=device)
    a_, b_ = on(device, a, b)
    pins.collect_(found, candidates, a_, b_, *tables(layout, device), score, bracket)
    assert int(found) == total
    if total <= size:
        rows = sorted(zip(*candidates[:, :total].tolist(), strict=True))
        assert rows == sorted(zip(keys[inside].tolist(), index[inside].tolist(), strict=True))
        assert bool((candidates[:, total:] == -1).all())


@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_collect_kernel(device: str, score: str, dtype: torch.dtype) -> None:
    a, b = operands(score, dtype, [2048 + 700, 40], "ties")
    check_collect(device, score, a, b, 3000)


@pytest.mark.parametrize("sizes", LISTS)
def test_collect_kernel_sizes(device: str, sizes: str) -> None:
    check_collect(device, "product", *operands("product", torch.float32, LISTS[sizes]), 700)


def test_collect_kernel_with_more_than_fit(device: str) -> None:
    check_collect(device, "identity", [torch.ones(5000)], [], 100)


def test_collect_kernel_shards(device: str) -> None:
    check_collect(device, "identity", [(torch.randn(size) * 2).round() for size in SHARD_SIZES], [], 6000, SHARDS)


# ---- tie_index --------------------------------------------------------------------------------------


def check_tie(device: str, a: list[Tensor], shards: list[ops.Shard | None] | None = None) -> None:
    layout, (a_,), keys = layout_of(a, shards), on(device, a), keys_of("identity", a, [])
    index = torch.cat([torch.zeros(0, dtype=torch.int64), *index_of(layout)])
    key = int(keys.mode().values) if keys.numel() else 5
    ties = index[keys == key].tolist()
    for rank in sorted({-1, 0, 1, 2, len(ties) // 2, len(ties) - 1, len(ties)}):
        bracket = torch.tensor([key, key, 0, rank, 1], device=device)
        found = pins.tie_index(a_, [], *tables(layout, device), "identity", bracket)
        expected = 0 if rank <= 0 else ties[rank] if rank < len(ties) else ops.MAX_INDEX
        assert found.tolist() == [expected]


@pytest.mark.parametrize("sizes", LISTS)
def test_tie_index_kernels(device: str, sizes: str) -> None:
    check_tie(device, tensors(LISTS[sizes], torch.bfloat16, "ties", misaligned=sizes == "odd"))


def test_tie_index_kernels_shards(device: str) -> None:
    check_tie(device, [(torch.randn(size) * 2).round() for size in SHARD_SIZES], SHARDS)


# ---- pack_ ------------------------------------------------------------------------------------------


def check_pack(
    device: str,
    score: str,
    a: list[Tensor],
    b: list[Tensor],
    thresholds: list[list[int]],
    shards: list[ops.Shard | None] | None = None,
) -> None:
    layout, (old, masks) = layout_of(a, shards), masks_of(a)
    expected_masks, expected_stats = [], []
    for i, index in enumerate(index_of(layout)):
        key, tie = thresholds[i if len(thresholds) > 1 else 0]
        keys = keys_of(score, a[i : i + 1], b[i : i + 1])
        keep = ref.keep_mask(keys, index, (key, tie))
        expected_masks.append(ref.pack_bits(keep))
        expected_stats.append(
            [int(keep.sum()), int((keep != old[i].flatten()).sum()), int((keys == ref.NAN_KEY).sum())]
        )
    a_, b_, masks_ = on(device, a, b, masks)
    stats = torch.full((len(a), 3), -5, device=device)
    threshold = torch.tensor(thresholds, device=device)
    pins.pack_(masks_, stats, a_, b_, *tables(layout, device), score, threshold)
    for mask, expected in zip(cpu(masks_), expected_masks, strict=True):
        assert torch.equal(mask, expected)
    assert stats.tolist() == expected_stats


@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_pack_kernel(device: str, score: str, dtype: torch.dtype) -> None:
    for values in VALUES:
        a, b = operands(score, dtype, SMALL, values)
        layout, keys = layout_of(a), keys_of(score, a, b)
        index = torch.cat(index_of(layout))
        common = int(keys.mode().values)
        ties = index[keys == common]
        tie = int(ties[ties.numel() // 2])
        check_pack(device, score, a, b, [[0, 0], [ref.MASK32, ops.MAX_INDEX], [common, tie]])


@pytest.mark.parametrize("sizes", [s for s in LISTS if s != "none"])
def test_pack_kernel_sizes(device: str, sizes: str) -> None:
    a, b = operands("product", torch.float32, LISTS[sizes])
    check_pack(device, "product", a, b, [[0x80000000, (1 << 32) + 200]])


def test_pack_kernel_of_nothing(device: str) -> None:
    stats, threshold = (
        torch.zeros(0, 3, dtype=torch.int64, device=device),
        torch.zeros(1, 2, dtype=torch.int64, device=device),
    )
    pins.pack_([], stats, [], [], *tables(layout_of([]), device), "identity", threshold)


def test_pack_kernel_shards(device: str) -> None:
    a = [(torch.randn(size) * 2).round() for size in SHARD_SIZES]
    rows = layout_of(a, SHARDS).places
    total = int(rows[-1, 0]) + 2100
    for tie in range(int(rows[0, 0]), total, 1111):
        check_pack(device, "identity", a, [], [[0x80000000, tie]], SHARDS)


# ---- select: the driver of ops.py on these kernels ---------------------------------------------------


def check_threshold(threshold: Tensor, keys: Tensor, index: Tensor, n_prune: int, exact: bool = True) -> None:
    """The reference's threshold, or one that keeps the same weights."""
    expected, actual = ref.select(keys, index, n_prune, exact), tuple(threshold.tolist())
    assert torch.equal(ref.keep_mask(keys, index, actual), ref.keep_mask(keys, index, expected))


def check_select(device: str, score: str, a: list[Tensor], b: list[Tensor], exact: bool = True) -> None:
    layout, keys = layout_of(a), keys_of(score, a, b)
    index = torch.cat([torch.zeros(0, dtype=torch.int64), *index_of(layout)])
    a_, b_ = on(device, a, b)
    n = keys.numel()
    for n_prune in sorted({0, n // 2, n - 1, n + 3}):
        args = (a_, b_, *tables(layout, device), score, torch.tensor(n_prune, device=device), exact)
        check_threshold(pins.select(*args), keys, index, min(n_prune, n), exact)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_select_kernels(device: str, dtype: torch.dtype, values: str) -> None:
    check_select(device, "product", *operands("product", dtype, [1, 0, 1300], values))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("sizes", [[], [0], [1]], ids=str)
def test_select_kernels_sizes(device: str, sizes: list[int], exact: bool) -> None:
    check_select(device, "product", *operands("product", torch.bfloat16, sizes), exact)


@pytest.mark.parametrize("exact", [True, False])
def test_select_kernels_across_chunks(compiled_device: str, exact: bool) -> None:
    check_select(compiled_device, "product", *operands("product", torch.bfloat16, [16384, 99]), exact)


def test_select_kernels_from_the_counts_of_fold(device: str) -> None:
    """A bracket around an earlier threshold that hits, and two that miss on either side."""
    mean, unc, ipt = (tensors([1700], torch.float32, "special", seed=s) for s in (1, 2, 3))
    layout, rng = layout_of(mean), rng_of(1)
    for key in (0x80010000, 0x40000000, 0xC8000000):
        mean_, unc_, ipt_ = on(device, mean, unc, ipt)
        bracket = ops.bracket_around(torch.tensor([key, 0], device=device))
        counts = torch.zeros(1 + ops.BINS, dtype=torch.int64, device=device)
        work = tables(layout, device)
        one = torch.ones(1, device=device)
        pins.fold_(mean_, unc_, ipt_, *work, one, rng.to(device), 0.85, 0.95, bracket=bracket, counts=counts)
        n_prune = torch.tensor(900, device=device)
        threshold = pins.select(mean_, unc_, *work, "product", n_prune, bracket=bracket, counts=counts)
        keys = keys_of("product", cpu(mean_), cpu(unc_))
        check_threshold(threshold, keys, torch.cat(index_of(layout)), 900)


# ---- the steps between the passes: triton_kernels/bracket.py against the operators of the CPU -----------------------


def on_both(op: Callable[..., Any], device: str, *arguments: Any) -> None:
    placed = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
    expected, got = op(*arguments), getattr(pins, op.__name__)(*placed)
    for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True):
        assert torch.equal(x.cpu(), y), (op, x, y, arguments)


def test_narrow_kernel(device: str) -> None:
    counts = torch.zeros(1 + ops.BINS, dtype=torch.int64)
    counts[[0, 1, 7, 40_000, ops.BINS]] = torch.tensor([5, 3, 1 << 33, 2, 9])
    total = int(counts.sum())
    for lo, shift in ((1000, 0), (0, 16), (0x7F000000, 9)):
        hi = min(lo + (ops.BINS << shift) - 1, ops.MAX_KEY)
        for position in (0, 4, 5, 7, 8, 1 << 33, total - 11, total - 10, total - 1, total, total + 70):
            on_both(narrow, device, torch.tensor([lo, hi, shift, 0, 0]), counts, torch.tensor(position))
    on_both(narrow, device, torch.tensor([7, 7, 0, 3, 1]), counts, torch.tensor(6))
    # The last bin is not whole.
    on_both(narrow, device, torch.tensor([0, 0xFFFF9000, 16, 0, 0]), counts, torch.tensor(total - 1))


def test_bracket_of_kernel(device: str) -> None:
    keys = (3 * torch.arange(16384))[torch.randperm(16384)]
    for size in (1, 2, 500, 16384):
        sample = keys[keys < 3 * size]
        for share in (0, 1e-4, 0.2, 0.5, 0.999, 1):
            total = 7_000_000_000
            arguments = (sample, torch.tensor(int(share * (total - 1))), total)
            lo, hi, shift, rank, resolved = pins.bracket_of(*(x.to(device) for x in arguments[:2]), total).tolist()
            expected = bracket_of(*arguments).tolist()
            # In float32 the ends of the bracket may be one key of the sample apart.
            assert max(abs(lo - expected[0]), abs(hi - expected[1])) <= 3
            assert (shift, rank, resolved) == (max(0, (hi - lo).bit_length() - 16), 0, 0)


def test_settle_kernel(device: str) -> None:
    for size, n in ((8, 5), (8, 8), (3000, 2500)):
        candidates = torch.full((2, size), ops.MAX_INDEX)
        at = torch.randperm(size)[:n]
        candidates[0, at], candidates[1, at] = torch.randint(10, 14, (n,)), torch.randperm(1 << 20)[:n] << 22
        for rank in {0, 1, n // 2, n - 1, n + 3}:
            for found in (n, 0, size + 1):
                bracket = torch.tensor([10, 13, 0, rank, 0])
                on_both(settle, device, bracket, candidates, torch.tensor([found]))
    on_both(settle, device, torch.tensor([10, 10, 0, 4, 1]), candidates, torch.tensor([0]))


def test_cutoff_kernel(device: str) -> None:
    for key in (0, 77, ops.MAX_KEY):
        for n_prune in (-1, 0, 1, 99, 100, 101):
            for exact in (True, False):
                bracket = torch.tensor([key, key, 0, 0, 1])
                on_both(cutoff, device, bracket, torch.tensor([1 << 40]), torch.tensor(n_prune), 100, exact)
