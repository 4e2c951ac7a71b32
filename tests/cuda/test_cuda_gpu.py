"""The CUDA operators on a GPU: the bits of the CPU operators, on any stream, in a graph, past 2^31 weights.

What needs no stream and no memory of its own also runs on emulated PTX (--ptx 90), on fewer weights.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_job import DTYPES, SIZES, STATES, STEPS, Job, Lists
from gpus import Gpu
from torch import Tensor

from pins_ext.ops import CRITERIA, Layout, Shard, new_mask
from pins_ext.optim import PinsAdamW

on_a_gpu = pytest.mark.gpu

DEVICE = "cuda"
pins = torch.ops.pins_ext
KINDS = [(step, dtype, state) for step in ("adamw", "sgd") for dtype in DTYPES for state in STATES]


def call(job: Job, lists: Lists, **pointers: Tensor) -> Lists:
    """Runs the job's operator on placed lists, in place, and returns them."""
    arguments, scalars = job.arguments(lists)
    job.op(*arguments, **scalars, **pointers)
    return lists


def run(gpu: Gpu, job: Job, lists: Lists, **pointers: Tensor) -> Lists:
    """The same on a GPU's kernels."""
    with gpu.kernels():
        return call(job, lists, **pointers)


def compare(gpu: Gpu, job: Job) -> None:
    """GPU, CPU and reference."""
    on_gpu = run(gpu, job, job.place(gpu.device))
    job.check(on_gpu)
    job.check(on_gpu, call(job, job.place("cpu")))


def sizes_of(gpu: Gpu) -> tuple[int, ...]:
    return gpu.choose(SIZES, (0, 1, 3, 17, 1030, 4097, 16385))


def addresses(lists: Lists) -> Tensor:
    """The pointer table: int64 [lists, n], zeros where a list is empty."""
    n, device = len(lists["params"]), lists["params"][0].device
    return torch.tensor([[t.data_ptr() for t in tensors] or [0] * n for tensors in lists.values()], device=device)


@pytest.mark.parametrize(("step", "dtype", "state"), KINDS, ids=str)
def test_small_case(gpu: Gpu, step: str, dtype: torch.dtype, state: torch.dtype) -> None:
    """Every kernel, every kind of access: small enough for compute-sanitizer."""
    compare(gpu, Job(step, dtype, state, sizes=(0, 1, 77, 1030), misaligned=lambda name, i: i))
    compare(gpu, Job(step, dtype, state, sizes=(77, 1030), misaligned=lambda name, i: i * (name == "grads")))
    compare(gpu, Job(step, dtype, state, local=[(20, 30)], shards=[Shard((20, 100), (0, 13))]))
    compare(gpu, Job("mask", dtype, sizes=(0, 1, 77, 1030), misaligned=lambda name, i: i))


@pytest.mark.parametrize(("step", "dtype", "state"), KINDS, ids=str)
def test_every_size_and_misalignment(gpu: Gpu, step: str, dtype: torch.dtype, state: torch.dtype) -> None:
    job = Job(step, dtype, state, sizes=sizes_of(gpu), grad_scale=1024.0, clip=0.7, clear_state=True)
    for k in range(9):
        compare(gpu, replace(job, misaligned=lambda name, i, k=k: k))
    compare(gpu, replace(job, misaligned=lambda name, i: (i + len(name)) % 3))


@pytest.mark.parametrize(("step", "dtype", "state"), KINDS, ids=str)
def test_each_list_misaligned_alone(gpu: Gpu, step: str, dtype: torch.dtype, state: torch.dtype) -> None:
    for name in STEPS[step]:
        compare(gpu, Job(step, dtype, state, sizes=(1030, 77), misaligned=lambda n, i, name=name: int(n == name)))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("accepted", [0, 3])
