"""The examples run as they stand and end where they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import pins_ext.examples

FOLDER = Path(pins_ext.examples.__file__).parent
SCRIPTS = ("plain_loop", "trainer", "accelerate_loop", "release_loop", "frozen_base")


def assert_it_worked(printed: str) -> None:
    """Exact zeros, and something was learned."""
    zeros, weights = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of ([\d,]+)", printed)[-1])
    assert zeros == weights - round(0.2 * weights)
    accuracy, constant = map(float, re.findall(r"accuracy ([\d.]+); a constant answer has ([\d.]+)", printed)[-1])
    assert accuracy > 1.5 * constant


@pytest.mark.parametrize(
    "name",
    [
        "plain_loop",
        "trainer",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("release_loop", "frozen_base")),
    ],
)
def test_it_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "frozen_base":
        pytest.importorskip("peft")
    runpy.run_module(f"pins_ext.examples.{name}", run_name="__main__")
    assert_it_worked(capsys.readouterr().out)


@pytest.mark.slow
def test_it_runs_in_two_processes() -> None:
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launch, "-m", "pins_ext.examples.accelerate_loop"]
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=os.environ | cpu, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("accuracy") == 1
    assert_it_worked(result.stdout)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_short(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60
    assert f"pins_ext.examples.{name}" in pins_ext.examples.__doc__


def test_it_runs_under_fsdp() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "-m", "pins_ext.examples.fsdp_loop"],
        env=os.environ | cpu, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    zeros, weights = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of ([\d,]+)", result.stdout)[-1])
    assert zeros == weights - round(0.2 * weights)
    first, *_, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout))
    assert last < first
