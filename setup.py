"""Builds `pins_ext._C`: every compiled kernel in one stable-ABI module (Python >= 3.10, torch >= 2.10).

Install with `pip install --no-build-isolation .`: the module is compiled against the torch that is installed.

Environment:
    PINS_EXT_CUDA: auto (default) compiles csrc/cuda where nvcc is found, also with a CPU-only torch and without a GPU;
        1 requires it; 0 leaves it out.
    CUDA_HOME: the CUDA toolkit; otherwise /usr/local/cuda, otherwise the one of the nvcc in PATH.
    TORCH_CUDA_ARCH_LIST: GPU architectures, by default "8.0;9.0+PTX".
    MAX_JOBS: number of compilers at once.
"""

import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup

try:
    from torch.utils import cpp_extension
except ImportError as error:
    message = "pins_ext compiles against the installed torch: install torch >= 2.10, then use --no-build-isolation"
    raise SystemExit(message) from error

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
    for home in candidates:
        if (home / "bin" / "nvcc").exists() and list(home.glob("lib*/libcudart_static.a")):
            return home
    if wish == "1":
        raise SystemExit(f"PINS_EXT_CUDA=1, but there is no CUDA toolkit in {', '.join(map(str, candidates))}")
    return None


def architectures() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST. Given here, torch adds none of its own."""
    flags = []
    for name in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX").replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}", *([f"compute_{number}"] if name.endswith("+PTX") else [])]
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def extension() -> cpp_extension.CppExtension:
    sources = ["csrc/ops.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
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
        depends=[str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inl", ".cuh")],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, TORCH_TARGET, f"-ffile-prefix-map={ROOT}/="],
            "nvcc": [*NVCC_FLAGS, *architectures(), TORCH_TARGET, "-Xcompiler", f"-ffile-prefix-map={ROOT}/="],
        },
        extra_link_args=link,
        py_limited_api=True,
    )


class BuildExtension(cpp_extension.BuildExtension):
    """Keeps its object files, so that ninja compiles only what changed, also in an editable install."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")


setup(
    packages=[*find_packages(include=["pins_ext", "pins_ext.*"]), "pins_ext.triton_kernels", "pins_ext.bench"],
    # A top-level `triton_kernels` would shadow Triton's own package of that name.
    package_dir={"pins_ext.triton_kernels": "triton_kernels", "pins_ext.bench": "bench"},
    package_data={"pins_ext": ["py.typed", "**/*.html", "**/*.css", "**/*.js", "**/*.yaml"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
