"""Two processes under `accelerate launch`: the same masks on both, those of one process for the same gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_job
import pytest
import torch
from bert import STEPS

RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each rank of one launch tells."""
    # On CPUs accelerate starts several processes by this flag too, unless there is an MPI.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(RANKS), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launch, distributed_job.__file__, str(folder)]
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=os.environ | cpu, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


def test_it_is_two_processes_on_cpus(ranks: list[dict[str, Any]]) -> None:
    for told in ranks:
        assert (told["type"], told["backend"], told["ranks"]) == ("DistributedType.MULTI_CPU", "gloo", RANKS)
        assert told["unbroken"]["wrapped"] == "DistributedDataParallel"


def test_masks_and_weights_are_the_same_on_both_after_every_step(ranks: list[dict[str, Any]]) -> None:
    first, second = (told["unbroken"] for told in ranks)
    assert len(first["masks"]) == STEPS
    assert len(set(first["masks"])) > 4
    assert first["masks"] == second["masks"]
    assert first["weights"] == second["weights"]
    assert first["final"] == second["final"]
    assert first["final"]["zeros"] == round(0.75 * first["final"]["weights"])


@pytest.mark.parametrize("fused", ["True", "False"])
def test_the_same_gradients_give_the_masks_of_one_process(
    ranks: list[dict[str, Any]], tmp_path: Path, fused: str
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = distributed_job.same_batches(tmp_path, fused == "True")
    finally:
        torch.set_num_threads(threads)
    assert len(set(alone["masks"])) > 4
    for told in ranks:
        assert told["same"][fused]["masks"] == alone["masks"]
        assert told["same"][fused]["weights"] == alone["weights"]
        assert told["same"][fused]["final"] == alone["final"]


def test_rank_0_writes_and_all_ranks_resume(ranks: list[dict[str, Any]]) -> None:
    assert [told["unbroken"]["written"] for told in ranks] == [[4, 8, 12, 14], []]
    assert [told["killed"]["written"] for told in ranks] == [[4, 8], []]
    for told in ranks:
        assert told["killed"]["masks"] == told["unbroken"]["masks"][:10]
        assert told["resumed"]["masks"] == told["unbroken"]["masks"][8:]
        assert told["resumed"]["weights"] == told["unbroken"]["weights"][8:]
        assert told["resumed"]["at end"] == told["unbroken"]["at end"] == ranks[0]["unbroken"]["at end"]


@pytest.mark.parametrize("kind", ["Trainer", "PinsTrainer"])
def test_every_rank_evaluates_the_masked_model(ranks: list[dict[str, Any]], kind: str) -> None:
    for told in ranks:
        found = told["evaluated"][kind]
        seen = [share for share in found["during"] if share >= 0]
        assert len(seen) >= 8
        assert min(seen) > 0.05
        assert seen[-2:] == pytest.approx([0.75] * 2, abs=1e-3)
        assert not any(found["after"])
        assert found["weights"] == told["not evaluated"]["weights"] == ranks[0]["not evaluated"]["weights"]


def test_what_needs_one_process_says_so(ranks: list[dict[str, Any]]) -> None:
    for told in ranks:
        assert "a comparison trains in one process" in told["refused"]["pins-ext train"]
