"""The CUDA kernels' source at a window's boundary, run on the host thread by thread: the bits of separate operators."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from boundary_job import BoundaryJob
from cases import VALUES
from cuda_job import DTYPES, STATES
from host_program import compiled

from pins_ext.ops import Shard, unpack_bits

# What boundary_host.cpp compiles: small moments with small weights.
SMALL = torch.bfloat16
KINDS = [
    *(("adamw", dtype, state, None if dtype == torch.float32 else SMALL) for dtype in DTYPES for state in STATES),
    *(("sgd", torch.float32, state, None) for state in STATES),
]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("boundary_host", tmp_path_factory)


def run(host: Path, *jobs: BoundaryJob) -> None:
    done = subprocess.run([host], input=b"".join(job.pack() for job in jobs), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    data = done.stdout
    for job in jobs:
        lists, written, data = job.unpack_all(data)
        job.check_all(lists, written)
    assert not data


def words(name: str, i: int) -> int:
    """A misalignment of every list; masks lie at whole words."""
    return 4 * i if name == "masks" else i


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_size(host: Path, kind: tuple[str, torch.dtype, torch.dtype, torch.dtype | None]) -> None:
    for given in (False, True):
        run(host, BoundaryJob(*kind, sizes=(0, 1, 3, 31, 1030, 16385), given=given, clear_state=True, clip=0.7))
        run(host, BoundaryJob(*kind, sizes=(1030, 77, 16), given=given, accepted=0, misaligned=words))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_misalignment(host: Path, dtype: torch.dtype) -> None:
    sizes, moments = (1, 16, 777), None if dtype == torch.float32 else SMALL
    run(
        host,
        *(
            BoundaryJob(
                "adamw",
                dtype,
                state,
                moments,
                sizes=sizes,
                misaligned=lambda name, i, k=k: 4 * k if name == "masks" else k,
            )
            for k in range(16 // dtype.itemsize)
            for state in STATES
        ),
        *(
            BoundaryJob(
                "adamw",
                dtype,
                torch.bfloat16,
                moments,
                sizes=sizes,
                misaligned=lambda n, i, name=name: int(n == name),
            )
            for name in ("params", "grads", "exp_avg", "exp_avg_ipt", "exp_avg_unc", "shadow")
        ),
    )


@pytest.mark.parametrize("step", ["adamw", "sgd"])
@pytest.mark.parametrize("state", STATES, ids=str)
def test_every_flag(host: Path, step: str, state: torch.dtype) -> None:
    criteria = itertools.cycle(("pins", "pins-update", "platon", "pins-signed", "movement"))
    accepted = itertools.cycle((0, 0, 3))
    jobs = []
    for chooses, folds, given, uncertain, shadow, clear in itertools.product((False, True), repeat=6):
        if chooses or folds:
            absent = () if shadow else ("shadow",)
            absent += () if chooses or clear else ("masks",)
            jobs.append(
                BoundaryJob(
                    step, torch.float32, state, None, next(criteria), absent, (5, 301), accepted=next(accepted),
                    clear_state=clear, chooses=chooses, folds=folds, counts=shadow, given=given, uncertain=uncertain,
                )
            )  # fmt: skip
    without = [BoundaryJob(step, absent=("ipt", "shadow"), sizes=(301,), folds=False, state=state)]
    run(host, *jobs, *without)


@pytest.mark.parametrize(("size", "rank"), [(16385, 5), (301, 301), (0, 1)])
def test_a_bracket_of_too_many_or_too_few_prunes_none_of_them(host: Path, size: int, rank: int) -> None:
    """More than there is room for, or fewer than its rank says: a GPU cannot refuse it."""
    job = BoundaryJob(sizes=(size,), values="special", state=torch.bfloat16)
    job.around = torch.tensor([0, 2**32 - 1, 16, rank, 0])
    done = subprocess.run([host], input=job.pack(), capture_output=True, check=True)
    lists, written, _ = job.unpack_all(done.stdout)
    assert written.threshold.tolist() == [[-1, -1]]
    assert written.stats[0, 0] == size
    for bits in lists["masks"]:
        assert unpack_bits(bits, (size,)).all()


@pytest.mark.parametrize("values", VALUES)
def test_ugly_scores(host: Path, values: str) -> None:
    for keep in (0.01, 0.5, 0.99):
        for state in STATES:
            run(
                host,
                *(BoundaryJob(state=state, values=values, sizes=(901, 64), keep=keep, given=k) for k in (False, True)),
            )


def test_many_small_tensors(host: Path) -> None:
    run(host, BoundaryJob(sizes=[i % 37 for i in range(400)], state=torch.bfloat16, misaligned=words))


@pytest.mark.parametrize("base", [0, (1 << 32) - 1003, (1 << 41) + 12345])
@pytest.mark.parametrize("given", [False, True])
def test_shards_break_ties_by_the_global_index(host: Path, base: int, given: bool) -> None:
    cut = {"local": [(20, 30), (7, 9)], "shards": [Shard((20, 100), (0, 13)), Shard((30, 9), (20, 0))]}
    jobs = [
        BoundaryJob(state=state, base=base, given=given, values=v, **cut)
        for state in STATES
        for v in ("equal", "normal")
    ]
    run(host, *jobs)
