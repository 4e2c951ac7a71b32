"""The Triton operators against reference.py, bit for bit: in the interpreter on CPU tensors, and on a GPU.

The same calls, `torch.ops.pins_ext.*`, as of the C++ kernels; for the interpreter the Triton launchers take their place
in this process. Sizes are small: the interpreter takes some 30 ms for a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import FLOATS, STATES, VALUES, assert_all_same, clones, index_of, masks_of, random_of, rng_of, tensors
from torch import Tensor

from pins_ext import ops, triton_kernels
from pins_ext import reference as ref

pytestmark = [
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
    # The interpreter computes with numpy, which remarks upon infinities.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered"),
]

pins = torch.ops.pins_ext

# 1024 weights are a block of the vector path, 512 one of the masked path, 16384 a chunk.
SMALL = [0, 1, 1539]
LISTS: dict[str, list[int]] = {
    "none": [],
    "empty": [0],
    "one": [1],
    "odd": [77],
    "blocks": [2048, 1539, 1024],
    "chunks": [16384, 17413],
    "many": [1, 0, 64, 7, 130] * 10 + [513],
}
# Shards of full tensors, whose local parts are no runs of global indices but the first.
SHARDS = [
    ops.Shard((9, 100), (3, 0)),
    ops.Shard((6, 1000), (0, 300)),
    ops.Shard((5, 7, 11), (1, 2, 3)),
    ops.Shard((2, 3, 5, 70), (0, 1, 2, 3)),
    ops.Shard((700, 3), (0, 1)),
]
SHARD_SIZES = [(4, 100), (6, 410), (3, 4, 6), (2, 2, 2, 60), (700, 1)]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpret, id="interpreter"),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the tensors live. On the CPU: the Triton kernels, interpreted, are its kernels during the test."""
    if request.param == "cuda":
        yield "cuda"
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        # Triton 3.6 lets numpy make an int of an array of one element, which numpy 2.4 refuses (triton issue 9171).
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)
    library = torch.library.Library("pins_ext", "IMPL")
    triton_kernels.register(library, "CPU")
    yield "cpu"
    library._destroy()


def layout_of(tensors_: list[Tensor], shards: list[ops.Shard | None] | None = None) -> ops.Layout:
    return ops.Layout.of(tensors_, shards, base=(1 << 32) - 1000)


def on(device: str, *lists: list[Tensor]) -> tuple[list[Tensor], ...]:
    """Copies on the device, as misaligned as the originals are."""
    copies = []
    for tensors_ in lists:
        row = []
        for x in tensors_:
            storage = torch.empty(x.numel() + 16, dtype=x.dtype, device=device)
            skip = x.storage_offset() % 16
            row.append(storage[skip : skip + x.numel()].view(x.shape).copy_(x))
        copies.append(row)
    return tuple(copies)


def tables(layout: ops.Layout, device: str) -> tuple[Tensor, Tensor]:
    return layout.rows.to(device), layout.chunks.to(device)


def cpu(tensors_: list[Tensor]) -> list[Tensor]:
    return [x.cpu() for x in tensors_]


# ---- accumulate_ -----------------------------------------------------------------------------------


def accumulated(
    criterion: str, ipt: list[Tensor], params: list[Tensor], grads: list[Tensor], layout: ops.Layout, lr: Tensor, n: int
) -> list[Tensor]:
    """What accumulate_ stores, weight by weight; `grads` as used."""
    out = []
    for i, random in enumerate(random_of(layout, rng_of(n))):
        c = ref.instant_score(criterion, params[i].flatten(), params[i].flatten(), grads[i].flatten(), float(lr[i]))
        out.append(ref.store(ref.next_ipt(criterion, ipt[i].flatten(), c, n), ipt[i].dtype, random).view(ipt[i].shape))
    return out


def check_accumulate(
    device: str,
    criterion: str,
    n: int,
    lists: tuple[list[Tensor], list[Tensor], list[Tensor]],
    shards: list[ops.Shard | None] | None = None,
) -> None:
    ipt, params, grads = lists
    layout, lr = layout_of(ipt, shards), torch.linspace(1e-5, 0.9, len(ipt))
    expected = accumulated(criterion, ipt, params, grads, layout, lr, n)
    ipt_, params_, grads_ = on(device, *lists)
    given = [] if criterion == "precomputed" else params_
    accepted = torch.tensor([float(n)], device=device)
    pins.accumulate_(
        ipt_, given, grads_, *tables(layout, device), lr.to(device), accepted, rng_of(n).to(device), criterion
    )
    assert_all_same(cpu(ipt_), expected)
    assert_all_same(cpu(params_ + grads_), params + grads)


