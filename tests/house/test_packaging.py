"""What the built module needs and the wheel contains. Reuses the object files of the installed build."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from without import run_without

from pins_ext import _C

ROOT = Path(__file__).parents[2]

# Beside the C shims of torch's stable ABI and Python's: C, C++ and compiler runtimes, which version their symbols, and
# names of the C++ standard library, which torch's own libraries may serve before libstdc++ does.
STABLE = re.compile(r"aoti_torch_\w+|torch_\w+|Py\w+|_?_ITM_\w+|__gmon_start__|_Z(T[TVIS])?N?K?S[tosabid]\w*")
RUNTIME = re.compile(r"\w+@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(kind, name) of each symbol, as nm prints them."""
    lines = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [(line.split()[-2], line.split()[-1]) for line in lines if line.strip()]


def test_the_module_needs_only_stable_symbols() -> None:
    needed = [name for _, name in symbols(Path(_C.__file__), "-D", "--undefined-only")]
    assert any(name.startswith("aoti_torch_") for name in needed)
    assert [name for name in needed if not (STABLE.fullmatch(name) or RUNTIME.fullmatch(name))] == []


def test_the_module_is_for_every_python_and_exports_one_function() -> None:
    path = Path(_C.__file__)
    assert path.name == "_C.abi3.so"
    functions = [name for kind, name in symbols(path, "-D", "--defined-only") if kind == "T"]
    assert functions == ["PyInit__C"]


def test_instruction_set_units_share_nothing() -> None:
    """A weak symbol compiled for AVX-512 could be the one that the linker keeps for everybody."""
    objects = sorted((ROOT / "build" / "objects" / "csrc" / "cpu").glob("isa_*.o"))
    if not objects:
        pytest.skip("the module was not built in this checkout")
    assert len(objects) == 3
    for path in objects:
        shared = [name for kind, name in symbols(path, "--defined-only") if kind not in "tdbr"]
        assert len([name for name in shared if name.endswith("kernelsE")]) == len(shared) <= 1


def test_kernels_are_compiled_anew_when_a_header_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a torch without CUDA, whose builds know of sources alone."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setenv("PINS_EXT_CUDA", "0")
    for folder in ("csrc/cpu", "csrc/cuda", "objects/csrc/cuda"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    header, compiled = tmp_path / "csrc" / "tensors.h", tmp_path / "objects" / "csrc" / "cuda" / "update.o"
    for written, changed in ((compiled, 1), (header, 0)):
        written.touch()
        os.utime(written, (changed, changed))
    setup = runpy.run_path(str(ROOT / "setup.py"))
    setup["remove_outdated_kernels"](tmp_path / "objects")
    assert compiled.exists()
    os.utime(header, (2, 2))
    setup["remove_outdated_kernels"](tmp_path / "objects")
    assert not compiled.exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built aside."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(out), "build", "--build-base", str(out)]
    command += ["bdist_wheel", "--skip-build", "--dist-dir", str(out), "--bdist-dir", str(out / "bdist")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("*.whl")
    assert "-cp310-abi3-" in path.name
    return zipfile.ZipFile(path)


def test_the_wheel_holds_one_module_and_no_foreign_package(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pins_ext"}
    assert [name for name in names if name.endswith(".so")] == ["pins_ext/_C.abi3.so"]
    for name in (
        "pins_ext/ops/select.py",
        "pins_ext/triton_kernels/criterion.py",
        "pins_ext/bench/__init__.py",
        "pins_ext/studies/grids/rte-80.yaml",
    ):
        assert name in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".inl", ".cu"))]
    # They are of use in a checkout alone.
    assert not [name for name in names if re.search(r"gpu_check|results_table|NOTES|bench/results", name)]


def test_the_wheel_says_what_it_needs(wheel: zipfile.ZipFile) -> None:
    (path,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = wheel.read(path).decode()
    assert "Requires-Python: >=3.10" in metadata
    needed = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    core = ["torch>=2.10", 'triton; platform_system == "Linux"', "numpy", "safetensors"]
    assert sorted(name for name in needed if "extra ==" not in name) == sorted(core)
    for line in ("Author: pins_ext contributors", "Provides-Extra: hf", "Provides-Extra: train", "Classifier: Typing"):
        assert line in metadata
    assert {name.lstrip() for name in metadata.splitlines() if name.startswith("Project-URL")}
    (path,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert "pins-ext = pins_ext.cli.main:main" in wheel.read(path).decode()


def test_a_source_distribution_needs_no_torch(tmp_path: Path) -> None:
    code = "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    arguments = ["-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    found = run_without(["torch"], code, *arguments, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/ops.cpp", "csrc/cpu/isa.inl", "triton_kernels/select.py", "pins_ext/py.typed", "setup.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_a_build_without_torch_says_what_to_do(tmp_path: Path) -> None:
    code = "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    found = run_without(["torch"], code, "-q", "build_ext", "--build-lib", str(tmp_path), cwd=ROOT)
    assert found.returncode == 1
    assert "install torch >= 2.10, then use --no-build-isolation" in found.stderr


@pytest.mark.parametrize(("torchs", "wish"), [("12.8", "auto"), ("12.8", "1"), ("13.2", "auto"), (None, "1")])
def test_a_toolkit_of_another_cuda_than_torchs_is_left_out(torchs: str | None, wish: str, tmp_path: Path) -> None:
    """torch's build would end there, in a traceback."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 13.0, V13.0.88"\n')
    nvcc.chmod(0o755)
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    code = f"import runpy, torch; torch.version.cuda = {torchs!r}; "
    code += "print(runpy.run_path('setup.py', run_name='__main__')['cuda_home']())"
    arguments = [sys.executable, "-c", code, "-q", "egg_info", "--egg-base", str(tmp_path)]
    environment = os.environ | {"CUDA_HOME": str(tmp_path), "PINS_EXT_CUDA": wish}
    found = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if torchs != "12.8":
        assert found.stdout.split()[-1] == str(tmp_path)
    elif wish == "auto":
        assert found.stdout.split()[-1] == "None"
        assert "CUDA kernels are left out: nvcc in" in found.stderr
        assert "of CUDA 13.0, torch of 12.8: name a fitting toolkit in CUDA_HOME" in found.stderr
    else:
        assert found.returncode == 1
        assert "PINS_EXT_CUDA=1, but nvcc in" in found.stderr
