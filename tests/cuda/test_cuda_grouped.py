"""grouped_linear and grouped_expand for CUDA: the source run on the host, its PTX, its machine code, on a GPU."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpus import Gpu
from helpers.sparse_cases import assert_product, pruned
from torch import Tensor

from pins_ext import ops

ROOT = Path(__file__).parents[2]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# Rows and columns around a group's 8, a byte's 256, and the 256 or 1024 weights that a warp has on their way.
SHAPES = [(1, 1), (3, 7), (17, 8), (5, 9), (16, 255), (33, 257), (9, 1031), (40, 2100)]
SPARSITIES = [0.0, 0.5, 0.8, 0.9, 0.99, 1.0]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing: the CUDA kernels' source cannot be run on the host")
    program = tmp_path_factory.mktemp("grouped_host") / "grouped_host"
    flags = [
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    flags += ["-fsanitize=address,alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, str(Path(__file__).parent / "grouped_host.cpp"), "-o", str(program)], check=True)
    return program


def run(host: Path, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the source makes of it: the product, and the matrix expanded."""
    packed = ops.grouped_pack(weight)
    sizes = (*weight.shape, packed.bases.numel(), x.shape[0], bias is not None)
    header = struct.pack("<7q", FLOATS.index(weight.dtype), FLOATS.index(x.dtype), *sizes)
    operands = [*packed, x, *([] if bias is None else [bias])]
    data = header + b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in operands if t.numel())
    done = subprocess.run([host], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    size = x.shape[0] * weight.shape[0] * x.element_size()
    y, expanded = bytearray(done.stdout[:size]), bytearray(done.stdout[size:])
    return (torch.frombuffer(y, dtype=x.dtype).view(x.shape[0], -1),
            torch.frombuffer(expanded, dtype=weight.dtype).view(weight.shape))  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_the_source_is_the_dense_product(host: Path, shape: tuple[int, int]) -> None:
    for i, sparsity in enumerate(SPARSITIES):
        values, kind = FLOATS[i % 3], FLOATS[(i // 2 + shape[0]) % 3]
        weight = pruned(*shape, sparsity).to(values)
        for tokens in (1, 2, 3, 4)[i % 2 :: 2]:
            x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens)).to(kind)
            bias = torch.randn(shape[0]) if tokens > 2 else None
            y, expanded = run(host, x, weight, bias)
            assert_product(y, x, weight, bias)
            assert torch.equal(expanded, weight + 0)


def test_what_is_no_number_reaches_only_the_rows_that_multiply_it(host: Path) -> None:
    """Groups are filled up with zeros where a dense row has a zero, too: infinity stays infinity."""
    weight = pruned(30, 300, 0.9)
    weight[0, :290:7] = 2.0
    weight[0, 11] = 0
    x = torch.randn(1, 300)
    expected = F.linear(x, weight)
    for bad in (torch.inf, -torch.inf, torch.nan):
        for column in (0, 11, 280, 299):
            spoiled = x.clone()
            spoiled[0, column] = bad
            y, _ = run(host, spoiled, weight, None)
            dense = F.linear(spoiled, weight)
            # Where a dense product is a number or an infinity, it is the same; other rows may do better than NaN.
            told = ~dense.isnan()
            torch.testing.assert_close(y[told], dense[told])
            multiplied = weight[:, column] != 0
            assert not y[0, multiplied].isfinite().any()
            untouched = ~multiplied & y[0].isfinite()
            torch.testing.assert_close(y[0, untouched], expected[0, untouched])
            # Most rows never see it.
            assert untouched.sum() > 0.7 * (~multiplied).sum()


def test_every_position_of_a_weight(host: Path) -> None:
    weight = torch.zeros(9, 700)
    for row, column in enumerate((0, 7, 8, 255, 256, 257, 511, 512, 699)):
        weight[row, column] = 1.7
    x = torch.randn(4, 700)
    y, expanded = run(host, x, weight, None)
    assert torch.equal(expanded, weight)
    assert torch.equal(y, F.linear(x.double(), weight.double()).float())


# ---- on a GPU, or emulated --------------------------------------------------------------------------


@pytest.mark.parametrize("values", FLOATS, ids=str)
def test_the_operators(values: torch.dtype, gpu: Gpu) -> None:
    shapes = gpu.choose([*SHAPES, (4096, 4096), (4096, 11008)], [(1, 1), (33, 257), (40, 1100)])
    for shape in shapes:
        for sparsity in gpu.choose(SPARSITIES if shape[0] < 4096 else (0.8,), [0.0, 0.8]):
            weight = pruned(*shape, sparsity).to(values)
            packed = ops.GroupedWeight(*(t.to(gpu.device) for t in ops.grouped_pack(weight)))
            with gpu.kernels():
                assert torch.equal(ops.grouped_expand(packed, shape[1]).cpu(), weight + 0)
            for tokens in (1, 2, 3, 4, 5):
                kind = FLOATS[(tokens + FLOATS.index(values)) % 3]
                x, bias = torch.randn(tokens, shape[1]).to(kind), torch.randn(shape[0]) if tokens != 2 else None
                on_gpu = None if bias is None else bias.to(gpu.device)
                with gpu.kernels():
                    y = ops.grouped_linear(x.to(gpu.device), packed, on_gpu).cpu()
                assert_product(y, x, weight, bias)


def test_the_emulated_kernel_adds_in_the_order_of_the_source(host: Path, gpu: Gpu) -> None:
    weight, x = pruned(33, 1100, 0.8).bfloat16(), torch.randn(4, 1100).bfloat16()
    packed = ops.GroupedWeight(*(t.to(gpu.device) for t in ops.grouped_pack(weight)))
    with gpu.kernels():
        y = ops.grouped_linear(x.to(gpu.device), packed, None).cpu()
    assert torch.equal(y, run(host, x, weight, None)[0])


# ---- what the compiler makes of it ------------------------------------------------------------------


@pytest.fixture(scope="session")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The compiler's report and the machine code of each architecture."""
    nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is missing: csrc/cuda cannot be compiled")
    dump = shutil.which("cuobjdump", path="/usr/local/cuda/bin") or shutil.which("cuobjdump")
    if dump is None:
        triton = pytest.importorskip("triton", reason="cuobjdump is missing, and Triton, which carries one, too")
        dump = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    folder, found = tmp_path_factory.mktemp("grouped"), {}
    flags = ["-O3", "-std=c++17", "--fmad=false", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{Path(torch.__file__).parent / 'include'}", "csrc/cuda/grouped.cu", "-Xptxas", "-v", "-cubin"]
    for number in ("80", "90"):
        file = folder / f"{number}.cubin"
        command = [nvcc, *flags, f"-gencode=arch=compute_{number},code=sm_{number}", "-o", file]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[number] = (
            done.stderr,
            subprocess.run([dump, "-sass", file], capture_output=True, text=True, check=True).stdout,
        )
    return found


@pytest.mark.parametrize("number", ["80", "90"])
def test_no_spills_and_two_blocks_fit_a_multiprocessor(cubin: dict[str, tuple[str, str]], number: str) -> None:
    report = cubin[number][0]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    # Three dtypes by 1, 2 and 4 tokens, and two sizes to expand.
    assert spills == [("0", "0", "0")] * 11
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= 65536 // (2 * 512)


def loops_that_multiply(code: str) -> list[list[str]]:
    """Opcodes of the innermost loops with multiply-adds, from where each jumps back to."""
    lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*)", code, re.MULTILINE)
    listing = [(int(at, 16), op.split(";")[0]) for at, op, _ in lines]
    jumps = [(int(at, 16), re.search(r"0x([0-9a-f]+)", rest)) for at, op, rest in lines if op.startswith("BRA")]
    back = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    places = [at for at, op in listing if op.startswith("FFMA")]
    around = [loop for loop in back if any(loop[0] <= at <= loop[1] for at in places)]
    inner = [(a, b) for a, b in around if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in around)]
    assert all(any(a <= at <= b for a, b in inner) for at in places)
    return [[op for at, op in listing if a <= at <= b] for a, b in inner]


