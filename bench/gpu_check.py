"""One command for a machine with a GPU and no network: build, GPU tests, sanitizer, benchmarks, a short table.

Needs torch with CUDA, triton, pytest, setuptools and nvcc; standard library only, every stage a process of its own with
a time limit, all of them under nine minutes. Writes gpu-check.json, with all that the benchmarks measured, and
gpu-check.log into $OUT or bench/results, anew after each stage. Exit status: 0 if everything that could run passed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 525.0
LAST_SECONDS = 15.0
"""A stage that would get less than this is not begun."""
SIDE_BY_SIDE = max(1, (os.cpu_count() or 1) // 2)
GRACE_SECONDS = 6.0
"""What a late stage has to write down what it has found, before it is killed."""

ABOUT = """
import json, torch, triton
assert torch.cuda.is_available(), "torch sees no CUDA device"
p = torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": p.name, "capability": f"{p.major}.{p.minor}", "memory_gb": round(p.total_memory / 1e9, 1),
    "multiprocessors": p.multi_processor_count, "torch": torch.__version__, "cuda": torch.version.cuda,
    "triton": triton.__version__}))
"""

# Marked so, or with a fixture of tests/conftest.py that also runs a test in Triton's interpreter or emulated.
ON_GPU = re.compile(r"mark\.gpu|def test_\w+\(device: str\b|\bgpu: Gpu\b")


@dataclass(frozen=True)
class Stage:
    """One step of the check.

    Attributes:
        name: in the table.
        command: what runs.
        seconds: its time limit, or less where less is left.
        environment: added to this process's.
        needed: the rest makes no sense without it.
        optional: of a tool that may not work on this machine, the exit status of a real finding; any other means that
            it could not start.
        beside: of stages in a row with the same word, several run at a time.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    needed: bool = False
    optional: int | None = None
    beside: str = ""


@dataclass(frozen=True)
class Result:
    """How a stage ended: passed, failed, timed out, could not start, or not run."""

    name: str
    outcome: str
    seconds: float = 0.0
    remark: str = ""
    status: int | None = None


def run(stage: Stage, seconds: float) -> tuple[Result, str]:
    """Runs a stage for `seconds`, interrupts it then, as Ctrl-C does; everything it started ends with it."""
    begin, late = time.perf_counter(), False
    environment = {**os.environ, **stage.environment}
    # Not a pipe: what hangs in a driver, or has left the session, would hold it open.
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True
            )
        except OSError as error:
            return Result(stage.name, "could not start", remark=str(error)), f"{error}\n"
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            for number in (signal.SIGINT, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(GRACE_SECONDS)
        said.seek(0)
        output = said.read()
    took = time.perf_counter() - begin
    outcome = outcome_of(stage, process.returncode, late)
    return Result(stage.name, outcome, took, remark_of(output), process.returncode), output


def outcome_of(stage: Stage, status: int | None, late: bool) -> str:
    """What an exit status means for this stage."""
    if late:
        return "timed out"
    if status == 0:
        return "passed"
    return "failed" if stage.optional in (None, status) else "could not start"


def remark_of(output: str) -> str:
    """pytest's counts; otherwise the last line."""
    counts = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|deselected|error).*?) in [\d.]+s", output, re.MULTILINE)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (counts[-1] if counts else lines[-1] if lines else "")[:110]


def machine_stage() -> Stage:
    """What the machine is. The first import on a fresh one takes long."""
    return Stage("machine", [sys.executable, "-c", ABOUT], 150, needed=True)


