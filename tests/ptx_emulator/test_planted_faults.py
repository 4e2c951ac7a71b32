"""Can the emulator find anything? Kernels with planted faults, and this project's with one barrier taken out."""

# ruff: noqa: N803  (compile-time arguments of kernels are written in capitals)

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from boundary_job import BoundaryJob
from cases import masks_of, tensors
from torch import Tensor

from pins_ext import ops, triton_kernels
from ptx_emulator import module
from ptx_emulator.launch import LaunchError
from ptx_emulator.plugin import on_emulated_gpu
from ptx_emulator.session import SESSION

pytestmark = [pytest.mark.ptx, pytest.mark.planted]


@triton.jit
def _promise_kernel(table_ptr, PROMISE: tl.constexpr):
    p = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    if PROMISE:
        p = tl.multiple_of(p, 16)
    x = tl.load(p + tl.arange(0, 512))
    tl.store(p + tl.arange(0, 512), x + 1)


@triton.jit
def _everyone_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + tl.program_id(0))


@triton.jit
def _neighbour_kernel(x_ptr):
    i = tl.program_id(0)
    tl.store(x_ptr + i, tl.load(x_ptr + i + 1))


@triton.jit
def _divide_kernel(x_ptr):
    tl.store(x_ptr, 7 // tl.load(x_ptr))


@triton.jit
def _maths_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, tl.cumsum(x, 0) + tl.sort(y) * tl.max(x) - tl.sum(y))


def found(f: Callable[[], Any]) -> str:
    """What a launch finds, or dies of."""
    seen = len(SESSION.findings)
    try:
        f()
    except LaunchError as error:
        return str(error)
    return "\n".join(text for _, text in SESSION.findings[seen:])


@pytest.mark.parametrize(
    ("promise", "offset", "length", "expected"),
    [(False, 1, 512, ""), (True, 0, 512, ""), (True, 1, 512, "misaligned"), (False, 0, 511, "outside")],
)
def test_access_through_a_pointer_table(promise: bool, offset: int, length: int, expected: str) -> None:
    storage = torch.zeros(1024)
    first = -storage.data_ptr() // 4 % 4 + offset
    x = storage[first : first + length]
    table = torch.tensor([x.data_ptr()])
    SESSION.remember(table, [x])
    text = found(lambda: _promise_kernel[(1,)](table, PROMISE=promise))
    assert expected in text
    assert bool(text) == bool(expected)


def test_a_tensor_that_no_table_names_is_out_of_reach() -> None:
    x = torch.zeros(512)
    assert "outside" in found(lambda: _promise_kernel[(1,)](torch.tensor([x.data_ptr()]), PROMISE=False))


def test_blocks_that_write_one_place_race() -> None:
    assert "race" in found(lambda: _everyone_kernel[(3,)](torch.zeros(1)))


def test_blocks_that_read_what_another_writes_race() -> None:
    assert "race" in found(lambda: _neighbour_kernel[(3,)](torch.zeros(4)))


def test_division_by_zero() -> None:
    assert "division by zero" in found(lambda: _divide_kernel[(1,)](torch.zeros(1, dtype=torch.int32)))


def test_scan_sort_and_reduction_are_right_and_find_nothing() -> None:
    x, y, out = torch.randint(0, 9, (1024,)), torch.randint(0, 9999, (1024,)), torch.zeros(1024, dtype=torch.int64)
    assert not found(lambda: _maths_kernel[(1,)](x, y, out, N=1024))
    assert torch.equal(out, x.cumsum(0) + y.sort().values * x.max() - y.sum())


# ---- each bar.sync of a kernel removed: what is left is a race, or the barrier was superfluous ----------------------

SIZES = [2100, 600]


def run(op: str, *args: Any, **kwargs: Any) -> Any:
    return triton_kernels.launcher(op)(*args, **kwargs)


