"""The CUDA kernels' source, compiled for the host with AddressSanitizer and UBSan."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "cuda"


def compiled(stem: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of tests/cuda/<stem>.cpp; skips where there is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing: the CUDA kernels' source cannot be run on the host")
    program = tmp_path_factory.mktemp(stem) / stem
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Werror", "-fsanitize=address"]
    flags += ["-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, str(FOLDER / f"{stem}.cpp"), "-o", str(program)], check=True)
    return program
