"""Statistics and moments in 8 bits in the Triton operators, against reference.py, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from cases import folded_codes, index_of, rng_of, tensors
from region_counts import counted as counted_by_region
from region_counts import mixed_brackets
from torch import Tensor
from triton_lists import WARNINGS, counted, tables

from pins_ext import ops
from pins_ext import reference as ref

pytestmark = WARNINGS

pins = torch.ops.pins_ext
Shape = tuple[int, ...]

# Rows of one weight to several tiles of 16 groups, the last group short or not; empty tensors; two chunks.
SHAPES: list[Shape] = [(1,), (0,), (7, 33), (40, 2), (77,), (3, 5, 31), (1, 1100), (5, 64), (4, 0)]
CHUNKS: list[Shape] = [(500, 33), (33, 512)]


def values_of(shapes: Sequence[Shape], values: str, seed: int, signed: bool = False) -> list[Tensor]:
    """float32, not negative unless `signed`; "spread": many octaves within a group."""
    sizes = [math.prod(shape) for shape in shapes]
    made = tensors(sizes, torch.float32, values.replace("spread", "normal"), seed)
    if values == "spread":
        other = tensors(sizes, torch.float32, seed=seed + 50)
        made = [x * torch.exp2(8 * y) for x, y in zip(made, other, strict=True)]
    made = [x.view(shape) for x, shape in zip(made, shapes, strict=True)]
    return made if signed or values == "special" else [x.abs() for x in made]


def coded(device: str, values: list[Tensor], signed: bool = False, skip: int = 0) -> list[Tensor]:
    """In 8 bits, so many bytes after a whole word."""
    found = []
    for x in values:
        packed = ref.encode(x, signed)
        storage = torch.empty(packed.numel() + 16, dtype=packed.dtype, device=device)
        found.append(storage[skip:][: packed.numel()].view(packed.shape).copy_(packed))
    return found


def plain(states: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [ref.decode(state.cpu(), x.shape) for state, x in zip(states, like, strict=True)]


def assert_same_bytes(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), e), f"{int((a.cpu() != e).sum())} of {a.numel()} bytes differ"


def layout_of(like: list[Tensor]) -> ops.Layout:
    return ops.Layout.of(like, base=(1 << 32) - 1000)


def check_accumulate(device: str, shapes: list[Shape], values: str, dtype: torch.dtype, criterion: str) -> None:
    ipt = values_of(shapes, values, 3)
    params, grads = ([x.to(dtype) for x in values_of(shapes, "normal", s, signed=True)] for s in (1, 2))
    if criterion == "precomputed":
        grads = [x.to(dtype) for x in values_of(shapes, values, 2)]
    states, layout, lr = coded(device, ipt, skip=1), layout_of(ipt), torch.linspace(1e-5, 0.9, len(shapes))
    for n in (0, 3):
        was = plain(states, ipt)
        expected = [
            ref.encode(ref.next_ipt(criterion, i, ref.instant_score(criterion, p, p, g, float(rate)), n))
            for i, p, g, rate in zip(was, params, grads, lr, strict=True)
        ]
        given = [] if criterion == "precomputed" else [p.to(device) for p in params]
        rest = lr.to(device), torch.tensor([float(n)], device=device), rng_of(n).to(device)
        pins.accumulate_(states, given, [g.to(device) for g in grads], *tables(layout, device), *rest, criterion)
        assert_same_bytes(states, expected)


@pytest.mark.parametrize("values", ["normal", "special", "zeros", "spread"])
@pytest.mark.parametrize("criterion", ["pins", "precomputed"])
def test_accumulate_kernel_in_8_bits(device: str, criterion: str, values: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_accumulate(device, SHAPES, values, dtype, criterion)


def test_accumulate_kernel_in_8_bits_across_chunks(compiled_device: str) -> None:
    check_accumulate(compiled_device, CHUNKS, "normal", torch.bfloat16, "pins")


def check_fold(device: str, shapes: list[Shape], values: str, beta2: float, accepted: float) -> None:
    mean, unc, ipt = (values_of(shapes, values, s) for s in (1, 2, 3))
    stored = [coded(device, x, skip=skip) for x, skip in ((mean, 1), (unc, 0), (ipt, 7))]
    was = [plain(state, mean) for state in stored]
    given, layout = stored[1] if beta2 < 1 else [], layout_of(mean)
    new = [ref.fold(m, u if beta2 < 1 else None, i, 0.85, beta2) for m, u, i in zip(*was, strict=True)]
    expected = [state.cpu().clone() for state in stored[0]], [state.cpu().clone() for state in stored[1]]
    if accepted:
        expected = folded_codes(new, 0), folded_codes(new, 1) or expected[1]
    bracket = [0x80000000, 0xBE000000, 14, 0, 0]
    counts = torch.full((1 + ops.BINS,), 7, device=device)
    rest = torch.tensor([accepted], device=device), rng_of(1).to(device)
    pins.fold_(
        stored[0], given, stored[2], *tables(layout, device), *rest, 0.85, beta2,
        bracket=torch.tensor(bracket, device=device), counts=counts,
    )  # fmt: skip
    assert_same_bytes(stored[0], expected[0])
    assert_same_bytes(stored[1], expected[1])
    keys = torch.cat(keys_of("product" if given else "identity", stored[0], given, mean))
    assert torch.equal(counts.cpu(), counted(keys, bracket))


@pytest.mark.parametrize("values", ["normal", "special", "zeros", "spread"])
@pytest.mark.parametrize("beta2", [0.95, 1.0])
def test_fold_kernel_in_8_bits(device: str, beta2: float, values: str) -> None:
    for accepted in (2.0, 0.0):
        check_fold(device, SHAPES, values, beta2, accepted)


def test_fold_kernel_in_8_bits_across_chunks(compiled_device: str) -> None:
    check_fold(compiled_device, CHUNKS, "normal", 0.95, 1.0)


@pytest.mark.parametrize("values", ["normal", "special", "spread"])
@pytest.mark.parametrize("state", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_fold_kernel_reads_moments_in_8_bits(device: str, state: torch.dtype, values: str) -> None:
    params = [x.bfloat16() for x in values_of(SHAPES, "normal", 5, signed=True)]
    first, second = values_of(SHAPES, values, 6, signed=True), values_of(SHAPES, values, 7)
    mean, unc = values_of(SHAPES, "normal", 8), values_of(SHAPES, "normal", 9)
    moments = coded(device, first, signed=True, skip=1), coded(device, second)
    averages = [coded(device, x) if state == torch.uint8 else [y.to(state).to(device) for y in x] for x in (mean, unc)]
    was = [plain(x, mean) if state == torch.uint8 else [y.cpu().float() for y in x] for x in averages]
    layout, factors, rng = layout_of(params), torch.linspace(1e-3, 2, 3 * len(SHAPES)).view(-1, 3), rng_of(1)
    scores = [
        ref.moments(p, e, s, f)
        for p, e, s, f in zip(params, plain(moments[0], params), plain(moments[1], params), factors, strict=True)
    ]
    new = [ref.fold(m, u, i, 0.85, 0.95) for m, u, i in zip(*was, scores, strict=True)]
    rest = factors.to(device), torch.ones(1, device=device), rng.to(device)
    weights = [p.to(device) for p in params]
    pins.fold_moments_(*averages, weights, *moments, *tables(layout, device), *rest, 0.85, 0.95)
    random = [ref.random_bits(i, *rng.tolist()) for i in index_of(layout)]
    for average, place, shift in zip(averages, (0, 1), (0, 16), strict=True):
        codes = folded_codes(new, place)
        for x, pair, bits, code in zip(average, new, random, codes, strict=True):
            value = pair[place]
            assert value is not None
            wanted = code if state == torch.uint8 else ref.store(value, state, bits >> shift)
            same = torch.equal(x.cpu().nan_to_num(), wanted.nan_to_num())
            assert same
            assert torch.equal(x.cpu().isnan(), wanted.isnan())


# ---- selection -----------------------------------------------------------------------------------


def keys_of(score: str, a: list[Tensor], b: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    first = plain(a, like)
    second = plain(b, like) if b else [None] * len(a)
    return [ref.order_key(ref.score(score, x, y)).flatten() for x, y in zip(first, second, strict=True)]


def check_selection(device: str, score: str, a: list[Tensor], b: list[Tensor], like: list[Tensor]) -> None:
    layout = layout_of(like)
    given = tables(layout, device)
    of_each, index = keys_of(score, a, b, like), torch.cat(index_of(layout))
    keys = torch.cat(of_each)
    assert torch.isin(pins.sample(a, b, *given, score, 300).cpu(), keys).all()
    bracket = [0x80000000, 0xBE000000, 14, 0, 0]
    counts = torch.zeros(1 + ops.BINS, dtype=torch.int64, device=device)
    pins.count_(counts, a, b, *given, score, torch.tensor(bracket, device=device))
    assert torch.equal(counts.cpu(), counted(keys, bracket))
    middle = int(keys.median())
    found, candidates = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(2, len(keys)).long().to(device)
    pins.collect_(found, candidates, a, b, *given, score, torch.tensor([0, middle, 16, 0, 0], device=device))
    inside = keys <= middle
    assert int(found) == int(inside.sum())
    pairs = {tuple(pair) for pair in candidates[:, : int(found)].T.tolist()}
    assert pairs == set(zip(keys[inside].tolist(), index[inside].tolist(), strict=True))
    ties = index[keys == middle].sort().values
    at = pins.tie_index(a, b, *given, score, torch.tensor([middle, middle, 0, len(ties) - 1, 1], device=device))
    assert int(at) == (int(ties[-1]) if len(ties) > 1 else 0)
    threshold = (middle, int(index.median()))
    masks = [torch.full((ops.mask_bytes(x.numel()),), 255, dtype=torch.uint8, device=device) for x in like]
    stats = torch.zeros(len(like), 3, dtype=torch.int64, device=device)
    pins.pack_(masks, stats, a, b, *given, score, torch.tensor([threshold], device=device))
    for bits, own, at_, kept in zip(masks, of_each, index_of(layout), stats[:, 0].tolist(), strict=True):
        keep = ref.keep_mask(own, at_, threshold)
        assert torch.equal(bits.cpu(), ref.pack_bits(keep))
        assert kept == int(keep.sum())


@pytest.mark.parametrize(
    ("score", "values"),
    [
        pytest.param("product", "normal", marks=pytest.mark.slow),
        ("product", "special"),
        pytest.param("product", "zeros", marks=pytest.mark.slow),
        ("deviation", "special"),
        ("identity", "zeros"),
    ],
)
def test_selection_kernels_in_8_bits(compiled_device: str, score: str, values: str) -> None:
    a, b = values_of(SHAPES, values, 1), values_of(SHAPES, values, 2)
    check_selection(
        compiled_device,
        score,
        coded(compiled_device, a, skip=1),
        [] if score == "identity" else coded(compiled_device, b),
        a,
    )


def test_selection_kernels_in_8_bits_across_chunks(compiled_device: str) -> None:
    a, b = values_of(CHUNKS, "normal", 1), values_of(CHUNKS, "normal", 2)
    check_selection(compiled_device, "product", coded(compiled_device, a), coded(compiled_device, b), a)


def test_regions_are_counted_in_8_bits(device: str) -> None:
    a, b = values_of(SHAPES, "special", 1), values_of(SHAPES, "special", 2)
    first, second = coded(device, a, skip=1), coded(device, b)
    keys, index = keys_of("product", first, second, a), index_of(layout_of(a))
    regions = torch.tensor([i % 3 for i in range(len(a))], dtype=torch.int64)
    for brackets in mixed_brackets(keys, index, regions, bins=64):
        counts = torch.full((len(brackets), 65), -1, device=device)
        table = regions.to(device), brackets.to(device)
        pins.count_regions_(counts, first, second, *tables(layout_of(a), device), "product", *table)
        assert torch.equal(counts.cpu(), counted_by_region(keys, index, regions, brackets, 64))


@pytest.mark.parametrize("axis", [-1, -2])
def test_groups_compete_in_8_bits(device: str, axis: int) -> None:
    shapes: list[Shape] = [(8, 24), (2, 16, 40), (48, 8), (0, 8)]
    a, b = values_of(shapes, "special", 1), values_of(shapes, "special", 2)
    first, second = coded(device, a, skip=1), coded(device, b)
    groups = [[2, 4, 1 if axis == -1 else shape[-1]] for shape in shapes]
    found, nans = [torch.full(shape, 7.0, device=device) for shape in shapes], torch.full((len(a),), -1, device=device)
    table = torch.tensor(groups, device=device)
    pins.eligible_(found, nans, first, second, *tables(layout_of(a), device), "product", table)
    for i, (x, y) in enumerate(zip(plain(first, a), plain(second, b), strict=True)):
        scores = ref.score("product", x, y)
        assert torch.equal(found[i].cpu().nan_to_num(-1), ref.eligible(scores, 2, 4, axis).nan_to_num(-1))
        assert int(nans[i]) == int(scores.isnan().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fisher_of_a_second_moment_in_8_bits(device: str, dtype: torch.dtype) -> None:
    params, second = ([x.to(t) for x in values_of(SHAPES, "normal", s)] for s, t in ((1, dtype), (2, torch.float32)))
    stored, factors, layout = coded(device, second, skip=1), torch.linspace(1, 2, len(SHAPES)), layout_of(params)
    scores = [ref.score("fisher", p, s, f) for p, s, f in zip(params, plain(stored, params), factors, strict=True)]
    keys = torch.cat([ref.order_key(s).flatten() for s in scores])
    bracket = [0x80000000, 0xBE000000, 14, 0, 0]
    counts = torch.zeros(1 + ops.BINS, dtype=torch.int64, device=device)
    weights = [p.to(device) for p in params]
    rest = "fisher", torch.tensor(bracket, device=device)
    pins.count_(counts, weights, stored, *tables(layout, device), *rest, factors=factors.to(device))
    assert torch.equal(counts.cpu(), counted(keys, bracket))


def test_8_bit_storage_of_another_shape_is_refused(device: str) -> None:
    ipt, grads = [torch.zeros(136, dtype=torch.uint8, device=device)], [torch.zeros(100, device=device)]
    layout = layout_of(grads)
    rest = (torch.zeros(1, device=device), torch.zeros(1, device=device), rng_of(1).to(device))
    with pytest.raises(RuntimeError, match=r"ipt\[0\] must be \[.., groups of a row, 34\] for 100 weights in 8 bits"):
        pins.accumulate_(ipt, [], grads, *tables(layout, device), *rest, "precomputed")
