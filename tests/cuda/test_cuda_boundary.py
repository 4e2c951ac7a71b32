"""A window's boundary in one pass on a GPU, or on emulated PTX (--ptx 90): the bits of the CPU's separate operators."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from boundary_job import BoundaryJob
from cases import VALUES
from cuda_job import DTYPES, STATES
from drawn_training import STEPS, Training, separately, train
from gpus import Gpu
from watch import like_a_gpu

from pins_ext.ops import Shard

KINDS = [
    *(("adamw", dtype, state, moments) for dtype in DTYPES for state in STATES for moments in STATES),
    *(("sgd", dtype, state, None) for dtype in DTYPES for state in STATES),
]


def compare(gpu: Gpu, job: BoundaryJob) -> None:
    lists = job.place(gpu.device)
    with gpu.kernels():
        written = job.call(lists)
    job.check_all(lists, written)


def words(name: str, i: int) -> int:
    return 4 * i if name == "masks" else i


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_small_case(gpu: Gpu, kind: tuple[str, torch.dtype, torch.dtype, torch.dtype | None]) -> None:
    """Every kernel: small enough for compute-sanitizer."""
    for given in (False, True):
        compare(gpu, BoundaryJob(*kind, sizes=(0, 1, 77, 1030), given=given, misaligned=words, clear_state=True))
        compare(gpu, BoundaryJob(*kind, sizes=(64, 333), given=given, accepted=0, clip=0.7))


@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_every_size(gpu: Gpu, step: str) -> None:
    sizes = gpu.choose((3, 16383, 16384, 16385, 300_001), (3, 16385, 2050))
    for state in STATES:
        compare(gpu, BoundaryJob(step, torch.float32, state, sizes=sizes, clear_state=True))


@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_half_of_it(gpu: Gpu, step: str) -> None:
    """A choice without a fold or the reverse, without counts, importance, or a second average."""
    for flags in (
        {"chooses": False},
        {"folds": False},
        {"folds": False, "absent": ("ipt", "shadow")},
        {"counts": False},
        {"uncertain": False},
        {"chooses": False, "absent": ("shadow", "masks")},
    ):
        compare(gpu, BoundaryJob(step, sizes=(301, 40), **flags))
        compare(gpu, BoundaryJob(step, torch.bfloat16, torch.bfloat16, sizes=(301, 40), **flags))


@pytest.mark.parametrize("values", VALUES)
def test_ugly_scores(gpu: Gpu, values: str) -> None:
    for keep in (0.02, 0.6):
        for given in (False, True):
            compare(gpu, BoundaryJob(values=values, sizes=(901, 64), keep=keep, given=given))


@pytest.mark.parametrize("criterion", ["pins", "pins-signed", "pins-update", "platon", "movement"])
def test_every_criterion(gpu: Gpu, criterion: str) -> None:
    for accepted in (0, 3):
        compare(gpu, BoundaryJob(criterion=criterion, sizes=(300, 9), accepted=accepted))


def test_many_small_tensors(gpu: Gpu) -> None:
    sizes = [i % 37 for i in range(gpu.choose(5000, 100))]
    compare(gpu, BoundaryJob(sizes=sizes, state=torch.bfloat16, misaligned=words))


@pytest.mark.parametrize("given", [False, True])
def test_shards_break_ties_by_the_global_index(gpu: Gpu, given: bool) -> None:
    cut = {"local": [(20, 30), (7, 9)], "shards": [Shard((20, 100), (0, 13)), Shard((30, 9), (20, 0))]}
    for values in ("equal", "normal"):
        compare(gpu, BoundaryJob(state=torch.bfloat16, base=(1 << 32) - 1003, given=given, values=values, **cut))


TRAININGS = [
    {},
    {"mask_policy": "strict", "criterion": "platon", "mask_optimizer_state": True},
    {"optimizer": "momentum", "state_dtype": "bfloat16", "mask_optimizer_state": True},
    {"moment_dtype": "bfloat16", "dtype": torch.bfloat16, "ugly": True},
    {"beta2": 1.0, "schedule": "constant"},
    {"delta_t": 3, "mask_policy": "strict"},
]


@pytest.mark.filterwarnings("ignore::pins_ext.pruning.plan.ConflictWarning")
@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("settings", TRAININGS, ids=str)
def test_training_is_that_of_separate_passes_on_the_cpu(gpu: Gpu, settings: dict[str, Any]) -> None:
    """Bracket and threshold, bins that serve and thresholds that left, in one pass."""
    steps = range(gpu.choose(STEPS, 14))
    name = "boundary_sgd_" if "optimizer" in settings else "boundary_adamw_"
    counted = patch.object(torch.ops.pins_ext, name, wraps=getattr(torch.ops.pins_ext, name))
    with gpu.kernels(), nullcontext() if gpu.device == "cuda" else like_a_gpu(), counted as passes:
        on_gpu = train(Training(device=gpu.device, **settings), steps)
    assert passes.called
    with separately():
        on_cpu = train(Training(**settings), steps)
    assert on_gpu.told == on_cpu.told


@pytest.mark.gpu
def test_no_masks_beside_a_word() -> None:
    job = BoundaryJob(sizes=(300,), misaligned=lambda name, i: int(name == "masks"))
    with pytest.raises(RuntimeError, match=r"masks\[0\] must lie at a multiple of 4 bytes"):
        job.call(job.place("cuda"))
