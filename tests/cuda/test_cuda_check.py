"""The GPU check's own logic, without a GPU: limits, outcomes, the table."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path

import pytest

from pins_ext.bench import gpu_check
from pins_ext.bench.gpu_check import Result, Stage


def run(code: str, seconds: float = 30, **options: object) -> tuple[Result, str, str]:
    log = io.StringIO()
    stage = Stage("stage", [sys.executable, "-c", code], seconds, **options)  # type: ignore[arg-type]
    result, output = gpu_check.run(stage, seconds, log)
    return result, output, log.getvalue()


@pytest.mark.parametrize(
    ("status", "optional", "outcome"),
    [(0, None, "passed"), (3, None, "failed"), (0, 99, "passed"), (99, 99, "failed"), (1, 99, "could not start")],
)
def test_outcomes(status: int, optional: int | None, outcome: str) -> None:
    result, output, log = run(f"print('said'); raise SystemExit({status})", optional=optional)
    assert (result.outcome, result.status, result.remark, output) == (outcome, status, "said", "said\n")
    assert "said" in log


def ended(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_a_late_stage_ends_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    begin = time.perf_counter()
    code = f"""
import subprocess, sys, time
print("begun", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(child)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    result, output, _ = run(code, seconds=4)
    assert time.perf_counter() - begin < 30
    assert (result.outcome, output) == ("timed out", "begun\n")
    # Killed is not yet gone where the machine is busy.
    assert any(ended(child.read_text()) or time.sleep(0.1) for _ in range(100))


def test_a_missing_tool_could_not_start() -> None:
    result, output = gpu_check.run(Stage("tool", ["/no/such/tool"], 5), 5, io.StringIO())
    assert (result.outcome, output) == ("could not start", "")


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
    assert gpu_check.TOTAL_SECONDS < 540


def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[str, str], total: float = 60) -> list[str]:
    """Outcomes of a check whose stages run these lines of Python instead; `machine` and `build` are needed."""

    def stage(name: str) -> Stage:
        return Stage(name, [sys.executable, "-c", codes[name]], 30, needed=name in ("machine", "build"))

    monkeypatch.setattr(gpu_check, "machine_stage", lambda: stage("machine"))
    monkeypatch.setattr(gpu_check, "stages", lambda *_: map(stage, [name for name in codes if name != "machine"]))
    return [result.outcome for result in gpu_check.check(tmp_path, total)[0]]


def test_what_is_needed_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, fails = "print('{}')", "raise SystemExit(1)"
    lacking = check(tmp_path, monkeypatch, {"machine": fails, "build": fine, "tests": fine})
    assert lacking == ["failed", "not run", "not run"]
    fine = """print('{"capability": "9.0"}')"""
    assert check(tmp_path, monkeypatch, {"machine": fine, "build": fails, "tests": fine})[1:] == ["failed", "not run"]
    assert check(tmp_path, monkeypatch, {"machine": fine, "build": fine, "a": fails, "b": fine})[2:] == [
        "failed",
        "passed",
    ]
    assert check(tmp_path, monkeypatch, {"machine": fine, "build": fine}, total=1)[1:] == ["not run"]


def test_main_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "OUT", str(tmp_path))
    results = [Result("build", "passed", 12.3, "done", 0), Result("tests", "failed", 4.5, "1 failed", 1)]
    monkeypatch.setattr(gpu_check, "check", lambda output: (results, {"gpu": "a GPU"}))
    assert gpu_check.main() == 1
    written = json.loads((tmp_path / "gpu-check.json").read_text())
    assert (written["failed"], written["machine"]["gpu"]) == (["tests"], "a GPU")
    shown = capsys.readouterr().out
    assert "tests  failed         4  1 failed" in shown