def pack() -> list[Tensor]:
    a, b = tensors(SIZES, torch.float32, "ties", 1), tensors(SIZES, torch.float32, "ties", 2)
    layout, (_, masks) = ops.Layout.of(a), masks_of(a)
    stats = torch.zeros(2, 3, dtype=torch.int64)
    run("pack_", masks, stats, a, b, layout.places, layout.chunks, "product", torch.tensor([[0x80000000, 900]]))
    return [*masks, stats]


def tie() -> list[Tensor]:
    a = tensors(SIZES, torch.float32, "ties", 1)
    layout, bracket = ops.Layout.of(a), torch.tensor([0x80000000, 0x80000000, 0, 200, 1])
    return [run("tie_index", a, [], layout.places, layout.chunks, "identity", bracket)]


def fold() -> list[Tensor]:
    m, u, i = (tensors(SIZES, torch.float32, "normal", s) for s in (1, 2, 3))
    layout, counts = ops.Layout.of(m), torch.zeros(1 + ops.BINS, dtype=torch.int64)
    counted = {"bracket": torch.tensor([0x80000000, 0xBE000000, 14, 0, 0]), "counts": counts}
    scalars = (torch.ones(1), torch.tensor([1, 2]), 0.85, 0.95)
    run("fold_", m, u, i, layout.places, layout.chunks, *scalars, **counted)
    return [*m, *u, counts]


BARRIERS = [
    ("pack", "_pack_kernel", pack),
    ("select", "_tie_count_kernel", tie),
    ("select", "_tie_locate_kernel", tie),
    ("importance", "_fold_kernel", fold),
]


@pytest.mark.parametrize(("name", "kernel", "call"), BARRIERS, ids=[kernel for _, kernel, _ in BARRIERS])
def test_most_barriers_are_missed(
    name: str, kernel: str, call: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one of them a launch races, reads rubbish, or ends elsewhere; compilers leave superfluous ones in."""
    caches = getattr(import_module(f"pins_ext.triton_kernels.{name}"), kernel)
    caches.device_caches.clear()
    expected, entries = [x.clone() for x in call()], module.entries
    count = _barriers(caches)
    assert count > 2
    missed = 0
    monkeypatch.setattr(SESSION, "random_turns", True)
    for n in range(count):

        def without(text: str, n: int = n) -> Any:
            if kernel not in text.split(".entry")[1][:60]:
                return entries(text)
            begin, end = [m.span() for m in re.finditer(r"bar\.sync\s+0;", text)][n]
            return entries(text[:begin] + text[end:])

        monkeypatch.setattr(module, "entries", without)
        monkeypatch.setattr(SESSION, "turns", n)
        caches.device_caches.clear()
        results: list[Tensor] = []
        text = found(lambda results=results: results.extend(call()))
        wrong = bool(results) and any(not torch.equal(x, y) for x, y in zip(results, expected, strict=True))
        missed += bool(text) or wrong
    monkeypatch.undo()
    caches.device_caches.clear()
    assert missed >= 0.75 * count, f"{missed} of {count}"


def _barriers(kernel: Any) -> int:
    """bar.sync in the PTX of the one variant that was compiled last."""
    compiled = [c for caches in kernel.device_caches.values() for c in caches[0].values()]
    return len(re.findall(r"bar\.sync\s+0;", compiled[-1].asm["ptx"]))


# ---- what may depend on the order of blocks ------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
def test_another_order_of_blocks_shows_in_the_candidates_alone(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """A boundary's pass appends them as its blocks come; where that is not told, it is found."""
    job, run = BoundaryJob(sizes=[9] * 8, values="equal"), SESSION.run
    monkeypatch.setattr(SESSION, "orders", 2)
    if not told:
        monkeypatch.setattr(SESSION, "run", lambda *launch, free=(): run(*launch))
    with on_emulated_gpu(pytestconfig):
        text = found(lambda: job.call(job.place("cpu")))
    assert ("boundary_kernel" in text) == (not told)
    assert ("another order of blocks leaves other memory" in text) == (not told)