# Multiply-adds grow with the tokens, everything else is shared by them.
@pytest.mark.parametrize(("tokens", "most"), [(1, 5), (2, 6), (4, 8)])
@pytest.mark.parametrize("number", ["80", "90"])
@pytest.mark.parametrize("values", ["BFloat16", "Float16", "float"])
def test_instructions_per_weight(
    cubin: dict[str, tuple[str, str]], number: str, values: str, tokens: int, most: float
) -> None:
    """Counted in the machine code: a whole turn of the loop over a row, with the loads for the next turn."""
    functions = cubin[number][1].split("Function : ")[1:]
    names = subprocess.run(["c++filt", *(f.split()[0] for f in functions)], capture_output=True, text=True, check=True)
    name = re.compile(rf"grouped_linear_kernel<(.*::)?{values}, {tokens}>")
    (code,) = [f for f, line in zip(functions, names.stdout.splitlines(), strict=True) if name.search(line)]
    assert not re.search(r"\s(LDL|STL)\b", code)
    groups, wide = (2, 2) if values == "float" else (4, 1)
    for turn in loops_that_multiply(code):
        count = {op: sum(o.startswith(op) for o in turn) for op in ("FFMA", "LDS", "IDP", "LDG.E.128", "LDG", "SHFL")}
        turns = count["FFMA"] // (8 * groups * tokens)  # the compiler may unroll
        weights = 8 * groups * turns
        assert count["FFMA"] == weights * tokens
        # x comes from shared memory, all tokens of a column at once; values in 16 bytes; no sum over lanes.
        assert count["LDS"] == count["IDP"] == weights
        assert count["LDG.E.128"] == groups * wide * turns
        assert count["LDG"] == groups * (wide + 2) * turns
        assert count["SHFL"] == 0
        assert len(turn) / weights <= most
