"""The CUDA operators as a whole: the bits of the CPU, run after run, on any stream, in a graph, past 2^31 weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from cases import STATES, assert_all_same, rng_of, tensors
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

pytestmark = pytest.mark.gpu

pins = torch.ops.pins_ext
# A few hundred chunks, so that programs take several; odd ends; tensors of one chunk and less.
SIZES = [5_000_003, 1, 0, 16384, 99_991, 64, 777]


@dataclass
class Model:
    """The tensors of a model of random weights, and one window of pruning on them."""

    device: str
    dtype: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    values: str = "normal"
    sizes: list[int] = field(default_factory=lambda: SIZES)
    misaligned: bool = False

    def __post_init__(self) -> None:
        def random(dtype: torch.dtype, seed: int) -> list[Tensor]:
            made = tensors(self.sizes, dtype, self.values, seed, self.misaligned)
            if self.device == "cpu" or not self.misaligned:
                return [x.to(self.device) for x in made]
            return [torch.empty(x.numel() + 1, dtype=dtype, device=self.device)[1:].copy_(x) for x in made]

        self.params, self.grads = random(self.dtype, 1), random(self.dtype, 2)
        self.ipt, self.mean, self.unc = (random(self.state, seed) for seed in (3, 4, 5))
        layout = ops.Layout.of(self.params, base=(1 << 32) - 3_000_000)
        self.work = layout.places, layout.chunks
        self.masks = [ops.new_mask(p) for p in self.params]
        self.lr = torch.linspace(1e-5, 1e-3, len(self.sizes), device=self.device)
        self.one, self.rng = torch.ones(1, device=self.device), rng_of(1).to(self.device)
        self.n_prune = torch.tensor(sum(self.sizes) * 4 // 5, device=self.device)
        self.bracket = ops.bracket_around(torch.tensor([0x80000000 + (120 << 23), 0], device=self.device), octaves=4)
        self.counts = torch.zeros(1 + ops.BINS, dtype=torch.int64, device=self.device)
        self.stats = torch.zeros(len(self.sizes), 3, dtype=torch.int64, device=self.device)
        self.threshold = torch.zeros(2, dtype=torch.int64, device=self.device)

    def pointers(self, *lists: list[Tensor]) -> Tensor:
        return torch.tensor([[x.data_ptr() for x in row] for row in lists], device=self.device)

    def accumulate(self) -> None:
        args = (self.ipt, self.params, self.grads, *self.work, self.lr, self.one, self.rng, "pins")
        pins.accumulate_(*args, grad_scale=2 * self.one, clip=self.one / 3, found_inf=0 * self.one)

    def fold(self, pointers: Tensor | None = None) -> None:
        args = (self.mean, self.unc, self.ipt, *self.work, self.one, self.rng, 0.85, 0.95)
        pins.fold_(*args, bracket=self.bracket, counts=self.counts, pointers=pointers)

    def select(self, pointers: Tensor | None = None) -> None:
        args = (self.mean, self.unc, *self.work, "product", self.n_prune)
        counts = {"bracket": self.bracket, "counts": self.counts.clone()}
        self.threshold.copy_(pins.select(*args, **counts, pointers=pointers))

    def pack(self, pointers: Tensor | None = None) -> None:
        args = (self.masks, self.stats, self.mean, self.unc, *self.work, "product", self.threshold[None])
        pins.pack_(*args, pointers=pointers)

    def window(self) -> None:
        self.accumulate()
        self.fold()
        self.select()
        self.pack()

    def state_on_cpu(self) -> tuple[list[Tensor], list[Tensor]]:
        """Floating-point states, and everything that counts."""
        counts = [*self.masks, self.counts, self.threshold, self.stats]
        return [x.cpu() for x in (*self.ipt, *self.mean, *self.unc)], [x.cpu() for x in counts]


def assert_same_state(actual: Model, expected: Model) -> None:
    (floats, counts), (expected_floats, expected_counts) = actual.state_on_cpu(), expected.state_on_cpu()
    assert_all_same(floats, expected_floats)
    for x, y in zip(counts, expected_counts, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("values", ["normal", "special", "zeros", "ties"])
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_as_the_cpu(dtype: torch.dtype, state: torch.dtype, values: str, misaligned: bool) -> None:
    sizes = SIZES if values == "normal" else [300_001, 5, 40_000]
    models = [Model(device, dtype, state, values, sizes, misaligned) for device in ("cuda", "cpu")]
    for model in models:
        model.window()
    assert_same_state(*models)


def test_many_small_tensors() -> None:
    models = [Model(device, sizes=[1 + i % 300 for i in range(5000)]) for device in ("cuda", "cpu")]
    for model in models:
        model.window()
    assert_same_state(*models)


def test_same_result_every_time() -> None:
    first = Model("cuda", state=torch.bfloat16, values="ties")
    first.window()
    for _ in range(3):
        again = Model("cuda", state=torch.bfloat16, values="ties")
        again.window()
        assert_same_state(again, first)


def test_a_window_never_waits_for_the_device() -> None:
    model = Model("cuda")
    model.window()  # compiles, which may wait
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.window()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_works_on_the_current_stream() -> None:
    """The gradients are written on a side stream, late; a launch on another stream would read them too early."""
    expected, model, stream = Model("cuda"), Model("cuda"), torch.cuda.Stream()
    gradients = [g.clone() for g in model.grads]
    for g in model.grads:
        g.zero_()
    expected.window()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for g, late in zip(model.grads, gradients, strict=True):
            g.copy_(late)
        model.window()
    stream.synchronize()
    assert_same_state(model, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_works_on_a_device_that_is_not_current() -> None:
    model, expected = Model("cuda:1"), Model("cpu")
    for m in (model, expected):
        m.window()
    assert_same_state(model, expected)


# ---- CUDA graphs --------------------------------------------------------------------------------------


def test_capture_without_pointers_is_refused() -> None:
    model = Model("cuda", sizes=[1000])
    model.window()
    with pytest.raises(RuntimeError, match="pointers must be given while a CUDA graph is captured"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            model.fold()


def test_replays_of_fold_select_and_pack() -> None:
    model, expected = Model("cuda", state=torch.bfloat16), Model("cpu", state=torch.bfloat16)
    folded = model.pointers(model.mean, model.unc, model.ipt)
    scores = model.pointers(model.mean, model.unc)
    packed = model.pointers(model.masks, model.mean, model.unc)

    def boundary() -> None:
        model.fold(folded)
        model.select(scores)
        model.pack(packed)

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        saved = [x.clone() for x in (*model.mean, *model.unc)]
        boundary()
        for x, y in zip((*model.mean, *model.unc), saved, strict=True):
            x.copy_(y)
        for mask, p in zip(model.masks, model.params, strict=True):
            mask.copy_(ops.new_mask(p))
    warm.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        boundary()
    for step in range(4):
        # What changes from replay to replay is in device memory: keys, targets, states.
        for m in (model, expected):
            m.rng.copy_(rng_of(step))
            m.n_prune.fill_(sum(SIZES) * (step + 1) // 7)
            for x, fresh in zip(m.ipt, tensors(SIZES, torch.bfloat16, seed=step), strict=True):
                x.copy_(fresh)
        graph.replay()
        expected.fold()
        expected.select()
        expected.pack()
        assert_same_state(model, expected)


# ---- size ---------------------------------------------------------------------------------------------


def chunked(n: int, f: Callable[[slice], Tensor]) -> int:
    """Sum of f over slices of [0, n)."""
    return sum(int(f(slice(i, i + (1 << 28)))) for i in range(0, n, 1 << 28))


@pytest.mark.parametrize("ties", [False, True])
def test_past_2_to_the_31_weights(ties: bool) -> None:
    """One tensor of 2^31 + 12345 bfloat16 weights; `ties`: a hundred distinct scores."""
    n = (1 << 31) + 12_345
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    a = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for i in range(0, n, 1 << 28):
        part = a[i : i + (1 << 28)]
        noise = torch.randn(part.shape, generator=generator, device="cuda")
        part.copy_((noise * 10).round() if ties else noise)
    layout, n_prune = ops.Layout.of([a]), n * 4 // 5
    work = layout.places, layout.chunks
    key, tie = pins.select([a], [], *work, "magnitude", torch.tensor(n_prune, device="cuda")).tolist()
    score = float(ops.score_of_key(torch.tensor([key, tie])))
    below = chunked(n, lambda s: (a[s].abs() < score).sum())
    tied_before = chunked(tie, lambda s: (a[: min(s.stop, tie)][s.start :].abs() == score).sum())
    assert below + tied_before == n_prune
    masks, stats = (
        [torch.zeros(ops.mask_bytes(n), dtype=torch.uint8, device="cuda")],
        torch.zeros(1, 3, dtype=torch.int64).cuda(),
    )
    pins.pack_(masks, stats, [a], [], *work, "magnitude", torch.tensor([[key, tie]], device="cuda"))
    assert stats.tolist() == [[n - n_prune, n - n_prune, 0]]
    for start in (0, (1 << 31) - 64, max(0, tie // 64 * 64 - 640), n - n % 64 - 640):
        stop = min(start + 1280, n)
        keys, index = ref.order_key(a[start:stop].cpu().abs().float()), torch.arange(start, stop)
        bits = ref.unpack_bits(masks[0][start // 8 : (stop + 7) // 8].cpu(), (stop - start,))
        assert torch.equal(bits, ref.keep_mask(keys, index, (key, tie)))
