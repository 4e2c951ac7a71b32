"""Builds `pins_ext._C`: every compiled kernel in one stable-ABI module (Python >= 3.10, torch >= 2.10).

Install with `pip install --no-build-isolation .`: the module is compiled against the torch that is installed.

Environment:
    PINS_EXT_CUDA: auto (default) compiles csrc/cuda where an nvcc of torch's CUDA is found, also with a CPU-only torch
        and without a GPU; 1 requires it; 0 leaves it out.
    CUDA_HOME: the CUDA toolkit; otherwise /usr/local/cuda, otherwise the one of the nvcc in PATH.
    TORCH_CUDA_ARCH_LIST: GPU architectures, by default "8.0;9.0+PTX".
    MAX_JOBS: number of compilers at once.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from torch.utils import cpp_extension
except ImportError:
    # A source distribution needs no torch, nor do a wheel's metadata.
    cpp_extension = None

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, the oldest torch that one wheel serves

# One rounding per operation, in the written order; denormals are scores like any other. The two -fno-* flags let gcc
# vectorise sqrt and conditional arithmetic and change no result.
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler", "-fvisibility=hidden"]

HEADERS = (".h", ".inl", ".cuh")

# They build, test and write the checkout: no use in a wheel.
CHECKOUT_ONLY = (("pins_ext.bench", "gpu_check"), ("pins_ext.bench", "results_table"))


def cuda_home() -> Path | None:
    """The CUDA toolkit to compile csrc/cuda with, or None to leave it out."""
    wish = os.environ.get("PINS_EXT_CUDA", "auto")
    if wish not in ("auto", "1", "0"):
        raise SystemExit(f"PINS_EXT_CUDA must be auto, 1 or 0, got {wish!r}")
    if wish == "0":
        return None
    if os.environ.get("CUDA_HOME"):
        candidates = [Path(os.environ["CUDA_HOME"])]
    else:
        # The nvcc in PATH may be a wrapper script far from its toolkit: it comes last.
        in_path = shutil.which("nvcc")
        candidates = [Path("/usr/local/cuda"), *([Path(in_path).resolve().parents[1]] if in_path else [])]
    others = []
    for home in candidates:
        if (home / "bin" / "nvcc").exists() and list(home.glob("lib*/libcudart_static.a")):
            if not (other := other_cuda(home)):
                return home
            others.append(other)
    missing = others[0] if others else f"there is no CUDA toolkit in {', '.join(map(str, candidates))}"
    if wish == "1":
        raise SystemExit(f"PINS_EXT_CUDA=1, but {missing}")
    if others:
        print(f"pins_ext: CUDA kernels are left out: {missing}", file=sys.stderr)
    return None


def other_cuda(home: Path) -> str:
    """How a toolkit's CUDA differs from torch's in its first number, with which torch's build refuses; else nothing."""
    import torch

    told = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ((\d+)[.\d]*)", told)
    if not found or not torch.version.cuda or found[2] == torch.version.cuda.split(".")[0]:
        return ""
    said = f"nvcc in {home} is of CUDA {found[1]}, torch of {torch.version.cuda}"
    return f"{said}: name a fitting toolkit in CUDA_HOME"


def architectures() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST. Given here, torch adds none of its own."""
    flags = []
    for name in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX").replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}", *([f"compute_{number}"] if name.endswith("+PTX") else [])]
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def extension() -> Extension:
    sources = [str(path) for folder in ("csrc", "csrc/cpu") for path in sorted(Path(folder).glob("*.cpp"))]
    if cpp_extension is None:
        return Extension("pins_ext._C", sources, py_limited_api=True)
    link = ["-Wl,--exclude-libs,ALL"]
    kernels = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    home = cuda_home()
    if home and kernels:
        sources += kernels
        # CPU torch sets its CUDA_HOME to None. libtorch stays needed for the one symbol that only a CUDA torch has.
        cpp_extension.CUDA_HOME = str(home)
        cudart = next(home.glob("lib*/libcudart_static.a"))
        link += [str(cudart), "-Wl,--no-as-needed", "-ltorch", "-ldl", "-lrt", "-lpthread"]
    return cpp_extension.CppExtension(
        "pins_ext._C",
        sources,
        depends=[str(p) for p in Path("csrc").rglob("*") if p.suffix in HEADERS],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, TORCH_TARGET, f"-ffile-prefix-map={ROOT}/="],
            "nvcc": [*NVCC_FLAGS, *architectures(), TORCH_TARGET, "-Xcompiler", f"-ffile-prefix-map={ROOT}/="],
        },
        extra_link_args=link,
        py_limited_api=True,
    )


def remove_outdated_kernels(objects: Path) -> None:
    """Have kernels compiled anew when a header changed: without a CUDA torch, ninja is not told which they include."""
    import torch

    if torch.version.cuda:
        return
    headers = [p for folder in ("csrc", "csrc/cuda") for p in Path(folder).iterdir() if p.suffix in HEADERS]
    changed = max(p.stat().st_mtime for p in headers)
    for compiled in (objects / "csrc" / "cuda").glob("*.o"):
        if compiled.stat().st_mtime < changed:
            compiled.unlink()


class BuildExtension(build_ext if cpp_extension is None else cpp_extension.BuildExtension):
    """Keeps its object files, so that ninja compiles only what changed, also in an editable install."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")

    def run(self) -> None:
        if cpp_extension is None:
            raise SystemExit(
                "pins_ext compiles against the installed torch: install torch >= 2.10, then use --no-build-isolation"
            )
        # This environment's ninja, also where the environment is not active: two versions of it do not read each
        # other's logs, and each would compile everything anew.
        if (own := Path(sys.executable).parent / "ninja").exists():
            os.environ["PATH"] = f"{own.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        remove_outdated_kernels(Path(self.build_temp))
        super().run()


class BuildPy(build_py):
    """Leaves out what works in a checkout only."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] not in CHECKOUT_ONLY]


setup(
    packages=[*find_packages(include=["pins_ext", "pins_ext.*"]), "pins_ext.triton_kernels", "pins_ext.bench"],
    # A top-level `triton_kernels` would shadow Triton's own package of that name.
    package_dir={"pins_ext.triton_kernels": "triton_kernels", "pins_ext.bench": "bench"},
    package_data={"pins_ext": ["py.typed", "**/*.yaml"]},
    # MANIFEST.in is about the source distribution.
    include_package_data=False,
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