@pytest.mark.parametrize("criterion", ops.CRITERIA)
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulate_kernel(device: str, dtype: torch.dtype, state: torch.dtype, criterion: str) -> None:
    for n, misaligned in ((0, True), (3, False)):
        sizes = [77, 600] if misaligned else SMALL
        lists = (
            tensors(sizes, state, seed=3, misaligned=misaligned),
            tensors(sizes, dtype, seed=1, misaligned=misaligned),
        )
        check_accumulate(device, criterion, n, (*lists, tensors(sizes, dtype, seed=2)))


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_accumulate_kernel_sizes(device: str, dtype: torch.dtype, sizes: str) -> None:
    lists = (tensors(LISTS[sizes], dtype, seed=s, misaligned=sizes == "odd") for s in (3, 1, 2))
    check_accumulate(device, "pins", 1, tuple(lists))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulate_kernel_ugly_values(device: str, dtype: torch.dtype, values: str) -> None:
    for criterion in ("pins", "pins-signed", "movement"):
        state = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        lists = (
            tensors([1100, 5], state, values, 3),
            tensors([1100, 5], dtype, values, 1),
            tensors([1100, 5], dtype, values, 2),
        )
        check_accumulate(device, criterion, 4, lists)


def test_accumulate_kernel_shards(device: str) -> None:
    lists = tuple([torch.randn(size).bfloat16() for size in SHARD_SIZES] for _ in range(3))
    check_accumulate(device, "pins", 2, lists, SHARDS)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulate_kernel_scales_clips_and_skips(device: str, dtype: torch.dtype) -> None:
    params, grads = tensors([1300], dtype, seed=1), tensors([1300], dtype, "special", seed=2)
    scale, clip, lr = torch.tensor([1000.0]), torch.tensor([0.3]), torch.tensor([0.5])
    layout = layout_of(params)
    for found_inf in (0.0, 1.0):
        ipt = tensors([1300], torch.float32, seed=3)
        used = [(g.float() / scale) * clip for g in grads]
        expected = clones(ipt) if found_inf else accumulated("pins", ipt, params, used, layout, lr, 2)
        scalars = {"grad_scale": scale, "clip": clip, "found_inf": torch.tensor([found_inf])}
        ipt_, params_, grads_ = on(device, ipt, params, grads)
        rest = [x.to(device) for x in (lr, torch.tensor([2.0]), rng_of(2))]
        kwargs = {name: x.to(device) for name, x in scalars.items()}
        pins.accumulate_(ipt_, params_, grads_, *tables(layout, device), *rest, "pins", **kwargs)
        assert_all_same(cpu(ipt_), expected)


# ---- fold_ -----------------------------------------------------------------------------------------


def counted(keys: Tensor, bracket: list[int]) -> Tensor:
    """What a counting pass leaves in `counts`."""
    lo, hi, shift, *_ = bracket
    inside = keys[(keys >= lo) & (keys <= hi)]
    return torch.cat([(keys < lo).sum()[None], torch.bincount((inside - lo) >> shift, minlength=ops.BINS)])


