"""What nvcc and ptxas say of csrc/cuda, for sm_80 and sm_90: no GPU needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90")

MOMENTS = {"AdamWStep": 2, "SgdStep": 1}
# Fused multiply-adds that the optimizer asks for, per weight: none may come from the compiler.
FUSED = {"AdamWStep": 2, "SgdStep": 4}
# 65536 registers for 7 blocks of 128 threads where everything is float32, for 6 where the weights are, for 5 or, with
# small moments too, 4 otherwise; the mask alone fills the multiprocessor with 2048 threads.
REGISTERS = {
    "apply_mask_kernel": 32,
    "write_addresses_kernel": 32,
    "settle_kernel": 32,
    "coded_update_kernel": 128,
}
STEMS = ("update", "boundary")


def registers_of(kernel: Kernel) -> int:
    """How many a thread may use."""
    if kernel.name in REGISTERS:
        return REGISTERS[kernel.name]
    _, weights, state, moments = kernel.types
    if kernel.name == "boundary_kernel":
        return 96 if weights == "float" else 128  # for 5 blocks or 4
    if weights == "float":
        return 72 if (state, moments) == ("float", "float") else 80
    return 96 if moments == "float" else 128


@dataclass(frozen=True)
class Kernel:
    """One instantiation: "update_kernel", ("AdamWStep", "float", "BFloat16")."""

    name: str
    types: tuple[str, ...]

    @staticmethod
    def of(demangled: str) -> Kernel:
        name, arguments = re.search(r"(\w+_kernel)(?:<(.*?)>)?\(", demangled).groups()
        return Kernel(name, tuple(argument.split("::")[-1] for argument in (arguments or "").split(", ") if argument))

    @property
    def width(self) -> int:
        """Weights per access."""
        return 4 if self.types[len(self.types) > 1] == "float" else 8


def demangled(*command: str | Path) -> str:
    """The output of a command, C++ names in full."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return subprocess.run(["c++filt"], input=done.stdout, capture_output=True, text=True, check=True).stdout


