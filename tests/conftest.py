"""Which tests can run here, in which order and where: interpreted in a process of their own, on a GPU with a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

# Threads that spin for work stall one another for seconds when a test run shares its cores. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from file_order import GPU_CODE, LONGEST
from gpus import Gpu

pytest_plugins = ["ptx_emulator.plugin"]

ROOT = Path(__file__).parent
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "hostile rounds (tests/house/test_fuzz.py)")
    group.addoption("--fuzz-seed", type=int, help="repeat the rounds of this seed; a new one by default")
    group.addoption("--fuzz-share", type=float, default=1.0, help="share of the rounds to make")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest files, and skip, visibly, what this process or machine cannot run."""
    order = {str(ROOT / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))
    for item in items:
        of_gpu_code = item.get_closest_marker("interpret") or item.get_closest_marker("ptx")
        if of_gpu_code and not any(item.path.is_relative_to(ROOT / place) for place in GPU_CODE):
            raise pytest.UsageError(f"{item.nodeid} tests GPU code outside {', '.join(GPU_CODE)}: make test misses it")
        if item.get_closest_marker("interpret") and not INTERPRET and not config.option.ptx:
            reason = "Triton's interpreter is chosen per process: TRITON_INTERPRET=1; or --ptx 90 (tests/ptx_emulator)"
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Modules and collected tests stay: no garbage collection walks them again, as the Trainer's of every run would."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A test that sets torch's threads sets them for itself alone: runs are bit-equal for equal counts."""
    count = torch.get_num_threads()
    yield
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpret, id="interpreter"),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the tensors live. On the CPU: the Triton kernels, interpreted or emulated, are its during the test."""
    if request.param == "cuda":
        yield "cuda"
        return
    if request.config.option.ptx:
        from ptx_emulator.plugin import on_emulated_gpu

        with on_emulated_gpu(request.config):
            yield "cpu"
        return
    from triton.runtime import interpreter

    from pins_ext import triton_kernels

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        # Triton 3.6 lets numpy make an int of an array of one element, which numpy 2.4 refuses.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)
    library = torch.library.Library("pins_ext", "IMPL")
    triton_kernels.register(library, "CPU")
    yield "cpu"
    library._destroy()


@pytest.fixture(params=[pytest.param("emulated", marks=pytest.mark.ptx), pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """A GPU, or its operators on CPU tensors."""
    if request.param == "cuda":
        return Gpu("cuda", nullcontext)
    from ptx_emulator.plugin import on_emulated_gpu

    return Gpu("cpu", lambda: on_emulated_gpu(request.config))


@pytest.fixture
def compiled_device(gpu: Gpu) -> Iterator[str]:
    """As `device`, of compiled kernels alone: what the interpreter takes long for, and executed PTX shows as well."""
    with gpu.kernels():
        yield gpu.device


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and labelled files."""
    from classifier import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run of the command that nothing happened to."""
    from classifier import flags

    from pins_ext.cli.main import main

    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert main(["train", *flags(tiny, output), "--test-file", f"{tiny}/test.csv"]) == 0
    return output
