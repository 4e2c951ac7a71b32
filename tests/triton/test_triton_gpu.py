"""The CUDA operators as a whole: the bits of the CPU, run after run, on any stream, in a graph, past 2^31 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import STATES, rng_of, tensors
from gpus import Gpu
from torch import Tensor
from window import SIZES, Model, assert_same_state

from pins_ext import ops
from pins_ext import reference as ref

on_a_gpu = pytest.mark.gpu

pins = torch.ops.pins_ext


def windows(gpu: Gpu, *args: Any, **kwargs: Any) -> None:
    """A window on the GPU and one on the CPU, to the same bits."""
    on_gpu, on_cpu = (Model(device, *args, **kwargs) for device in (gpu.device, "cpu"))
    with gpu.kernels():
        on_gpu.window()
    on_cpu.window()
    assert_same_state(on_gpu, on_cpu)


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("values", ["normal", "special", "zeros", "ties", "equal"])
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_as_the_cpu(gpu: Gpu, dtype: torch.dtype, state: torch.dtype, values: str, misaligned: bool) -> None:
    sizes = gpu.choose(SIZES if values == "normal" else [300_001, 5, 40_000], [20_001, 5, 0, 777])
    windows(gpu, dtype, state, values, sizes, misaligned)


def test_many_small_tensors(gpu: Gpu) -> None:
    windows(gpu, sizes=[1 + i % 300 for i in range(gpu.choose(5000, 150))])


@on_a_gpu
def test_same_result_every_time() -> None:
    first = Model("cuda", state=torch.bfloat16, values="ties")
    first.window()
    for _ in range(3):
        again = Model("cuda", state=torch.bfloat16, values="ties")
        again.window()
        assert_same_state(again, first)


@on_a_gpu
def test_a_window_never_waits_for_the_device() -> None:
    model = Model("cuda")
    model.window()  # compiles, which may wait
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.window()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@on_a_gpu
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


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_works_on_a_device_that_is_not_current() -> None:
    model, expected = Model("cuda:1"), Model("cpu")
    for m in (model, expected):
        m.window()
    assert_same_state(model, expected)


# ---- CUDA graphs --------------------------------------------------------------------------------------


@on_a_gpu
def test_capture_without_pointers_is_refused() -> None:
    model = Model("cuda", sizes=[1000])
    model.window()
    with pytest.raises(RuntimeError, match="pointers must be given while a CUDA graph is captured"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            model.fold()


@on_a_gpu
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


@on_a_gpu
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