def built(stem: str) -> Path | None:
    """The object file in the installed module, where it is of these sources and of the default architectures."""
    made = ROOT / "build" / "objects" / "csrc" / "cuda" / f"{stem}.o"
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    if "TORCH_CUDA_ARCH_LIST" in os.environ or not made.exists():
        return None
    return made if made.stat().st_mtime > max(path.stat().st_mtime for path in sources) else None


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The object files of update.cu and boundary.cu, with PTX."""
    return [built(stem) or compile_stem(stem, tmp_path_factory) for stem in STEMS]


def compile_stem(stem: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is missing: csrc/cuda cannot be compiled")
    assert '"--fmad=false"' in (ROOT / "setup.py").read_text()
    include = Path(torch.__file__).parent / "include"
    output = tmp_path_factory.mktemp("cuda") / f"{stem}.o"
    flags = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{include}"]
    demangled(nvcc, *flags, "-c", f"csrc/cuda/{stem}.cu", "-o", output)
    return output


@pytest.fixture(scope="session")
def cuobjdump() -> str:
    found = shutil.which("cuobjdump", path="/usr/local/cuda/bin") or shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="cuobjdump is missing, and Triton, which carries one, too")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


@pytest.fixture(scope="session")
def sass(compiled: list[Path], cuobjdump: str) -> dict[tuple[str, Kernel], str]:
    """Machine code per architecture and kernel."""
    code: dict[tuple[str, Kernel], str] = {}
    for made in compiled:
        for part in re.split(r"code for (?=sm_)", demangled(cuobjdump, "-sass", made))[1:]:
            for function in part.split("Function : ")[1:]:
                code[part.split()[0], Kernel.of(function)] = function
    return code


@pytest.fixture(scope="session")
def ptx(compiled: list[Path], cuobjdump: str) -> dict[Kernel, str]:
    parts = [part for made in compiled for part in demangled(cuobjdump, "-ptx", made).split(".entry ")[1:]]
    return {Kernel.of(part): part for part in parts}


def test_every_kernel_is_there(sass: dict[tuple[str, Kernel], str]) -> None:
    kernels = {kernel for _, kernel in sass}
    storage, state = ("float", "BFloat16", "Float16"), ("float", "BFloat16")
    updates = {Kernel("update_kernel", ("AdamWStep", p, s, m)) for p in storage for s in state for m in state}
    updates |= {Kernel("update_kernel", ("SgdStep", p, s, p)) for p in storage for s in state}
    masks = {Kernel("apply_mask_kernel", (p,)) for p in storage[:2]}
    coded = {Kernel("coded_update_kernel", (step,)) for step in MOMENTS}
    ends = {Kernel("boundary_kernel", kernel.types) for kernel in updates}
    single = {Kernel(name, ()) for name in ("write_addresses_kernel", "settle_kernel")}
    assert kernels == updates | masks | coded | ends | single
    assert set(sass) == {(architecture, kernel) for architecture in ARCHITECTURES for kernel in kernels}


def test_no_spills_and_registers_within_bounds(
    compiled: list[Path], cuobjdump: str, sass: dict[tuple[str, Kernel], str]
) -> None:
    found = set()
    usage = "".join(demangled(cuobjdump, "-res-usage", made) for made in compiled)
    for part in re.split(r"arch = (?=sm_)", usage)[1:]:
        architecture = part.split()[0]
        for name, *numbers in re.findall(r"Function (.+?):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", part):
            kernel = Kernel.of(name)
            registers, stack, local = map(int, numbers)
            # What a thread spills lies in its local memory, on its stack.
            assert (stack, local) == (0, 0), (kernel, architecture)
            assert registers <= registers_of(kernel), (kernel, architecture)
            found.add((architecture, kernel))
    assert found == set(sass)


def test_accesses_are_global_and_sixteen_bytes_wide(sass: dict[tuple[str, Kernel], str]) -> None:
    for (architecture, kernel), code in sass.items():
        opcodes = Counter(re.findall(r"\b(?:LDG|STG|LD|ST|LDL|STL)\.[\w.]+", code))
        case = (kernel, architecture, dict(opcodes))
        assert not [opcode for opcode in opcodes if re.match(r"(LD|ST|LDL|STL)\.", opcode)], case
        if kernel.name in ("write_addresses_kernel", "coded_update_kernel", "settle_kernel"):
            continue  # a group of 8-bit storage is 34 bytes
        if kernel.name == "apply_mask_kernel":
            reads, writes = 1, 1
        else:
            step, _, *types = kernel.types
            # 16-byte accesses of ipt and of a moment; 0: one of 8 bytes. Besides p g shadow, p shadow.
            ipt, moment = (kernel.width * (4 if kind == "float" else 2) // 16 for kind in types)
            averages = 2 * ipt if kernel.name == "boundary_kernel" else 0
            reads, writes = (own + ipt + averages + MOMENTS[step] * moment for own in (3, 2))
        assert sum(n for opcode, n in opcodes.items() if re.match(r"LDG\.E\.128", opcode)) >= reads, case
        assert sum(n for opcode, n in opcodes.items() if re.match(r"STG\.E\.128", opcode)) >= writes, case


def test_arithmetic_is_ieee_and_uncontracted(ptx: dict[Kernel, str], sass: dict[tuple[str, Kernel], str]) -> None:
    assert set(ptx) == {kernel for _, kernel in sass}
    for kernel, code in ptx.items():
        assert not re.findall(r"\S*(?:\.ftz|\.approx|div\.full)\S*", code), kernel
        fused = len(re.findall(r"\bfma\.rn\.f32\b", code))
        # Once per weight of an access, and once for a lone weight.
        stepping = kernel.types and kernel.types[0] in FUSED
        of_weight = FUSED[kernel.types[0]] if stepping else 0
        expected = of_weight * (1 if kernel.name == "coded_update_kernel" else kernel.width + 1 if stepping else 0)
        assert fused == expected, kernel


def test_the_object_needs_only_the_stable_interface(compiled: list[Path]) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is missing")
    for made in compiled:
        symbols = demangled(nm, "--undefined-only", made)
        assert " w aoti_torch_get_current_cuda_stream" in symbols
        assert not re.findall(r" U (?:c10|at|torch::jit|caffe2)::.*", symbols)
