"""States and moments in 8 bits on the CPU, against reference.py, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from cases import LISTS, assert_all_same, clones, folded_codes, index_of, masks_of, rng_of, tensors
from test_ops_update import AdamW, run, torch_step
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext
SHAPES: list[tuple[int, ...]] = [
    *((n,) for n in (1, 0, 31, 32, 33, 65, 511, 2 * 16384 + 77)),
    # Groups that begin anew in every row, across the ends of blocks and chunks; rows of several dimensions.
    *((1, 1), (7, 33), (300, 65), (3, 16384), (1030, 31), (40, 2), (6, 5, 3, 3), (3, 5, 33), (4, 0)),
]
VALUES = ("normal", "special", "zeros", "equal", "spread")


def weights(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, values: str = "normal", seed: int = 0
) -> list[Tensor]:
    """One tensor per shape, see cases.tensors."""
    made = tensors([math.prod(shape) for shape in shapes], dtype, values, seed)
    return [x.view(shape) for x, shape in zip(made, shapes, strict=True)]


def values_of(shapes: Sequence[tuple[int, ...]], values: str, seed: int = 0, signed: bool = False) -> list[Tensor]:
    """float32, not negative unless `signed`; "spread": many octaves within a group."""
    if values == "spread":
        made = weights(shapes, torch.float32, seed=seed)
        other = weights(shapes, torch.float32, seed=seed + 50)
        made = [x * torch.exp2(8 * y) for x, y in zip(made, other, strict=True)]
    else:
        made = weights(shapes, torch.float32, values, seed=seed)
    return made if signed or values == "special" else [x.abs() for x in made]


def plain_of(groups: Tensor, like: Tensor) -> Tensor:
    """Of values [.., groups, 32] those of the weights."""
    rows, columns = math.prod(groups.shape[:-2]), like.numel() // max(math.prod(groups.shape[:-2]), 1)
    return groups.reshape(rows, groups.shape[-2] * 32)[:, :columns].reshape(like.shape)


def placed(packed: Tensor, misaligned: bool = False) -> Tensor:
    """A copy, one byte after an address of whole words."""
    storage = torch.empty(packed.numel() + 1, dtype=packed.dtype)
    return storage[int(misaligned) :][: packed.numel()].view(packed.shape).copy_(packed)


def coded(values: list[Tensor], signed: bool = False, misaligned: bool = False) -> list[Tensor]:
    return [placed(ref.encode(x, signed), misaligned) for x in values]


def assert_same_bytes(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e), f"{int((a != e).sum())} of {a.numel()} bytes differ"


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("signed", [False, True])
def test_decoding_is_near_and_keeps_zeros_and_odd_values(values: str, signed: bool) -> None:
    for x in values_of(SHAPES, values, signed=signed):
        packed = ref.encode(x, signed)
        assert packed.shape == ref.coded_shape(x.shape) == ops.coded_shape(x.shape)
        back = ref.decode(packed, x.shape)
        odd = ~x.isfinite() | ((x < 0) & (not signed))
        assert torch.equal(back.isnan(), odd)
        assert not back[(x == 0) & ~odd].any()
        sound = torch.where(odd, 0.0, x).abs()
        groups = ops.by_group(sound)
        largest = plain_of(groups.amax(-1, keepdim=True).expand_as(groups), x)
        error = (back.nan_to_num() - torch.where(odd, 0.0, x)).abs()
        if signed:
            # A step of the code at q is (1 + q)² / 254 of the scale, which is at most 1 % above the largest.
            assert (error <= (largest + sound) / 127 + 1e-44).all()
        else:
            assert (back[(x > 0) & ~odd] > 0).all() or largest.max() < 1e-30
            root, bound = sound.sqrt(), 1.02 * (largest.sqrt() + sound.sqrt()) ** 2 / (largest.sqrt() + 1e-30) / 254
            assert ((back.nan_to_num().sqrt() - root).abs() <= bound + 1e-22).all()


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("values", VALUES)
def test_a_state_is_stored_and_read_as_the_reference_says(values: str, misaligned: bool) -> None:
    """The first score of a window replaces what ipt holds; then the mean of two."""
    first, then = values_of(SHAPES, values, 1), values_of(SHAPES, values, 2)
    ipt = coded([torch.zeros_like(x) for x in first], misaligned=misaligned)
    layout = ops.Layout.of(first)
    tables = (layout.places, layout.chunks, torch.zeros(len(SHAPES)))
    pins.accumulate_(ipt, [], first, *tables, torch.zeros(1), rng_of(0), "precomputed")
    assert_same_bytes(ipt, [ref.encode(x) for x in first])
    before = [ref.decode(i, x.shape) for i, x in zip(ipt, first, strict=True)]
    pins.accumulate_(ipt, [], then, *tables, torch.ones(1), rng_of(0), "precomputed")
    means = [ref.next_ipt("precomputed", i, c, 1) for i, c in zip(before, then, strict=True)]
    assert_same_bytes(ipt, [ref.encode(x) for x in means])


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("beta2", [0.95, 1.0])
def test_fold_and_the_selection_that_follows(values: str, beta2: float) -> None:
    mean, unc, ipt = (values_of(SHAPES, values, s) for s in (1, 2, 3))
    states = [coded(x, misaligned=True) for x in (mean, unc, ipt)]
    layout = ops.Layout.of(mean)
    tables = (layout.places, layout.chunks)
    was = [[ref.decode(s, x.shape) for s, x in zip(state, mean, strict=True)] for state in states]
    expected = [ref.fold(m, u if beta2 < 1 else None, i, 0.85, beta2) for m, u, i in zip(*was, strict=True)]
    bracket, counts = torch.tensor([0, 2**32 - 1, 16, 0, 0]), torch.zeros(1 + ops.BINS, dtype=torch.int64)
    given = states[1] if beta2 < 1 else []
    pins.fold_(
        states[0], given, states[2], *tables, torch.ones(1), rng_of(1), 0.85, beta2, bracket=bracket, counts=counts
    )
    assert_same_bytes(states[0], folded_codes(expected, 0))
    if beta2 < 1:
        assert_same_bytes(states[1], folded_codes(expected, 1))
    check_selection("product" if beta2 < 1 else "identity", states[0], given, layout)
    keys = torch.cat(keys_of("product" if beta2 < 1 else "identity", states[0], given, layout))
    assert torch.equal(counts[1:], torch.bincount(keys >> 16, minlength=ops.BINS))


def plain(packed: Tensor, numel: int) -> Tensor:
    """float32 [numel]."""
    rows = packed.shape[:-2]
    return ref.decode(packed, (*rows, numel // max(math.prod(rows), 1))).flatten()


def keys_of(score: str, a: list[Tensor], b: list[Tensor], layout: ops.Layout) -> list[Tensor]:
    sizes = [len(i) for i in index_of(layout)]
    first = [plain(x, n) for x, n in zip(a, sizes, strict=True)]
    second = [plain(x, n) for x, n in zip(b, sizes, strict=True)] if b else [None] * len(a)
    return [ref.order_key(ref.score(score, x, y)) for x, y in zip(first, second, strict=True)]


def check_selection(score: str, a: list[Tensor], b: list[Tensor], layout: ops.Layout) -> None:
    keys, index = torch.cat(keys_of(score, a, b, layout)), torch.cat(index_of(layout))
    tables = (layout.places, layout.chunks)
    sampled = pins.sample(a, b, *tables, score, 500)
    assert torch.isin(sampled, keys).all()
    for n_prune in (0, 1, len(keys) // 3, len(keys) - 1, len(keys)):
        for exact in (True, False):
            cutoff = pins.select(a, b, *tables, score, torch.tensor(n_prune), exact)
            wanted = ref.select(keys, index, n_prune, exact)
            kept, expected = (ref.keep_mask(keys, index, threshold) for threshold in (tuple(cutoff.tolist()), wanted))
            assert torch.equal(kept, expected)
        cutoff = pins.select(a, b, *tables, score, torch.tensor(n_prune))
        masks = [torch.zeros(ops.mask_bytes(len(i)), dtype=torch.uint8) for i in index_of(layout)]
        stats = torch.zeros(len(a), 3, dtype=torch.int64)
        pins.pack_(masks, stats, a, b, *tables, score, cutoff.reshape(1, 2))
        threshold = tuple(cutoff.tolist())
        for bits, own, at in zip(masks, keys_of(score, a, b, layout), index_of(layout), strict=True):
            assert torch.equal(bits, ref.pack_bits(ref.keep_mask(own, at, threshold)))
        assert int(stats[:, 0].sum()) == len(keys) - n_prune


def test_the_deviation_and_many_small_tensors() -> None:
    sizes = [(n,) for n in LISTS["many"]]
    mean, ipt = (coded(values_of(sizes, "normal", s)) for s in (1, 2))
    check_selection("deviation", mean, ipt, ops.Layout.of(values_of(sizes, "normal")))


@pytest.mark.parametrize("values", ["normal", "special", "spread"])
def test_criteria_made_of_the_moments(values: str) -> None:
    """fold_moments_ and fisher read AdamW's moments as they are stored."""
    params, layout = weights(SHAPES, torch.bfloat16, seed=9), ops.Layout.of(weights(SHAPES, torch.float32))
    first, second = coded(values_of(SHAPES, values, 1, signed=True), signed=True), coded(values_of(SHAPES, values, 2))
    mean, unc = (coded(values_of(SHAPES, "normal", s)) for s in (3, 4))
    factors = torch.linspace(1e-3, 2, 3 * len(SHAPES)).view(-1, 3)
    plain = [
        [ref.decode(x, p.shape) for x, p in zip(list_, params, strict=True)] for list_ in (first, second, mean, unc)
    ]
    expected = [
        ref.fold(m, u, ref.moments(p, e, s, f), 0.85, 0.95)
        for p, e, s, m, u, f in zip(params, *plain, factors, strict=True)
    ]
    tables = (layout.places, layout.chunks)
    pins.fold_moments_(mean, unc, params, first, second, *tables, factors, torch.ones(1), rng_of(1), 0.85, 0.95)
    assert_same_bytes(mean, folded_codes(expected, 0))
    assert_same_bytes(unc, folded_codes(expected, 1))
    bias = factors[:, 2].contiguous()
    scores = [ref.score("fisher", p, s, f) for p, s, f in zip(params, plain[1], bias, strict=True)]
    keys, index = torch.cat([ref.order_key(s).flatten() for s in scores]), torch.cat(index_of(layout))
    cutoff = pins.select(params, second, *tables, "fisher", torch.tensor(len(keys) // 2), factors=bias)
    assert int(ref.keep_mask(keys, index, tuple(cutoff.tolist())).sum()) == len(keys) - len(keys) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", ["normal", "special", "spread"])
def test_a_step_of_adamw(dtype: torch.dtype, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_sqrt = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch_sqrt(x.double()).to(x.dtype))
    optimizer = AdamW(1e-2, weight_decay=0.1)
    for masked, accepted, misaligned in ((False, 0, False), (True, 2, True)):
        params, grads = weights(SHAPES, dtype, values.replace("spread", "normal"), 1), weights(SHAPES, dtype, seed=2)
        stored = [
            coded(values_of(SHAPES, values, 3, signed=True), signed=True, misaligned=misaligned),
            coded(values_of(SHAPES, values, 4), misaligned=misaligned),
        ]
        ipt, rng, layout = coded(values_of(SHAPES, values, 5)), rng_of(3), ops.Layout.of(params)
        moments = [[ref.decode(x, p.shape) for x, p in zip(m, params, strict=True)] for m in stored]
        stepped, new = torch_step(optimizer, 3, params, moments, grads)
        keep, masks = masks_of(params)
        if not masked:
            keep, masks = [torch.ones_like(k) for k in keep], []
        scores = [
            ref.next_ipt("pins", ref.decode(i, p.shape), ref.instant_score("pins", p, q, g, 1e-2), accepted)
            for i, p, q, g in zip(ipt, params, stepped, grads, strict=True)
        ]
        kwargs = {"masks": masks, "accepted": float(accepted), "rng": rng, "clear_state": masked}
        run(optimizer, 3, params, stored, grads, layout, ipt=ipt, **kwargs)
        assert_same_bytes(ipt, [ref.encode(x) for x in scores])
        bits = [ref.update_bits(i, *rng.tolist()) for i in index_of(layout)]
        for kind, signed, moment, expected in zip(("first", "second"), (True, False), stored, new, strict=True):
            kept = [torch.where(k, m, 0.0) if masked else m for k, m in zip(keep, expected, strict=True)]
            assert_same_bytes(moment, [ref.encode(x, signed, b[kind]) for x, b in zip(kept, bits, strict=True)])
        zeroed = [torch.where(k, p, 0.0) for k, p in zip(keep, stepped, strict=True)]
        assert_all_same(params, [ref.store(p, dtype, b["params"]) for p, b in zip(zeroed, bits, strict=True)])


def test_a_part_of_a_tensor_is_rounded_as_the_whole() -> None:
    """Rows, or columns at multiples of 32: groups, scales and random bits are those of the whole."""
    p, g = weights([(9, 131)], torch.float32, seed=1)[0], weights([(9, 131)], torch.float32, seed=2)[0]
    for box in ((slice(2, 6), slice(0, 131)), (slice(0, 9), slice(64, 131)), (slice(1, 9), slice(32, 64))):
        whole = [p.clone(), *(ref.encode(torch.zeros_like(p), signed) for signed in (True, False))]
        own, rows = p[box].clone(), g[box].contiguous()
        part = [own, *(ref.encode(torch.zeros_like(own), signed) for signed in (True, False))]
        where = ops.Shard((9, 131), (box[0].start, box[1].start))
        ops.check_cut("p", own.shape, where)
        shard = ops.Layout.of([own], [where])
        for tensors_, grad, layout in ((whole, g, ops.Layout.of([p])), (part, rows, shard)):
            run(AdamW(1e-2), 1, [tensors_[0]], [[tensors_[1]], [tensors_[2]]], [grad], layout, rng=rng_of(1))
        assert torch.equal(whole[0][box], part[0])
        for all_, parts in zip(whole[1:], part[1:], strict=True):
            assert torch.equal(all_[box[0], box[1].start // 32 : -(-box[1].stop // 32)], parts)


@pytest.mark.parametrize(
    ("full", "local", "start", "fits"),
    [
        ((9, 131), (4, 131), (2, 0), True),
        ((9, 131), (9, 64), (0, 0), True),
        ((9, 131), (9, 48), (0, 0), False),
        ((9, 131), (9, 51), (0, 80), False),
        ((64,), (32,), (32,), True),
        ((64,), (40,), (0,), False),
        ((6, 64, 3, 3), (6, 32, 3, 3), (0, 32, 0, 0), True),
        ((6, 64, 3, 3), (6, 16, 3, 3), (0, 16, 0, 0), False),
        ((6, 64, 3, 3), (6, 64, 3, 2), (0, 0, 0, 0), False),
        ((3, 5, 33), (3, 2, 33), (0, 3, 0), True),
        ((64,), (0,), (64,), True),
    ],
)
def test_a_cut_through_a_group_is_refused(
    full: tuple[int, ...], local: tuple[int, ...], start: tuple[int, ...], fits: bool
) -> None:
    if fits:
        ops.check_cut("p", local, ops.Shard(full, start))
        return
    with pytest.raises(ValueError, match=r"p is cut inside its rows of [\d,]+ weights: .* or at multiples of 32"):
        ops.check_cut("p", local, ops.Shard(full, start))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg": torch.float32}, r"exp_avg_sq must have the dtype of exp_avg \(float32\), got uint8"),
        (
            {"exp_avg_sq": torch.bfloat16},
            r"exp_avg_sq must have the dtype of exp_avg \(int8 needs uint8\), got bfloat16",
        ),
        ({"exp_avg": torch.uint8}, r"exp_avg\[0\] must be float32 or bfloat16 or int8, got uint8"),
        ({"size": 1}, r"exp_avg\[0\] must be \[.., groups of a row, 34\] for 100 weights in 8 bits, got \(136,\)"),
        ({"rows": 1}, r"places\[0\] has rows of 100 weights, other ones than its 8-bit storage of \(4, 1, 34\)"),
    ],
)
def test_what_is_no_8_bit_state_is_refused(change: dict[str, torch.dtype], message: str) -> None:
    p, g = tensors([100], torch.float32), tensors([100], torch.float32, seed=1)
    lists = {"exp_avg": coded(p, signed=True), "exp_avg_sq": coded([x.abs() for x in p])}
    for name in lists:
        if name in change:
            count = (4, 34) if change[name] == torch.uint8 else (100,)
            lists[name] = [torch.zeros(count, dtype=change[name])]
    if "size" in change:
        lists["exp_avg"] = [torch.zeros(136, dtype=torch.int8)]
    if "rows" in change:
        lists["exp_avg_sq"] = [torch.zeros(4, 1, 34, dtype=torch.uint8)]
    before = clones(p)
    with pytest.raises(RuntimeError, match=message):
        run(AdamW(1e-2), 1, p, list(lists.values()), g, ops.Layout.of(p))
    assert_all_same(p, before)
