"""The GPU check's own logic, without a GPU: limits, outcomes, the table."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pins_ext.bench import gpu_check
from pins_ext.bench.gpu_check import Result, Stage


def run(code: str, seconds: float = 30, **options: object) -> tuple[Result, str]:
    stage = Stage("stage", [sys.executable, "-c", code], seconds, **options)  # type: ignore[arg-type]
    return gpu_check.run(stage, seconds)


@pytest.mark.parametrize(
    ("status", "optional", "outcome"),
    [(0, None, "passed"), (3, None, "failed"), (0, 99, "passed"), (99, 99, "failed"), (1, 99, "could not start")],
)
def test_outcomes(status: int, optional: int | None, outcome: str) -> None:
    result, output = run(f"print('said'); raise SystemExit({status})", optional=optional)
    assert (result.outcome, result.status, result.remark, output) == (outcome, status, "said", "said\n")


def ended(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("deaf", [False, True])
def test_a_late_stage_ends_with_all_that_it_started(
    deaf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it listens to an interruption or not."""
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 1.0 if deaf else 15.0)
    child = tmp_path / "child"
    begin = time.perf_counter()
    code = f"""
import signal, subprocess, sys, time
if {deaf}: signal.signal(signal.SIGINT, signal.SIG_IGN)
print("begun", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(child)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result, output = run(code, seconds=4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - begin < 50
    assert (result.outcome, output.startswith("begun\n")) == ("timed out", True)
    assert ("KeyboardInterrupt" in output) != deaf
    # Killed is not yet gone where the machine is busy.
    assert any(ended(child.read_text()) or time.sleep(0.1) for _ in range(100))


def test_a_missing_tool_could_not_start() -> None:
    result, output = gpu_check.run(Stage("tool", ["/no/such/tool"], 5), 5)
    assert (result.outcome, "/no/such/tool" in output) == ("could not start", True)


@pytest.mark.parametrize(
    ("output", "remark"),
    [
        ("....\n3 failed, 12 passed, 1 skipped in 4.20s\n", "3 failed, 12 passed, 1 skipped"),
        ("=== 5 passed in 64.20s (0:01:04) ===\n===== ERROR SUMMARY: 0 errors\n", "5 passed"),
        ("one\ntwo\n\n", "two"),
        ("", ""),
    ],
)
def test_remarks(output: str, remark: str) -> None:
    assert gpu_check.remark_of(output) == remark


def test_stages_are_complete_and_fit(tmp_path: Path) -> None:
    stages = list(gpu_check.stages("9.0", tmp_path))
    names = [stage.name for stage in stages]
    assert names[0] == "build"
    assert stages[0].environment["PINS_EXT_CUDA"] == "1"
    assert "tests: test_cuda_gpu" in names
    assert "tests: test_triton_select" in names
    assert {"tests: test_cuda_norm", "tests: test_cuda_grouped", "tests: test_sparse_grouped"} <= set(names)
    # Whether the kernel is worth shipping is known within the first minutes.
    assert names.index("bench: decode") < names.index("compute-sanitizer")
    assert names.index("compute-sanitizer") < names.index("bench: fp32-1.1g")
    assert gpu_check.TOTAL_SECONDS + gpu_check.GRACE_SECONDS < 540
    # Slow tests need a machine for longer.
    tests = [stage for stage in stages if stage.name.startswith("tests")]
    assert all(stage.command[-3:-1] == ["-m", "gpu and not slow"] for stage in tests)
    assert {stage.beside for stage in tests[1:]} == {"tests"}


MACHINE = """print('{"capability": "9.0", "gpu": "NVIDIA H200"}')"""
FINE, FAILS = "print('said')", "raise SystemExit(1)"


def check(
    output: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[str, str], **options: Any
) -> tuple[list[str], dict[str, Any]]:
    """Outcomes of a check whose stages run these lines of Python instead, and the JSON. `FILES` is the folder of the
    benchmarks; `machine` and `build` are needed, tests run side by side.
    """

    def stage(name: str, files: Path | None = None) -> Stage:
        command = [sys.executable, "-c", codes[name].replace("FILES", repr(str(files)))]
        beside = "tests" if name.startswith("tests") else ""
        return Stage(name, command, 30, needed=name in ("machine", "build"), beside=beside)

    monkeypatch.setattr(gpu_check, "machine_stage", lambda: stage("machine"))
    monkeypatch.setattr(gpu_check, "stages", lambda _, files: [stage(n, files) for n in codes if n != "machine"])
    made = gpu_check.Check(output, **options)
    made.run()
    return [result.outcome for result in made.results], json.loads((output / "gpu-check.json").read_text())


def test_what_is_needed_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking, written = check(tmp_path, monkeypatch, {"machine": FAILS, "build": FINE, "tests": FINE})
    assert lacking == ["failed", "not run", "not run"]
    assert {stage["remark"] for stage in written["stages"][1:]} == {"needs: machine"}
    unbuilt, written = check(tmp_path, monkeypatch, {"machine": MACHINE, "build": FAILS, "tests": FINE})
    assert unbuilt == ["passed", "failed", "not run"]
    assert written["stages"][2]["remark"] == "needs: build"
    failed, written = check(tmp_path, monkeypatch, {"machine": MACHINE, "build": FINE, "a": FAILS, "b": FINE})
    assert failed == ["passed", "passed", "failed", "passed"]
    assert written["failed"] == ["a"]
    late, _ = check(tmp_path, monkeypatch, {"machine": MACHINE, "build": FINE}, total=1)
    assert late == ["not run", "not run"]


def test_tests_run_side_by_side_and_are_told_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for a file of the other's."""
    monkeypatch.setattr(gpu_check, "SIDE_BY_SIDE", 2)
    waits = """
import time, pathlib
pathlib.Path({own!r}).touch()
while not pathlib.Path({other!r}).exists(): time.sleep(0.01)
print("met")
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    codes = {"tests: a": waits.format(own=a, other=b), "tests: b": waits.format(own=b, other=a), "c": FINE}
    outcomes, written = check(tmp_path, monkeypatch, {"machine": MACHINE, "build": FINE, **codes})
    assert outcomes == ["passed"] * 5
    assert [stage["name"] for stage in written["stages"][2:]] == [*codes]
    log = (tmp_path / "gpu-check.log").read_text()
    assert log.index("===== tests: a:") < log.index("===== tests: b:") < log.index("===== c:")
    assert log.count("met\n") == 2


def test_benchmarks_are_in_the_one_file_and_become_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writes = "import pathlib; pathlib.Path(FILES, 'fp32.json').write_text('{\"records\": [1]}'); "
    writes += "pathlib.Path(FILES, 'cut.json').write_text('{\"rec')"
    codes = {"machine": MACHINE, "build": FINE, "bench: fp32": writes, "tests: a": FINE}
    outcomes, written = check(tmp_path, monkeypatch, codes, only=["bench"])
    assert (len(outcomes), written["benchmarks"]) == (3, {"fp32": {"records": [1]}})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu-check.json", "gpu-check.log"]
    assert gpu_check.main(["--unpack", str(tmp_path / "gpu-check.json")]) == 0
    file = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert file.name == f"nvidia-h200-{written['date']}-fp32.json"
    assert json.loads(file.read_text()) == {"records": [1]}


def test_main_shows_a_table_and_fails_where_a_stage_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "OUT", str(tmp_path))
    tests = Stage("tests: a", [sys.executable, "-c", FAILS], 30)
    monkeypatch.setattr(gpu_check, "machine_stage", lambda: Stage("machine", [sys.executable, "-c", MACHINE], 30))
    monkeypatch.setattr(gpu_check, "stages", lambda *_: [tests])
    assert gpu_check.main([]) == 1
    assert json.loads((tmp_path / "gpu-check.json").read_text())["failed"] == ["tests: a"]
    shown = capsys.readouterr().out
    assert "NVIDIA H200\n" in shown
    assert "\ntests: a  failed" in shown
