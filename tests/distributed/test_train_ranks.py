"""`pins-ext train` under torchrun: one result folder, written by one rank; stopped and resumed to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from classifier import assert_same, flags

from pins_ext.cli.main import main
from pins_ext.files.atomic import checkpoints

pytestmark = pytest.mark.slow

LAUNCH = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "pins_ext"]

# With --cpu it starts one process, whatever --num_processes says; --multi_gpu is torchrun, on CPUs too.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "pins_ext"]


def start(folder: Path, *argv: str, launch: list[str] = LAUNCH) -> subprocess.Popen[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launch, *argv]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_one_result_and_a_stopped_run_goes_on_to_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    unbroken = start(tmp_path, "train", *flags(tiny, tmp_path / "unbroken", "--save-steps", "4"))
    out, err = unbroken.communicate(timeout=300)
    assert unbroken.returncode == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["unbroken"]
    assert out.count("training  ") == 1
    assert "in 2 processes" in out
    record = json.loads((tmp_path / "unbroken" / "metrics.json").read_text())
    assert record["final"]["zeros"] > 0
    assert main(["verify", str(tmp_path / "unbroken")]) == 0

    stopped = start(tmp_path, "train", *flags(tiny, tmp_path / "stopped", "--save-steps", "4"))
    work = tmp_path / "stopped.unfinished"
    while not checkpoints(work) and stopped.poll() is None:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate(timeout=120)
    assert stopped.returncode != 0
    assert "go on from there with --resume" in err
    assert checkpoints(work)

    resumed = start(tmp_path, "train", "--output-dir", str(tmp_path / "stopped"), "--resume")
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert sum(line.startswith("resuming from checkpoint-") for line in out.splitlines()) == 1, out
    assert not work.exists()
    assert_same(tmp_path / "unbroken", tmp_path / "stopped")


def test_a_killed_rank_ends_all_and_the_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "train", *flags(tiny, tmp_path / "result", "--save-steps", "4"))
    work = tmp_path / "result.unfinished"
    while not checkpoints(work) and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(int(workers[0]), signal.SIGKILL)
    begin = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - begin < 90
    assert process.returncode != 0
    assert "exitcode  : -9" in err
    assert checkpoints(work)
    assert not (tmp_path / "result").exists()
    again = start(tmp_path, "train", "--output-dir", str(tmp_path / "result"), "--resume")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "resuming from checkpoint-" in out
    assert main(["verify", str(tmp_path / "result")]) == 0


def test_the_best_model_is_brought_back_on_every_rank(tiny: Path, tmp_path: Path) -> None:
    more = ["--early-stopping", "1", "--max-steps", "40", "--eval-steps", "4", "--save-steps", "4"]
    process = start(tmp_path, "train", *flags(tiny, tmp_path / "result", *more))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert json.loads((tmp_path / "result" / "metrics.json").read_text())["final"]["zeros"] > 0
    assert main(["verify", str(tmp_path / "result")]) == 0


def test_accelerate_launch_writes_one_result(tiny: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "train", *flags(tiny, tmp_path / "result"), launch=ACCELERATE)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert out.count("training  ") == 1
    assert "in 2 processes" in out
    assert json.loads((tmp_path / "result" / "metrics.json").read_text())["final"]["zeros"] > 0
    assert main(["verify", str(tmp_path / "result")]) == 0


def test_what_is_refused_is_refused_on_every_rank(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("\\begin{document}")
    for argv, reason in (
        (["train", *flags(tiny, tmp_path / "taken")], "holds files that are not the result of a run"),
        (["ablate", "criteria"], "pins-ext ablate: runs in one process"),
    ):
        process = start(tmp_path, *argv)
        _, err = process.communicate(timeout=120)
        assert process.returncode != 0
        assert reason in err
        assert "exitcode  : 2" in err
        assert "Traceback" not in err.split("torch/distributed/run.py")[0] or "ChildFailedError" in err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