def test_every_criterion_and_option(gpu: Gpu, criterion: str, accepted: float) -> None:
    for step, dtype, state in KINDS:
        for absent in ((), ("shadow",), ("masks",), ("ipt", "shadow")):
            compare(
                gpu, Job(step, dtype, state, None, criterion, absent, (5, 301), accepted=accepted, clear_state=True)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_alone(gpu: Gpu, dtype: torch.dtype) -> None:
    for k in range(9):
        job = Job("mask", dtype, sizes=sizes_of(gpu), misaligned=lambda name, i, k=k: k)
        job.lists["params"][-1][::7] = float("nan")
        compare(gpu, job)


def test_not_a_number_spreads_as_on_the_cpu(gpu: Gpu) -> None:
    for step, dtype, state in KINDS:
        job = Job(step, dtype, state, sizes=(500,))
        for name, value in (("grads", float("nan")), ("grads", float("inf")), ("params", float("nan"))):
            job.lists[name][0][torch.randint(500, (20,))] = value
        compare(gpu, job)


def test_global_index_past_32_bits(gpu: Gpu) -> None:
    for base in ((1 << 32) - 1003, (1 << 41) + 12345):
        for dtype in DTYPES:
            compare(gpu, Job(dtype=dtype, state=torch.bfloat16, base=base))
            compare(
                gpu,
                Job(dtype=dtype, state=torch.bfloat16, base=base, local=[(5, 300)], shards=[Shard((9, 700), (2, 99))]),
            )


@pytest.mark.parametrize("step", STEPS)
def test_a_pointer_table_of_the_caller(gpu: Gpu, step: str) -> None:
    job = Job(step, sizes=sizes_of(gpu), absent=("shadow",) if step != "mask" else ())
    lists = job.place(gpu.device)
    job.check(run(gpu, job, lists, pointers=addresses(lists)))


def test_more_tensors_than_one_launch_carries_addresses_of(gpu: Gpu) -> None:
    compare(gpu, Job(sizes=[i % 37 for i in range(300)]))


@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_found_inf_touches_nothing(gpu: Gpu, step: str) -> None:
    job = Job(step, sizes=sizes_of(gpu), found_inf=1.0)
    job.check(run(gpu, job, job.place(gpu.device)), job.lists)


@on_a_gpu
def test_repeatable() -> None:
    job = Job(dtype=torch.bfloat16, state=torch.bfloat16, sizes=(1 << 22, 12345))
    first, second = (call(job, job.place(DEVICE)) for _ in range(2))
    job.check(first, {name: [t.cpu() for t in tensors] for name, tensors in second.items()})


@on_a_gpu
def test_runs_on_the_current_stream() -> None:
    job = Job(sizes=(1 << 20,))
    lists = job.place(DEVICE)
    late = [g.clone() for g in lists["grads"]]
    for g in lists["grads"]:
        g.fill_(float("nan"))
    arguments, scalars = job.arguments(lists)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # the gradients arrive a tenth of a second later, on this stream
        for g, value in zip(lists["grads"], late, strict=True):
            g.copy_(value)
        job.op(*arguments, **scalars)
    stream.synchronize()
    job.check(lists)


@on_a_gpu
def test_does_not_wait_for_the_device() -> None:
    job = Job(sizes=(1 << 20,))
    lists = job.place(DEVICE)
    arguments, scalars = job.arguments(lists)
    with torch.cuda.stream(torch.cuda.Stream()):
        job.op(*arguments, **scalars)  # the first call loads the kernel and finds memory for the table
        torch.cuda.synchronize()
        torch.cuda._sleep(500_000_000)
        end = torch.cuda.Event()
        job.op(*arguments, **scalars)
        end.record()
        assert not end.query()
    torch.cuda.synchronize()


@on_a_gpu
@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_a_graph_replays_a_step(step: str) -> None:
    job = Job(step, torch.bfloat16, torch.bfloat16, sizes=SIZES, accepted=0, grad_scale=2.0, clip=0.5, found_inf=0.0)
    eager, replayed = job.place(DEVICE), job.place(DEVICE)

    def prepare(lists: Lists) -> tuple[tuple[object, ...], dict[str, Tensor]]:
        arguments, scalars = job.arguments(lists)
        return arguments, {**scalars, "pointers": addresses(lists)}

    def step_once(arguments: tuple[object, ...], scalars: dict[str, Tensor]) -> None:
        job.op(*arguments, **scalars)
        accepted, rng = arguments[-4], arguments[-3]
        accepted += 1 - scalars["found_inf"]
        rng += 12345

    eager_call, graph_call = prepare(eager), prepare(replayed)
    warm = job.place(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step_once(*prepare(warm))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_once(*graph_call)
    for skip in (0.0, 0.0, 1.0, 0.0):
        for arguments, scalars in (eager_call, graph_call):
            scalars["found_inf"].fill_(skip)
            arguments[-5].mul_(0.9)  # hyper: the learning rate moves
        step_once(*eager_call)
        graph.replay()
    torch.cuda.synchronize()
    job.check(replayed, {name: [t.cpu() for t in tensors] for name, tensors in eager.items()})
    assert graph_call[0][-4].item() == 3


@on_a_gpu
def test_capture_without_pointers_is_refused() -> None:
    job = Job()
    arguments, scalars = job.arguments(job.place(DEVICE))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="pointers must be given while a CUDA graph is captured"),
        torch.cuda.graph(graph),
    ):
        job.op(*arguments, **scalars)


