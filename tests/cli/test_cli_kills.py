"""Kills, interrupts, full disks: a run resumes to the weights of an unbroken one, and no result is ever lost."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from classifier import assert_same, flags

from pins_ext.cli.main import main
from pins_ext.files.atomic import newest_complete
from pins_ext.pruning.pruner import Pruner


def test_other_people_s_files_are_not_touched(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert main(["train", *flags(tiny, output)]) == 2
    assert "not the result of a run" in capsys.readouterr().err
    assert (output / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    assert main(["train", *flags(tiny, tmp_path / "file")]) == 2


def test_an_earlier_result_is_kept_or_replaced(tiny: Path, tmp_path: Path, unbroken: Path) -> None:
    output = tmp_path / "run"
    short = ["--max-steps", "4", "--save-strategy", "no", "--eval-strategy", "no"]
    assert main(["train", *flags(tiny, output, *short)]) == 0
    assert main(["train", *flags(tiny, output, *short, "--sparsity", "0.5")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1"]
    assert json.loads((tmp_path / "run.1" / "metrics.json").read_text())["config"]["pruning"]["sparsity"] == 0.75
    assert main(["train", *flags(tiny, output, *short, "--overwrite", "--sparsity", "0.25")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1"]
    assert json.loads((output / "metrics.json").read_text())["config"]["pruning"]["sparsity"] == 0.25


_DYING = """
import os, signal, sys
from pins_ext.cli.main import main
{setup}
sys.exit(main(sys.argv[1:]))
"""


def train_apart(setup: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, after some lines that decide how it will end."""
    command = [sys.executable, "-c", _DYING.format(setup=setup), "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


_KILL_IN_STEP = """
from pins_ext.pruning.pruner import Pruner
end = Pruner.end_step
def dying(self):
    end(self)
    if self.step == 8: os.kill(os.getpid(), signal.SIGKILL)
Pruner.end_step = dying
"""

_KILL_WHILE_SAVING = """
import torch
save = torch.save
def dying(value, file, *rest, **more):
    if 'checkpoint-6' in str(file) and 'scheduler' in str(file): os.kill(os.getpid(), signal.SIGKILL)
    save(value, file, *rest, **more)
torch.save = dying
"""

_KILL_WHILE_PUBLISHING = """
rename = os.rename
def dying(source, target):
    rename(source, target)
    if str(target).endswith('unfinished/result'): os.kill(os.getpid(), signal.SIGKILL)
os.rename = dying
"""


@pytest.mark.parametrize(
    ("setup", "newest"),
    [
        pytest.param(_KILL_IN_STEP, 6, marks=pytest.mark.slow),
        (_KILL_WHILE_SAVING, 3),
        pytest.param(_KILL_WHILE_PUBLISHING, 12, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(
    tiny: Path, tmp_path: Path, unbroken: Path, setup: str, newest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    dead = train_apart(setup, flags(tiny, output, "--test-file", f"{tiny}/test.csv"))
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert not output.exists()
    work = tmp_path / "run.unfinished"
    assert newest_complete(work)[0] == work / f"checkpoint-{newest}"
    # Without --resume an unfinished run is not thrown away; with other settings it is not resumed.
    assert main(["train", *flags(tiny, output)]) == 2
    assert main(["train", "--output-dir", str(output), "--resume", "--sparsity", "0.5"]) == 2
    settings = json.loads((work / "settings.json").read_text())
    (work / "settings.json").write_text(json.dumps(settings | {"processes": 3}))
    capsys.readouterr()
    assert main(["train", "--output-dir", str(output), "--resume"]) == 2
    assert "was started in 3 processes, and 1 would see other batches" in capsys.readouterr().err
    (work / "settings.json").write_text(json.dumps(settings))
    assert main(["train", "--output-dir", str(output), "--resume"]) == 0
    assert_same(output, unbroken)
    assert not work.exists()
    assert main(["verify", str(output)]) == 0
    assert main(["train", "--output-dir", str(output), "--resume", *flags(tiny, output)]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_stops_with_a_checkpoint(
    tiny: Path, tmp_path: Path, unbroken: Path, capsys: pytest.CaptureFixture[str], number: int, code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    end: Callable[..., Any] = Pruner.end_step

    def interrupted(self: Pruner) -> None:
        end(self)
        if self.step == 5:
            os.kill(os.getpid(), number)

    output = tmp_path / "run"
    monkeypatch.setattr(Pruner, "end_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main(["train", *flags(tiny, output), "--test-file", f"{tiny}/test.csv"]) == code
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped at step 5" in (said := capsys.readouterr().err)
    assert "checkpoint-5: go on from there with --resume" in said
    monkeypatch.undo()
    assert main(["train", "--output-dir", str(output), "--resume"]) == 0
    assert_same(output, unbroken)


def test_an_interrupted_comparison_goes_on_where_it_was(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end: Callable[..., Any] = Pruner.end_step

    def interrupted(self: Pruner) -> None:
        end(self)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    output = tmp_path / "all"
    command = ["train", *flags(tiny, output, "--compare", "--eval-strategy", "no")]
    monkeypatch.setattr(Pruner, "end_step", interrupted)
    assert main(command) == 130
    assert sorted(p.name for p in output.iterdir()) == ["dense", "pins.unfinished"]
    dense = (output / "dense" / "metrics.json").stat().st_mtime_ns
    monkeypatch.undo()
    assert main(command) == 2
    assert main([*command, "--resume"]) == 0
    assert sorted(p.name for p in output.iterdir()) == ["dense", "magnitude", "pins", "pins.sparse", "report.html"]
    assert (output / "dense" / "metrics.json").stat().st_mtime_ns == dense


def test_ctrl_c_before_training_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr("pins_ext.runs.prepare.load_task", interrupted)
    assert main(["train", *flags(tiny, tmp_path / "run")]) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_loses_nothing(tiny: Path, tmp_path: Path, unbroken: Path) -> None:
    output = tmp_path / "run"
    # No file may grow past 30 kB once training is over: the model does not fit any more.
    full = """
import resource
from pins_ext.integrations.trainer import PinsTrainer
evaluate = PinsTrainer.evaluate
def fill(self, *args, **kwargs):
    if not self.is_in_train: resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
    return evaluate(self, *args, **kwargs)
PinsTrainer.evaluate = fill
"""
    failed = train_apart(full, flags(tiny, output, "--test-file", f"{tiny}/test.csv"))
    assert failed.returncode == 1, failed.stderr
    # Before it, the notes: no place in the source, no traceback.
    *notes, last = failed.stderr.splitlines()
    assert last.startswith("pins-ext train: could not save")
    assert all(note.startswith("note: ") for note in notes)
    assert "checkpoint-12: go on from there with --resume" in failed.stderr
    assert not output.exists()
    assert main(["train", "--output-dir", str(output), "--resume"]) == 0
    assert_same(output, unbroken)


def test_two_processes_do_not_share_an_output_folder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "run.unfinished"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["train", *flags(tiny, tmp_path / "run")]) == 2
    assert "another process runs in" in capsys.readouterr().err
    assert work.exists()


def test_a_failure_is_one_line_and_with_debug_a_traceback(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the kernel\nis unhappy")

    monkeypatch.setattr("pins_ext.pruning.pruner.Pruner.end_step", fails)
    assert main(["train", *flags(tiny, tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "pins-ext train: RuntimeError: the kernel  (--debug shows where)\n"
    with pytest.raises(RuntimeError, match="unhappy"):
        main(["train", *flags(tiny, tmp_path / "run", "--debug")])