def stages(capability: str, measured: Path) -> Iterator[Stage]:
    """What to do on a GPU of this compute capability, in this order, most valuable first.

    Args:
        capability: such as "9.0".
        measured: folder for the files of the benchmarks.
    """
    python = sys.executable
    build = {"PINS_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": str(os.cpu_count())}
    install = [python, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "-e", "."]
    yield Stage("build", install, 180, build, needed=True)
    pytest = [python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-m", "gpu and not slow"]
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if ON_GPU.search(path.read_text()))
    # A process for each: an illegal access makes the GPU unusable for the rest of its process.
    files.sort(key=lambda path: (path.stem != "test_cuda_grouped", "cuda" not in path.name))
    for path in files:
        first = path.stem == "test_cuda_grouped"
        # Most of the time of the others is Triton's, for one kernel after another on one core.
        beside = "" if first else "tests"
        yield Stage(f"tests: {path.stem}", [*pytest, str(path.relative_to(ROOT))], 150, beside=beside)
        if first:
            # Whether the kernel is worth shipping comes before everything else.
            target = ["--json", str(measured / "decode.json")]
            yield Stage("bench: decode", [python, "-m", "bench.bench_grouped", *target], 60)
    yield inference_stage(measured)
    # Without torch's caching, every tensor is an allocation of its own, whose end the sanitizer sees.
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    small = [*pytest, "tests/cuda/test_cuda_gpu.py", "tests/cuda/test_cuda_boundary.py", "-k", "test_small_case"]
    memcheck = [sanitizer or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    yield Stage("compute-sanitizer", [*memcheck, *small], 75, uncached, optional=99)
    bench = [python, "-m", "bench", "--device", "cuda"]
    for name, seconds, options in (
        ("fp32-1.1g", 140, ["select", "step", "update", "--params", "1.1e9"]),
        ("bf16-7b", 70, ["select", "step", "update", "--shapes", "llama-7b", "--dtype", "bf16", "--no-peers"]),
        ("bert-base", 150, []),
    ):
        budget = ["--budget", f"{0.7 * seconds:.0f}", "--patience", "4"]
        target = ["--json", str(measured / f"{name}.json")]
        yield Stage(f"bench: {name}", [*bench, *options, *budget, *target], seconds)


def inference_stage(measured: Path) -> Stage:
    """BERT-base in cuBLAS, in torch's layers of fewer bits and of 2:4, and in ours; `measured`: folder for its file."""
    if importlib.util.find_spec("transformers") is None:
        absent = "raise SystemExit('transformers is not installed: pip install transformers')"
        return Stage("bench: inference", [sys.executable, "-c", absent], 20, optional=99)
    shapes = ["--tokens", "1", "128", "8x128", "--sparsity", "0.8", "0.9"]
    target = ["--seconds", "4", "--output", str(measured / "inference.json")]
    command = [sys.executable, "-m", "pins_ext", "bench-inference", "--device", "cuda", *shapes, *target]
    return Stage("bench: inference", command, 60)


class Check:
    """A check under way: what is done, written after every stage, and the time that is left.

    Args:
        output: folder of the log and of the JSON.
        only: stages whose names hold none of these words are left out, but for what all need; empty: none is.
        total: seconds.
    """

    def __init__(self, output: Path, only: Sequence[str] = (), total: float = TOTAL_SECONDS) -> None:
        self.results: list[Result] = []
        self.machine: dict[str, Any] = {}
        self.measured: dict[str, Any] = {}
        self._json, self._only = output / "gpu-check.json", only
        self._begin = time.perf_counter()
        self._end = self._begin + total
        self._lacking = ""
        self._log: TextIO = (output / "gpu-check.log").open("w")

    def run(self) -> None:
        """All stages."""
        with self._log, tempfile.TemporaryDirectory() as folder:
            files = Path(folder)
            text = self._run([machine_stage()], files)
            if self.results[0].outcome == "passed":
                self.machine = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
            left = stages(self.machine.get("capability", "9.0"), files)
            wanted = [s for s in left if s.needed or not self._only or any(word in s.name for word in self._only)]
            for beside, group in groupby(wanted, key=lambda stage: stage.beside):
                for part in [[*group]] if beside else ([stage] for stage in group):
                    self._run(part, files)

    def _run(self, part: Sequence[Stage], files: Path) -> str:
        """Runs these side by side; the output of the last."""
        text = ""
        if not self._lacking:
            print(", ".join(stage.name for stage in part), "...", flush=True)
        with ThreadPoolExecutor(min(len(part), SIDE_BY_SIDE)) as pool:
            for stage, (result, text) in zip(part, pool.map(self._run_alone, part), strict=True):
                self._keep(stage, result, text)
        for file in sorted(files.glob("*.json")):
            with suppress(ValueError):  # cut while it was written
                self.measured[file.stem] = json.loads(file.read_text())
            file.unlink()
        self.save()
        return text

    def _run_alone(self, stage: Stage) -> tuple[Result, str]:
        left = self._end - time.perf_counter()
        if self._lacking or left < LAST_SECONDS:
            why = f"needs: {self._lacking}" if self._lacking else "no time left"
            return Result(stage.name, "not run", remark=why), ""
        return run(stage, min(stage.seconds, left))

    def _keep(self, stage: Stage, result: Result, text: str) -> None:
        self.results.append(result)
        if result.outcome == "not run":
            return
        self._log.write(f"\n===== {stage.name}: {' '.join(stage.command)} (at most {stage.seconds:.0f} s)\n{text}\n")
        self._log.write(f"===== {result.outcome}, exit status {result.status} after {result.seconds:.1f} s\n")
        self._log.flush()
        if stage.needed and result.outcome != "passed":
            self._lacking = stage.name
        if result.outcome != "passed" or stage.name.startswith("bench"):
            print("\n".join([f"--- {stage.name}", *text.splitlines()[-25:]]), flush=True)

    @property
    def failed(self) -> list[str]:
        """Names of the stages that failed or were too late."""
        return [r.name for r in self.results if r.outcome in ("failed", "timed out")]

    def save(self) -> None:
        """Write the JSON."""
        written = {
            "date": datetime.date.today().isoformat(),
            "machine": self.machine,
            "seconds": round(time.perf_counter() - self._begin, 1),
            "failed": self.failed,
            "stages": [asdict(r) for r in self.results],
            "benchmarks": self.measured,
        }
        self._json.write_text(json.dumps(written, indent=1) + "\n")


def table(results: Sequence[Result]) -> str:
    """The results, one line each."""
    rows = [("stage", "outcome", "seconds", ""), *((r.name, r.outcome, f"{r.seconds:.0f}", r.remark) for r in results)]
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)