@on_a_gpu
def test_an_optimizers_step_is_not_captured() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64, device=DEVICE))
    optimizer = PinsAdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"call step\(\) after the replay"), torch.cuda.graph(graph):
        optimizer.step()


@on_a_gpu
def test_past_two_to_the_31_weights() -> None:
    """SGD, ipt with stochastic rounding and mask over one bfloat16 tensor; slices are held against small calls."""
    n = (1 << 31) + 100_003
    if torch.cuda.mem_get_info()[0] < 10 * n:
        pytest.skip("needs 20 GiB of free GPU memory")
    generator = torch.Generator(DEVICE).manual_seed(1)
    params, grads, ipt = (
        torch.empty(n, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator) for _ in range(3)
    )
    mask = new_mask(params)
    mask[: n // 8].random_(0, 256, generator=generator)
    hyper = torch.tensor([[0.1, 0.01, 0, 0, 0, 0, -0.1, 0]], device=DEVICE)
    accepted, rng = torch.tensor([3.0], device=DEVICE), torch.tensor([5, 7], device=DEVICE)

    def update(p: Tensor, i: Tensor, g: Tensor, m: Tensor, base: int) -> None:
        layout = Layout.of([p], base=base)
        tables = (layout.places, layout.chunks, hyper, accepted, rng, "pins")
        pins.masked_sgd_([p], [], [i], [], [g], [m], *tables)

    size = 70_016  # whole bytes of the mask
    starts = [0, (1 << 30) - 4096, (1 << 31) - 35_008, n - n % 8 - size]
    slices = [tuple(x[at : at + size].clone() for x in (params, ipt, grads)) for at in starts]
    bits = [mask[at // 8 : (at + size) // 8].clone() for at in starts]
    update(params, ipt, grads, mask, 0)
    for at, (p, i, g), m in zip(starts, slices, bits, strict=True):
        update(p, i, g, m, at)
        assert torch.equal(params[at : at + size].view(torch.int16), p.view(torch.int16)), at
        assert torch.equal(ipt[at : at + size].view(torch.int16), i.view(torch.int16)), at


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_works_on_the_device_of_the_tensors() -> None:
    job = Job()
    job.check(call(job, job.place("cuda:1")))
    assert torch.cuda.current_device() == 0


@on_a_gpu
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda lists: lists["grads"].__setitem__(1, lists["grads"][1].cpu()),
            r"grads\[1\] must be on cuda:0 like places, got the CPU",
        ),
        (lambda lists: lists["grads"].pop(), "grads must have 2 tensors"),
        (lambda lists: lists["ipt"].__setitem__(0, lists["ipt"][0].half()), r"ipt\[0\] must be float32 or bfloat16"),
        (lambda lists: lists["masks"].__setitem__(0, lists["masks"][0][8:]), r"masks\[0\] must have"),
        (lambda lists: lists["exp_avg"].__setitem__(1, lists["exp_avg"][1][::2]), r"exp_avg\[1\] must be contiguous"),
    ],
)
def test_refuses_and_names_the_argument(spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    job = Job(sizes=(300, 500))
    lists = job.place(DEVICE)
    arguments, scalars = job.arguments(lists)
    spoil(lists)
    with pytest.raises(RuntimeError, match=message):
        job.op(*arguments, **scalars)


@on_a_gpu
@pytest.mark.parametrize("step", STEPS)
def test_opcheck(step: str) -> None:
    job = Job(step, sizes=(77, 300))
    arguments, scalars = job.arguments(job.place(DEVICE))
    torch.library.opcheck(job.op.default, arguments, scalars)  # type: ignore[attr-defined]
