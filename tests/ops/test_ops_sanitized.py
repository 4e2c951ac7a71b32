"""The CPU operators under AddressSanitizer and UBSan: tens of thousands of random calls, half of them spoilt."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import operator_fuzz
import pytest
import torch
from operator_calls import CALLS

ROOT = Path(__file__).parents[2]
CALLS_PER_PROCESS = 12_000


def test_every_operator_is_fuzzed() -> None:
    """But those that are Python on the CPU."""
    assert set(operator_fuzz.GENERATORS) == set(CALLS) - {
        "bracket_of", "narrow", "settle", "cutoff", "grouped_linear", "grouped_expand"
    }  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc without CUDA, built with sanitizers."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing: nothing can be built with sanitizers")
    folder, home = tmp_path_factory.mktemp("sanitized"), Path(torch.__file__).parent
    flags = ["-O1", "-g1", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
    flags += ["-fvisibility=hidden", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = [f"-I{home}/include", f"-I{sysconfig.get_paths()['include']}"]
    sources = [path for folder in ("csrc", "csrc/cpu") for path in sorted((ROOT / folder).glob("*.cpp"))]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
        subprocess.run([compiler, *flags, *defines, *include, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    linked = folder / "_C.abi3.so"
    libraries = [f"-L{home}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-shared", *flags, *objects, *libraries, "-o", linked], check=True)
    return linked


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_no_call_touches_foreign_memory(library: Path, capability: str) -> None:
    # Loaded late, the sanitizer does not find what throws exceptions.
    runtime = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    seed = random.SystemRandom().randrange(1 << 20)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtime),
        # Python and torch leave memory to the process's end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PINS_EXT_CPU_CAPABILITY": capability,
    }
    command = [sys.executable, operator_fuzz.__file__, str(library), str(seed), str(CALLS_PER_PROCESS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "this CPU and build have" in done.stderr:
        pytest.skip(f"this CPU or build lacks {capability}")
    print(done.stdout)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr[-6000:]}"
    assert f"{capability} seed {seed}: {CALLS_PER_PROCESS} calls" in done.stdout
