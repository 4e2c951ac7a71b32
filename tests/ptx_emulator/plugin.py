"""Options of pytest, and the GPU's operators on CPU tensors."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from .session import SESSION


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptx", "GPU code without a GPU")
    group.addoption("--ptx", type=int, choices=(80, 90), help="run tests of GPU code on emulated PTX of sm_80 or sm_90")
    group.addoption("--ptx-orders", type=int, default=0, help="run every launch so many times more, in random orders")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ptx: runs GPU code on emulated PTX (--ptx 80 or 90)")
    config.addinivalue_line("markers", "planted: what the emulator finds is what the test is about")
    if config.option.ptx:
        from . import triton_driver

        triton_driver.install(config.option.ptx)
        SESSION.orders = config.option.ptx_orders


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.ptx:
        for item in items:
            if item.get_closest_marker("ptx"):
                item.add_marker(
                    pytest.mark.skip(reason="the architecture of emulated PTX is chosen per process: --ptx 90")
                )
        return
    runs = [item for item in items if any(item.get_closest_marker(name) for name in ("ptx", "interpret"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in runs])
    items[:] = runs
    from . import triton_driver

    triton_driver.follow_pointer_tables()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test fails, too, by what the emulator found while it ran; `planted` tests are about that and ask themselves."""
    SESSION.test, seen = item.nodeid, len(SESSION.findings)
    yield
    found = Counter(text for _, text in SESSION.findings[seen:])
    if found and not item.get_closest_marker("planted"):
        lines = "\n".join(f"{n}x {text}" for text, n in found.most_common(5))
        pytest.fail(f"the emulator found:\n{lines}", pytrace=False)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.option.ptx and (config.option.verbose > 0 or config.option.ptx_orders):
        for line in SESSION.summary():
            terminalreporter.write_line(f"ptx: {line}")


@contextmanager
def on_emulated_gpu(
    config: pytest.Config, programs: int = 3, around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f
) -> Iterator[None]:
    """The CPU's operators are those of the GPU while this lasts: Triton's and those of csrc/cuda.

    Args:
        programs: of a launch that would get as many as fit a GPU.
        around: wraps the launchers of Triton's kernels.
    """
    from pins_ext import triton_kernels

    from . import cuda_kernels, triton_driver

    library = torch.library.Library("pins_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for op in triton_kernels.LAUNCHERS:
            library.impl(op, around(triton_kernels.launcher(op)), "CPU", allow_override=True)
        cuda_kernels.CudaKernels(config.option.ptx).register(library)
    try:
        with triton_driver.programs(programs):
            yield
    finally:
        library._destroy()
