"""The CUDA kernels' source, compiled for the host and run thread by thread, against the reference, bit for bit.

Index arithmetic (chunk table, scalar head, 16-byte body, scalar tail, mask bits, global index of shards) is the same
source on a GPU. AddressSanitizer and UBSan watch every access.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_job import DTYPES, SIZES, STATES, Job
from host_program import compiled

from pins_ext.ops import CRITERIA, Shard


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("cuda_host", tmp_path_factory)


def run(host: Path, *jobs: Job) -> list[int]:
    """Runs the jobs, holds every list against the reference, and returns the number of accesses of each job."""
    done = subprocess.run([host], input=b"".join(job.pack() for job in jobs), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    data, counts = done.stdout, []
    for job in jobs:
        accesses, after, data = job.unpack(data)
        counts.append(accesses)
        job.check(after)
    assert not data
    return counts


def edges(head: int, n: int, width: int) -> tuple[int, int]:
    """Wide and scalar accesses that each stream of a chunk of n weights needs."""
    head = min(head, n)
    return (n - head) // width, n - (n - head) // width * width


@pytest.mark.parametrize("step", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_every_size(host: Path, step: str, dtype: torch.dtype, state: torch.dtype) -> None:
    for moments in STATES if step == "adamw" else (None,):
        run(host, Job(step, dtype, state, moments, sizes=SIZES, grad_scale=1024.0, clip=0.7, clear_state=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_one_misalignment_has_a_scalar_head_and_a_wide_body(host: Path, dtype: torch.dtype, state: torch.dtype) -> None:
    width = 16 // dtype.itemsize
    sizes = (1, width, 777, 16384 + 333)
    jobs = [
        Job(
            "adamw",
            dtype,
            state,
            sizes=sizes,
            absent=absent,
            misaligned=lambda name, i, k=k: i if name == "masks" else k,
        )
        for k in range(width)
        for absent in (("masks", "shadow"), ())
    ]
    counts = run(host, *jobs)
    for k, count in zip(range(width), counts[::2], strict=True):
        # A chunk starts 16384 weights after the tensor, so with the tensor's own alignment.
        parts = [edges(-k % width, min(16384, n - at), width) for n in sizes for at in range(0, n, 16384)]
        streams = 5 + 4  # read p g m v ipt, write p m v ipt
        assert count == streams * sum(map(sum, parts))


@pytest.mark.parametrize("stream", ["params", "exp_avg", "exp_avg_sq", "ipt", "shadow", "grads"])
def test_one_stream_apart_is_walked_weight_by_weight(host: Path, stream: str) -> None:
    def apart(name: str, tensor: int) -> int:
        return int(name == stream)

    sizes, absent = (1, 9, 1030), ("masks",)
    jobs = [
        Job("adamw", dtype, state, sizes=sizes, absent=absent, misaligned=apart) for dtype in DTYPES for state in STATES
    ]
    assert run(host, *jobs) == [(6 + 5) * (1 + 9 + 1030)] * len(jobs)


def test_a_window_s_first_score_does_not_read_ipt(host: Path) -> None:
    first, later, movement = run(
        host,
        Job(accepted=0, absent=("masks", "shadow"), sizes=(64,)),
        Job(accepted=1, absent=("masks", "shadow"), sizes=(64,)),
        Job(accepted=0, absent=("masks", "shadow"), sizes=(64,), criterion="movement"),
    )
    assert (first, later, movement) == (8 * 16, 9 * 16, 9 * 16)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_and_option(host: Path, criterion: str) -> None:
    run(
        host,
        *(
            Job(step, dtype, state, dtype, criterion, absent, (5, 301), accepted=accepted, clear_state=clear, clip=clip)
            for step in ("adamw", "sgd")
            for dtype, state in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
            for absent in ((), ("shadow",), ("masks",))
            for accepted, clear, clip in ((0, False, None), (3, True, 0.3))
        ),
    )


@pytest.mark.parametrize("absent", ["ipt", "momentum_buffer"])
def test_lists_that_are_not_wanted(host: Path, absent: str) -> None:
    steps = ("adamw", "sgd") if absent == "ipt" else ("sgd",)
    jobs = [Job(step, dtype, absent=(absent, "shadow")) for step in steps for dtype in DTYPES]
    run(host, *jobs, *(replace(job, misaligned=lambda name, i: 1) for job in jobs))


def test_found_inf_touches_nothing(host: Path) -> None:
    skipped, taken = run(host, Job(found_inf=1.0, sizes=SIZES), Job(found_inf=0.0, sizes=(300,)))
    assert skipped == 0
    assert taken > 0


@pytest.mark.parametrize(
    ("full", "local", "start"),
    [
        ((64, 700), (64, 300), (0, 200)),  # columns
        ((300, 100), (77, 100), (200, 0)),  # rows: one run
        ((9, 40, 50), (7, 30, 21), (1, 5, 20)),  # three dimensions
        ((5, 6, 7, 8), (3, 4, 5, 6), (1, 1, 1, 1)),
        ((4, 3, 1000), (4, 2, 3), (0, 1, 500)),  # runs shorter than an access
        ((3, 20000), (3, 17000), (0, 3000)),  # runs longer than a chunk
    ],
)
@pytest.mark.parametrize("base", [0, (1 << 32) - 1003, (1 << 41) + 12345])
def test_stochastic_rounding_follows_the_global_index_of_a_shard(
    host: Path, full: tuple[int, ...], local: tuple[int, ...], start: tuple[int, ...], base: int
) -> None:
    jobs = [
        Job("sgd", dtype, torch.bfloat16, local=[local], shards=[Shard(full, start)], base=base)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    run(host, *jobs, *(replace(job, misaligned=lambda name, i: 3) for job in jobs))


def test_global_index_carries_inside_an_access(host: Path) -> None:
    # Every offset of the carry from the low to the high 32 bits within an access.
    run(host, *(Job(state=torch.bfloat16, sizes=(64,), base=(1 << 32) - k) for k in range(1, 65, 3)))
    run(host, *(Job(dtype=torch.bfloat16, state=torch.bfloat16, sizes=(64,), base=(1 << 32) - k) for k in range(1, 65)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_alone(host: Path, dtype: torch.dtype) -> None:
    jobs = [
        Job("mask", dtype, sizes=SIZES, misaligned=lambda name, i, k=k: k if name == "params" else i) for k in range(9)
    ]
    for job in jobs:
        for tensor in job.lists["params"]:
            tensor[::5] = float("nan")
    run(host, *jobs)


def test_mask_alone_leaves_full_accesses_unwritten(host: Path) -> None:
    job = Job("mask", sizes=(64,))
    job.lists["masks"] = [torch.full((8,), 255, dtype=torch.uint8)]
    (kept,) = run(host, job)
    job.lists["masks"][0][2] = 0xF0
    (written,) = run(host, job)
    assert written == kept + 1
