"""The GPU's operators, emulated, against the C++ CPU operators, bit for bit, on inputs meant to hurt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from cases import STATES, assert_all_same, rng_of, tensors
from torch import Tensor
from watch import like_a_gpu
from window import Model, assert_same_state

from pins_ext import PruneConfig, Pruner, ops
from pins_ext import reference as ref
from pins_ext.optim import PinsAdamW, PinsSGD
from ptx_emulator import plugin

pytestmark = [pytest.mark.ptx, pytest.mark.slow]

pins = torch.ops.pins_ext
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

Emulated = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> Emulated:
    """`with emulated(programs=3):` the CPU's operators are those of the GPU, whose host looks at nothing."""

    @contextmanager
    def kernels(programs: int = 3) -> Iterator[None]:
        with plugin.on_emulated_gpu(request.config, programs), like_a_gpu():
            yield

    return kernels


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- sizes and offsets, each list at its own ------------------------------------------------------------------------


def at_offset(x: Tensor, elements: int) -> Tensor:
    storage = torch.empty(x.numel() + elements + 32, dtype=x.dtype)
    skip = (-storage.data_ptr() % 16) // x.element_size() + elements
    return storage[skip : skip + x.numel()].copy_(x)


def every_operator(
    dtype: torch.dtype, state: torch.dtype, sizes: Sequence[int], offsets: Sequence[int], values: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Floating-point states, and all that counts, after every operator of Triton's.

    Args:
        offsets: in elements, of ipt and mean, unc, params, grads, masks.
    """

    def place(xs: Sequence[Tensor], k: int) -> list[Tensor]:
        return [at_offset(x, offsets[k]) for x in xs]

    ipt, mean = place(tensors(sizes, state, values, 3), 0), place(tensors(sizes, state, values, 4), 0)
    unc = place(tensors(sizes, state, values, 5), 1)
    params, grads = place(tensors(sizes, dtype, values, 1), 2), place(tensors(sizes, dtype, values, 2), 3)
    masks = place([ops.new_mask(p) for p in params], 4)
    layout = ops.Layout.of(params, base=(1 << 32) - 3000)
    work, rng, one = (layout.places, layout.chunks), rng_of(1), torch.ones(1)
    lr = torch.linspace(1e-5, 1e-3, len(sizes))
    for criterion in ("pins", "movement"):
        pins.accumulate_(ipt, params, grads, *work, lr, one, rng, criterion, grad_scale=one * 3, clip=one / 7)
    counts = torch.zeros(1 + ops.BINS, dtype=torch.int64)
    bracket = ops.bracket_around(torch.tensor([0x80000000 + (120 << 23), 0]), octaves=4)
    pins.fold_(mean, unc, ipt, *work, one, rng, 0.85, 0.95, bracket=bracket, counts=counts)
    counted = [counts.clone()]
    for kind, a, b in (
        ("product", mean, unc),
        ("identity", mean, []),
        ("deviation", mean, ipt),
        ("magnitude", params, []),
    ):
        # Not the CPU's sample, which is placed in float64: only its keys are checked.
        keys = torch.cat([ref.order_key(ref.score(kind, x, b[i] if b else None)).flatten() for i, x in enumerate(a)])
        assert torch.isin(pins.sample(a, b, *work, kind, 100), keys).all()
        for n_prune in {0, sum(sizes) // 3, max(sum(sizes) - 1, 0), sum(sizes)}:
            counted += selected_and_packed(masks, a, b, work, kind, n_prune)
    return [*ipt, *mean, *unc, *params, *grads], counted


def selected_and_packed(
    masks: list[Tensor], a: list[Tensor], b: list[Tensor], work: tuple[Tensor, Tensor], kind: str, n_prune: int
) -> list[Tensor]:
    total = sum(x.numel() for x in a)
    threshold = pins.select(a, b, *work, kind, torch.tensor(n_prune))
    stats = torch.zeros(len(a), 3, dtype=torch.int64)
    pins.pack_(masks, stats, a, b, *work, kind, threshold[None])
    if 0 < n_prune < total:
        assert int(stats[:, 0].sum()) == total - n_prune, (kind, n_prune, stats)
    key = int(threshold[0])
    tie = pins.tie_index(a, b, *work, kind, torch.tensor([key, key, 0, 1, 0]))
    counts = torch.empty(1 + ops.BINS, dtype=torch.int64)
    near = torch.tensor([max(key - 5, 0), min(key + 70000, ops.MAX_KEY), 1, 0, 0])
    pins.count_(counts, a, b, *work, kind, near)
    return [threshold, stats, *(m.clone() for m in masks), tie, counts]


def check_operators(emulated: Emulated, *case: Any) -> None:
    with emulated():
        floats, counted = every_operator(*case)
    expected_floats, expected_counted = every_operator(*case)
    assert_all_same(floats, expected_floats)
    for x, y in zip(counted, expected_counted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("n", [1, 3, 17, 1023, 1024, 1025, 4095, 4096, 4097])
def test_sizes(emulated: Emulated, n: int) -> None:
    check_operators(emulated, F32, F32, [n], (0, 0, 0, 0, 0), "normal")
    check_operators(emulated, BF16, BF16, [n, 0, n], (0, 0, 0, 0, 0), "special")


ALIKE = [(1, 1, 1, 1, 0), (2, 2, 2, 2, 0), (4, 4, 4, 4, 0), (3, 2, 1, 4, 3)]
ALONE = [(1, 0, 0, 0, 0), (0, 2, 0, 0, 0), (0, 0, 4, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 8), (0, 0, 0, 0, 1)]


@pytest.mark.parametrize("offsets", [*ALIKE, *ALONE], ids=str)
@pytest.mark.parametrize(("dtype", "state"), [(F32, F32), (BF16, BF16), (F16, F32), (BF16, F32), (F16, BF16)], ids=str)
def test_offsets(emulated: Emulated, dtype: torch.dtype, state: torch.dtype, offsets: tuple[int, ...]) -> None:
    check_operators(emulated, dtype, state, [4097, 1030], offsets, "ties")


# ---- selection: ties, misses, overflow ------------------------------------------------------------------------------


def check_selection(
    emulated: Emulated,
    x: list[Tensor],
    n_prunes: Sequence[int],
    thresholds: Sequence[int | None] = (None,),
    exact: bool = True,
) -> None:
    """Thresholds as the reference's, from scratch or from counts around a threshold of before."""
    layout = ops.Layout.of(x)
    work = layout.places, layout.chunks
    keys = torch.cat([ref.order_key(v.float()).flatten() for v in x])
    index = torch.cat([ref.global_index(row) for row in layout.places])
    for n_prune in n_prunes:
        target = torch.tensor(n_prune)
        on_cpu = pins.select(x, [], *work, "identity", target, exact)
        keep = ref.keep_mask(keys, index, ref.select(keys, index, n_prune, exact))
        assert torch.equal(ref.keep_mask(keys, index, tuple(on_cpu.tolist())), keep)
        for before in thresholds:
            counted: dict[str, Tensor] = {}
            with emulated():
                if before is not None:
                    counted["bracket"] = ops.bracket_around(torch.tensor([before, 0]))
                    counted["counts"] = torch.zeros(1 + ops.BINS, dtype=torch.int64)
                    pins.count_(counted["counts"], x, [], *work, "identity", counted["bracket"])
                # As on a GPU, one table of addresses for all passes.
                pointers = import_module("pins_ext.triton_kernels.table").pointer_table(None, layout.places, x, [])
                threshold = pins.select(x, [], *work, "identity", target, exact, **counted, pointers=pointers)
                masks, stats = [ops.new_mask(v) for v in x], torch.zeros(len(x), 3, dtype=torch.int64)
                pins.pack_(masks, stats, x, [], *work, "identity", threshold[None])
            assert torch.equal(threshold, on_cpu), (n_prune, before)
            if exact:
                assert int(stats[:, 0].sum()) == max(0, keys.numel() - n_prune)


N = 40_000


def test_all_scores_equal(emulated: Emulated) -> None:
    x = torch.full((N,), 0.25)
    before = (None, 0xBE800000, 0xA0000000, 0xF0000000)
    check_selection(emulated, [x[:25_000], x[25_000:].clone()], (1, 16384, 20_000, N - 1), before)


def test_two_scores(emulated: Emulated) -> None:
    x = torch.where(torch.rand(N) < 0.5, 1.0, -1.0)
    low = int((x < 0).sum())
    check_selection(emulated, [x], (low - 1, low, low + 1, N // 3))


def test_mostly_zeros_of_both_signs(emulated: Emulated) -> None:
    x = torch.where(torch.rand(N) < 0.7, 0.0, torch.randn(N))
    check_selection(emulated, [torch.where(torch.rand(N) < 0.5, -x, x)], (N // 2, N * 9 // 10, 5))


def test_denormals(emulated: Emulated) -> None:
    check_selection(emulated, [torch.randn(N) * 1e-41], (N // 2, 7))


def test_not_a_number_and_infinities(emulated: Emulated) -> None:
    x = torch.randn(N)
    x[::3], x[1::7], x[2::11] = float("nan"), float("inf"), float("-inf")
    check_selection(emulated, [x], (N // 20, N // 2, N - 5), (None, 0x80000000))


@pytest.mark.parametrize("exact", [True, False])
def test_brackets_that_miss(emulated: Emulated, exact: bool) -> None:
    x = torch.randn(N) * 10 ** (70 * torch.rand(N) - 35)
    before = (None, 0, 1, 0x80000000, 0xFFFFFFFF, 0xC0000000, 0x3F800000)
    check_selection(emulated, [x], (N // 2, N), before, exact)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_ranks_at_the_ends_of_a_tie(emulated: Emulated, share: float) -> None:
    x = (torch.randn(N) * 3).round()
    value = x.sort().values[int(N * share)]
    first, last = int((x < value).sum()), int((x <= value).sum())
    check_selection(emulated, [x], (first, first + 1, last - 1, last))


def test_a_few_weights(emulated: Emulated) -> None:
    check_selection(emulated, [torch.randn(1), torch.randn(0), torch.randn(2)], (0, 1, 2, 3, 4))


# ---- grids, memory past 2^31, whole training runs -------------------------------------------------------------------


@pytest.mark.parametrize("programs", [1, 2, 5, 792])
@pytest.mark.parametrize(("dtype", "values", "misaligned"), [(F32, "ties", False), (BF16, "special", True)])
def test_grids(emulated: Emulated, programs: int, dtype: torch.dtype, values: str, misaligned: bool) -> None:
    windows = [Model("cpu", dtype, dtype, values, [50_001, 5, 40_000, 16385], misaligned) for _ in range(2)]
    with emulated(programs):
        windows[0].window()
    windows[1].window()
    assert_same_state(*windows)


def past_2_to_the_31(dtype: torch.dtype, shift: int, whole: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Operators on the last two chunks of a tensor, whose other pages are never touched; or on their weights alone."""
    n = (1 << 31) + 40_003
    begin = n // ops.CHUNK * ops.CHUNK - ops.CHUNK

    def make(kind: torch.dtype, seed: int) -> Tensor:
        x = torch.empty(n + shift, dtype=kind)[shift:] if whole else torch.empty(n - begin, dtype=kind)
        last = x[begin:] if whole else x
        last.copy_(torch.randn(n - begin, generator=torch.Generator().manual_seed(seed)))
        return x

    p, g, exp_avg, exp_avg_sq = (make(dtype, seed) for seed in (1, 2, 6, 8))
    ipt, mean, unc = (make(BF16, seed) for seed in (3, 4, 5))
    layout = ops.Layout.of([p], base=0 if whole else begin)
    chunks, at = layout.chunks[-2:].contiguous(), begin if whole else 0
    mask = torch.empty(ops.mask_bytes(n) - (begin - at) // 8, dtype=torch.uint8)
    mask[at // 8 :], mask[(at + n - begin) // 8 :] = 0x5A, 0
    work, rng, one = (layout.places, chunks), rng_of(3), torch.ones(1)
    pins.accumulate_([ipt], [p], [g], *work, torch.tensor([1e-3]), one, rng, "pins")
    counts = torch.zeros(1 + ops.BINS, dtype=torch.int64)
    bracket = torch.tensor([0x80000000, 0xBF800000, 14, 0, 0])
    pins.fold_([mean], [unc], [ipt], *work, one, rng, 0.85, 0.95, bracket=bracket, counts=counts)
    found, candidates = torch.zeros(1, dtype=torch.int64), torch.full((2, 40_000), -1)
    inside = torch.tensor([0xBC000000, 0xBC400000, 7, 0, 0])
    pins.collect_(found, candidates, [mean], [unc], *work, "product", inside)
    candidates = candidates[:, : int(found)]
    candidates = candidates[:, candidates[1].argsort()]
    key, index = candidates[:, 5].tolist()
    assert index > 1 << 31
    tie = pins.tie_index([mean], [unc], *work, "product", torch.tensor([key, key, 0, 1, 1]))
    stats = torch.zeros(1, 3, dtype=torch.int64)
    pins.pack_([mask], stats, [mean], [unc], *work, "product", torch.tensor([[key, index]]))
    hyper = torch.tensor([[1e-2, 0.99, 0.1, 0.99, 0.01, -1e-2, 0.5, 1e-8]])
    pins.masked_adamw_([p], [exp_avg], [exp_avg_sq], [ipt], [], [g], [mask], *work, hyper, one, rng, "pins")
    return [x[at:].clone() for x in (p, ipt, mean, unc)], [counts, found, candidates, tie, stats, mask[at // 8 :]]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_past_2_to_the_31_weights(emulated: Emulated, dtype: torch.dtype, shift: int) -> None:
    with emulated():
        floats, counted = past_2_to_the_31(dtype, shift, whole=True)
    expected_floats, expected_counted = past_2_to_the_31(dtype, shift, whole=False)
    assert_all_same(floats, expected_floats)
    for x, y in zip(counted, expected_counted, strict=True):
        assert torch.equal(x, y)


def trained(
    make: Any, dtype: torch.dtype, policy: str, steps: int = 12, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and masks of a small model that a Pruner took to 80 %."""
    torch.manual_seed(1)
    first, second, last = torch.nn.Linear(48, 99), torch.nn.Linear(99, 37), torch.nn.Linear(37, 5)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), last).to(dtype)
    x, y = torch.randn(64, 48, dtype=dtype), torch.randint(0, 5, (64,))
    optimizer = make(model.parameters(), lr=1e-2)
    state = str(BF16 if dtype == BF16 else F32).removeprefix("torch.")
    options = {"state_dtype": state} | options
    config = PruneConfig(sparsity=0.8, delta_t=2, warmup=2, cooldown=3, mask_policy=policy, **options)
    pruner = Pruner(model, optimizer, config, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
    pruner.finalize()
    return [p.detach().clone() for p in model.parameters()], [m.clone() for m in pruner.masks.bits]


def check_run(emulated: Emulated, *case: Any, **options: Any) -> None:
    results = []
    for kernels in (emulated, nullcontext):
        with kernels():
            results.append(trained(*case, **options))
    (weights, masks), (expected_weights, expected_masks) = results
    assert_all_same(weights, expected_weights)
    assert all(torch.equal(x, y) for x, y in zip(masks, expected_masks, strict=True))


@pytest.mark.parametrize("policy", ["strict", "reference"])
@pytest.mark.parametrize("dtype", STATES, ids=str)
@pytest.mark.parametrize("make", [PinsAdamW, lambda p, lr: PinsSGD(p, lr, momentum=0.9), torch.optim.AdamW])
def test_a_whole_run(emulated: Emulated, make: Any, dtype: torch.dtype, policy: str) -> None:
    check_run(emulated, make, dtype, policy)


@pytest.mark.parametrize("criterion", ["pins", "moments", "fisher"])
@pytest.mark.parametrize("dtype", STATES, ids=str)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_whole_run_in_8_bits(emulated: Emulated, scope: str, dtype: torch.dtype, criterion: str) -> None:
    state = {} if criterion == "fisher" else {"state_dtype": "8bit"}
    make = partial(PinsAdamW, moment_dtype="8bit")
    check_run(emulated, make, dtype, "reference", criterion=criterion, scope=scope, **state)
