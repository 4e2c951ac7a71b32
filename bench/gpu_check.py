"""One command for a machine with a GPU and no network: build, GPU tests, sanitizer, benchmarks, a short table.

Needs torch with CUDA, triton, pytest, setuptools and nvcc; standard library only, every stage a process of its own with
a time limit, all of them under nine minutes. Writes gpu-check.json and gpu-check.log, beside the files of the
benchmarks, into $OUT or bench/results. Exit status: 0 if everything that could run passed.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 525.0
LAST_SECONDS = 15.0
"""A stage that would get less than this is not begun."""

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
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    needed: bool = False
    optional: int | None = None


@dataclass(frozen=True)
class Result:
    """How a stage ended: passed, failed, timed out, could not start, or not run."""

    name: str
    outcome: str
    seconds: float = 0.0
    remark: str = ""
    status: int | None = None


def run(stage: Stage, seconds: float, log: TextIO) -> tuple[Result, str]:
    """Runs a stage for at most `seconds`, its output also to the log; everything it started ends with it."""
    log.write(f"\n===== {stage.name}: {' '.join(stage.command)} (at most {seconds:.0f} s)\n")
    log.flush()
    begin = time.perf_counter()
    try:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env={**os.environ, **stage.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        log.write(f"{error}\n")
        return Result(stage.name, "could not start", remark=str(error)), ""
    late = False
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    took = time.perf_counter() - begin
    log.write(f"{output}\n===== exit status {process.returncode} after {took:.1f} s{', killed' if late else ''}\n")
    log.flush()
    return Result(
        stage.name, outcome_of(stage, process.returncode, late), took, remark_of(output), process.returncode
    ), output


def outcome_of(stage: Stage, status: int, late: bool) -> str:
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
    return Stage("machine", [sys.executable, "-c", ABOUT], 60, needed=True)


def stages(capability: str, output: Path) -> Iterator[Stage]:
    """What to do on a GPU of this compute capability, in this order, most valuable first."""
    python = sys.executable
    build = {"PINS_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": str(os.cpu_count())}
    install = [python, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "-e", "."]
    yield Stage("build", install, 180, build, needed=True)
    pytest = [python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-m", "gpu"]
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if ON_GPU.search(path.read_text()))
    # A process for each: an illegal access makes the GPU unusable for the rest of its process.
    files.sort(key=lambda path: (path.stem != "test_cuda_grouped", "cuda" not in path.name))
    for path in files:
        yield Stage(f"tests: {path.stem}", [*pytest, str(path.relative_to(ROOT))], 120)
        if path.stem == "test_cuda_grouped":
            # Whether the kernel is worth shipping comes before everything else.
            target = ["--json", str(output / "gpu-decode.json")]
            yield Stage("bench: decode", [python, "-m", "bench.bench_grouped", *target], 60)
    yield inference_stage(output)
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
        target = ["--json", str(output / f"gpu-{name}.json")]
        yield Stage(f"bench: {name}", [*bench, *options, *budget, *target], seconds)


def inference_stage(output: Path) -> Stage:
    """BERT-base in cuBLAS, in torch's layers of fewer bits and of 2:4, and in ours."""
    if importlib.util.find_spec("transformers") is None:
        absent = "raise SystemExit('transformers is not installed: pip install transformers')"
        return Stage("bench: inference", [sys.executable, "-c", absent], 20, optional=99)
    shapes = ["--tokens", "1", "128", "8x128", "--sparsity", "0.8", "0.9"]
    target = ["--seconds", "4", "--output", str(output / "gpu-inference.json")]
    command = [sys.executable, "-m", "pins_ext", "bench-inference", "--device", "cuda", *shapes, *target]
    return Stage("bench: inference", command, 60)


def check(output: Path, total: float = TOTAL_SECONDS) -> tuple[list[Result], dict[str, str]]:
    """Runs the stages within `total` seconds. Returns their results and the machine's description."""
    end = time.perf_counter() + total
    with (output / "gpu-check.log").open("w") as log:
        result, text = run(machine_stage(), 60, log)
        results = [result]
        about = json.loads(text.strip().splitlines()[-1]) if result.outcome == "passed" else {}
        lacking = "" if about else "machine"
        for stage in stages(about.get("capability", "9.0"), output):
            left = end - time.perf_counter()
            if lacking or left < LAST_SECONDS:
                results.append(Result(stage.name, "not run", remark=f"needs: {lacking}" if lacking else "no time left"))
                continue
            print(f"{stage.name} ...", flush=True)
            result, text = run(stage, min(stage.seconds, left), log)
            results.append(result)
            if stage.needed and result.outcome != "passed":
                lacking = stage.name
            if result.outcome != "passed" or stage.name.startswith("bench"):
                print("\n".join(text.splitlines()[-25:]), flush=True)
    return results, about


def table(results: Sequence[Result]) -> str:
    """The results, one line each."""
    rows = [("stage", "outcome", "seconds", ""), *((r.name, r.outcome, f"{r.seconds:.0f}", r.remark) for r in results)]
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)


def main() -> int:
    """Run everything; 0 if nothing failed."""
    output = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    results, about = check(output)
    failed = [r.name for r in results if r.outcome in ("failed", "timed out")]
    written = {
        "date": datetime.date.today().isoformat(),
        "machine": about,
        "seconds": round(time.perf_counter() - begin, 1),
        "failed": failed,
        "stages": [asdict(r) for r in results],
    }
    (output / "gpu-check.json").write_text(json.dumps(written, indent=1) + "\n")
    print(
        f"\n{about.get('gpu', 'no GPU')}\n{table(results)}\n{written['seconds']} s; wrote {output / 'gpu-check.json'}"
    )
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
