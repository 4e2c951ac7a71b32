"""sum_of_squares for CUDA: its source run on the host thread by thread, what compilers make of it, and on a GPU."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from cases import FLOATS, LISTS, VALUES, tensors
from gpus import Gpu

from pins_ext import ops, reference

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing: the CUDA kernels' source cannot be run on the host")
    program = tmp_path_factory.mktemp("norm_host") / "norm_host"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Werror"]
    flags += ["-fsanitize=address,alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, str(Path(__file__).parent / "norm_host.cpp"), "-o", str(program)], check=True)
    return program


def run(host: Path, xs: list[torch.Tensor], misaligned: int) -> float:
    """What the source computes; every tensor starts `misaligned` elements past a multiple of 64 bytes."""
    layout = ops.Layout.of(xs)
    dtype = FLOATS.index(xs[0].dtype) if xs else 0
    parts = [struct.pack("<3q", dtype, len(xs), len(layout.chunks))]
    parts += [t.numpy().tobytes() for t in (layout.places, layout.chunks)]
    for x in xs:
        data = x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""
        parts += [struct.pack("<2q", misaligned * x.element_size(), len(data)), data]
    done = subprocess.run([host], input=b"".join(parts), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return struct.unpack("<d", done.stdout)[0]


@pytest.mark.parametrize("sizes", [*LISTS, "beyond the totals"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_source_gives_the_bits_of_the_reference(host: Path, dtype: torch.dtype, sizes: str) -> None:
    for values in VALUES[:2]:
        xs = tensors(LISTS.get(sizes, [3] * 300 + [40000]), dtype, values)
        expected = reference.sum_of_squares(xs).item()
        for misaligned in (0, 1, 2):
            found = run(host, xs, misaligned)
            assert found == expected or (found != found and expected != expected)


def test_compiled_it_is_exact_and_wide(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is missing: csrc/cuda cannot be compiled")
    flags = ["-O3", "-std=c++17", "--fmad=false", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{Path(torch.__file__).parent / 'include'}", "csrc/cuda/norm.cu", "-Xptxas", "-v"]
    for architecture in ("80", "90"):
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        kept = ["--keep", "--keep-dir", tmp_path]  # norm.ptx, on the way to it
        command = [nvcc, *flags, code, "-cubin", "-o", tmp_path / "norm.cubin", *kept]
        report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert report.returncode == 0, report.stderr
        spills = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr
        )
        # Three dtypes, the total, and the table of addresses.
        assert spills == [("0", "0", "0")] * 5
        assert max(map(int, re.findall(r"Used (\d+) registers", report.stderr))) <= 64
        ptx = (tmp_path / "norm.ptx").read_text()
        assert not re.findall(r"\S*(?:\.ftz|\.approx|div\.full|fma\.rn\.f)\S*", ptx)
        assert re.search(r"ld\.global\.v4\.\w?32", ptx)
        assert re.search(r"ld\.global\.v4\.\w16", ptx)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_operator(dtype: torch.dtype, gpu: Gpu) -> None:
    for sizes in ("none", "empty", "one", "odd", "chunk", "many"):
        xs = tensors(LISTS[sizes], dtype, "special" if sizes == "odd" else "normal", misaligned=sizes == "many")
        layout, expected = ops.Layout.of(xs), reference.sum_of_squares(xs)
        call = [x.to(gpu.device) for x in xs], layout.places.to(gpu.device), layout.chunks.to(gpu.device)
        with gpu.kernels():
            found = torch.ops.pins_ext.sum_of_squares(*call).cpu()
        assert torch.equal(found.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