def unpack(check: Path) -> list[Path]:
    """Each benchmark of a gpu-check.json as a file of its own beside it, as the benchmark would have written it."""
    body = json.loads(check.read_text())
    gpu = "-".join(re.findall(r"[a-z0-9]+", body["machine"].get("gpu", "gpu").lower()))
    files = []
    for name, measured in body["benchmarks"].items():
        files.append(check.with_name(f"{gpu}-{body['date']}-{name}.json"))
        files[-1].write_text(json.dumps(measured, indent=1) + "\n")
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="stages with one of these in their name")
    parser.add_argument("--unpack", type=Path, metavar="JSON", help="run nothing: make files of its benchmarks")
    options = parser.parse_args(argv)
    if options.unpack is not None:
        print(*unpack(options.unpack), sep="\n")
        return 0
    names = [stage.name for stage in stages("9.0", Path())]
    if options.only and not any(word in name for word in options.only for name in names):
        parser.error(f"no stage has {' or '.join(options.only)} in its name; there are {', '.join(names)}")
    # In a shell's background it is ignored, and would be by all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    output.mkdir(parents=True, exist_ok=True)
    check = Check(output, options.only)
    check.run()
    print(f"\n{check.machine.get('gpu', 'no GPU')}\n{table(check.results)}\nwrote {output / 'gpu-check.json'}")
    return bool(check.failed)


if __name__ == "__main__":
    raise SystemExit(main())