def keys_of(score: str, a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Order key of every weight of the list, int64 [N]."""
    keys = [ref.order_key(ref.score(score, x, b[i] if b else None)).flatten() for i, x in enumerate(a)]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *keys])


def check_fold(
    device: str,
    mean: list[Tensor],
    unc: list[Tensor],
    ipt: list[Tensor],
    accepted: float = 3.0,
    bracket: list[int] | None = None,
    shards: list[ops.Shard | None] | None = None,
) -> None:
    layout, rng = layout_of(mean, shards), rng_of(1)
    expected_mean, expected_unc = clones(mean), clones(unc)
    for i, random in enumerate(random_of(layout, rng) if accepted else []):
        old_unc = unc[i].flatten() if unc else None
        new_mean, new_unc = ref.fold(mean[i].flatten(), old_unc, ipt[i].flatten(), 0.85, 0.99)
        expected_mean[i] = ref.store(new_mean, mean[i].dtype, random).view(mean[i].shape)
        if new_unc is not None:
            expected_unc[i] = ref.store(new_unc, mean[i].dtype, random >> 16).view(mean[i].shape)
    mean_, unc_, ipt_ = on(device, mean, unc, ipt)
    counts = torch.full((1 + ops.BINS,), 7, device=device)
    kwargs = {"bracket": torch.tensor(bracket, device=device), "counts": counts} if bracket else {}
    rest = torch.tensor([accepted], device=device), rng.to(device)
    pins.fold_(mean_, unc_, ipt_, *tables(layout, device), *rest, 0.85, 0.99, **kwargs)
    assert_all_same(cpu(mean_), expected_mean)
    assert_all_same(cpu(unc_), expected_unc)
    if bracket:
        keys = keys_of("product" if unc else "identity", expected_mean, expected_unc)
        assert torch.equal(
            counts.cpu(), counted(keys, bracket) if bracket[4] == 0 else torch.full_like(counts, 7).cpu()
        )


@pytest.mark.parametrize("accepted", [3.0, 0.0])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_fold_kernel(device: str, state: torch.dtype, values: str, accepted: float) -> None:
    mean, unc, ipt = (tensors([1, 0, 1100], state, values, seed=s) for s in (1, 2, 3))
    check_fold(device, mean, unc, ipt, accepted)
    check_fold(device, mean, [], ipt, accepted, [0x7F000000, 0xBF800000, 15, 0, 0])


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_fold_kernel_sizes_and_counts(device: str, state: torch.dtype, sizes: str) -> None:
    mean, unc, ipt = (tensors(LISTS[sizes], state, seed=s, misaligned=sizes == "odd") for s in (1, 2, 3))
    check_fold(device, mean, unc, ipt, 1.0, [0x80000000, 0xBE000000, 14, 0, 0])


def test_fold_kernel_leaves_counts_of_a_resolved_bracket(device: str) -> None:
    mean, unc, ipt = (tensors([1100], torch.float32, seed=s) for s in (1, 2, 3))
    check_fold(device, mean, unc, ipt, 1.0, [0x80000000, 0x80000000, 0, 3, 1])


def test_fold_kernel_shards(device: str) -> None:
    mean, unc, ipt = ([torch.randn(size).bfloat16() for size in SHARD_SIZES] for _ in range(3))
    check_fold(device, mean, unc, ipt, 1.0, [0x7F000000, 0xBF800000, 15, 0, 0], SHARDS)


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


def bracket_of(lo: int, hi: int, resolved: int = 0) -> list[int]:
    return [lo, hi, max(0, (hi - lo).bit_length() - 16), 0, resolved]


@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_count_kernel(device: str, score: str, dtype: torch.dtype) -> None:
    for values in VALUES:
        a, b = operands(score, dtype, [0, 1100], values)
        keys = keys_of(score, a, b).sort().values
        middle, upper = int(keys[550]), int(keys[825])
        for lo, hi in ((0, ref.MASK32), (middle, middle), (max(middle - 5000, 0), upper)):
            check_count(device, score, a, b, bracket_of(lo, hi))


@pytest.mark.parametrize("sizes", LISTS)
def test_count_kernel_sizes(device: str, sizes: str) -> None:
    a, b = operands("product", torch.bfloat16, LISTS[sizes])
    check_count(device, "product", a, b, bracket_of(0x70000000, 0xC0000000))


def test_count_kernel_counts_ties_wherever_they_lie_in_the_bracket(device: str) -> None:
    """At both ends, at zero, in the middle, elsewhere, and outside; also in brackets of one, two and three keys."""
    scores = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 2e-45, 0.5, 1.0]).repeat_interleave(200)[torch.randperm(1400)]
    levels = sorted({int(k) for k in ref.order_key(scores)})
    for lo in levels[:-1]:
        for hi in {lo, lo + 1, lo + 2, *levels[2:]}:
            if hi >= lo:
                check_count(device, "identity", [scores], [], bracket_of(lo, hi))


def test_count_kernel_leaves_a_resolved_bracket(device: str) -> None:
    a, b = operands("product", torch.float32, [700])
    check_count(device, "product", a, b, bracket_of(5, 5, resolved=1))


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
    rows = layout_of(a, SHARDS).rows
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
@pytest.mark.parametrize("sizes", [[], [0], [1], [16384, 99]], ids=str)
def test_select_kernels_sizes(device: str, sizes: list[int], exact: bool) -> None:
    check_select(device, "product", *operands("product", torch.bfloat16, sizes), exact)


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
