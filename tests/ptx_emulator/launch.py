"""A launch: builds the interpreter, hands it the code, the parameters and the allocations, and says what it found."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from . import names
from .instructions import ROW
from .module import Entry

MACHINE = Path(__file__).parent / "machine"
BUILD = Path(__file__).parents[2] / "build" / "ptx_emulator"

KINDS = [
    "",
    "misaligned access",
    "access outside every registered allocation",
    "shared memory access outside",
    "parameter read outside",
    "read of uninitialised shared memory",
    "race write/write",
    "race read then write",
    "race write then read",
    "deadlock",
    "threads at different barriers",
    "integer division by zero",
    "instruction not implemented for these types",
    "warp-wide instruction names threads that exited",
    "trap",
    "part of a warp at a barrier",
    "step limit",
    "one store instruction, several threads, same byte",
    "shfl reads an inactive lane",
]
"""machine/launch.h Kind."""

FATAL = {
    "misaligned access",
    "access outside every registered allocation",
    "shared memory access outside",
    "parameter read outside",
    "deadlock",
    "instruction not implemented for these types",
    "trap",
    "step limit",
}
MOST_TRACKED = 256 << 20
"""Bytes of memory up to which races are looked for: each has a record of forty."""

_REPORT = np.dtype(
    [(name, "i4") for name in ("kind", "ins", "ins2", "cta", "thread", "cta2", "thread2", "size")]
    + [("address", "u8"), ("count", "u8")]
)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_void_p),
        ("n_ins", ctypes.c_int32),
        ("n_regs", ctypes.c_int32),
        ("consts", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("param_bytes", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("grid", ctypes.c_int32 * 3),
        ("warp_mode", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("order", ctypes.c_void_p),
        ("lo", ctypes.c_void_p),
        ("hi", ctypes.c_void_p),
        ("n_alloc", ctypes.c_int32),
        ("races", ctypes.c_int32),
        ("coverage", ctypes.c_void_p),
        ("max_steps", ctypes.c_uint64),
        ("reports", ctypes.c_void_p),
        ("max_reports", ctypes.c_int32),
        ("n_reports", ctypes.c_int32),
        ("steps", ctypes.c_uint64),
        ("lane_steps", ctypes.c_uint64),
    )


class LaunchError(RuntimeError):
    """What a GPU would answer with an error, or not at all."""


@dataclass(frozen=True)
class Finding:
    """Something wrong in a launch. text: where, in PTX and in the source; count: how often."""

    kind: str
    text: str
    count: int


@dataclass(frozen=True)
class Result:
    """steps: instructions of a group of threads; thread_steps: of single threads."""

    findings: list[Finding]
    steps: int
    thread_steps: int


def built(name: str, sources: Iterable[Path], command: Sequence[str | Path], cwd: Path | None = None) -> Path:
    """The file that `command` makes with "-o FILE" from the sources; kept until one of them changes.

    Of several processes that want it one makes it.
    """
    digest = hashlib.sha256(repr(command).encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    path = BUILD / f"{digest.hexdigest()[:16]}-{name}"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            aside = path.with_name(f"aside-{path.name}")
            subprocess.run([*command, "-o", aside], check=True, cwd=cwd)
            aside.replace(path)
    return path


@cache
def _library() -> ctypes.CDLL:
    BUILD.mkdir(parents=True, exist_ok=True)
    header = BUILD / "names.h"
    if not header.exists() or header.read_text() != names.header():
        header.write_text(names.header())
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-shared", "-fPIC"]
    command = ["g++", *flags, f"-I{BUILD}", MACHINE / "emulate.cpp"]
    library = ctypes.CDLL(str(built("emulate.so", [*MACHINE.iterdir(), header], command)))
    sizes = tuple(map(library.sizes, range(3)))
    assert sizes == (ROW.itemsize, _REPORT.itemsize, ctypes.sizeof(_Launch)), sizes
    return library


def merged(ranges: Iterable[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of allocations, sorted; overlapping ones are joined, touching ones are not."""
    out: list[list[int]] = []
    for lo, hi in sorted({r for r in ranges if r[1] > r[0]}):
        if out and lo < out[-1][1]:
            out[-1][1] = max(out[-1][1], hi)
        else:
            out.append([lo, hi])
    table = np.array(out, dtype=np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])


def launch(
    entry: Entry,
    parameters: bytes,
    grid: Sequence[int],
    threads: int,
    dynamic_shared: int,
    ranges: Iterable[tuple[int, int]],
    *,
    order: np.ndarray | None = None,
    random_turns: bool = False,
    seed: int = 0,
    max_steps: int = 50_000_000,
    coverage: np.ndarray | None = None,
) -> Result:
    """Run a kernel.

    Args:
        entry: the kernel.
        parameters: their bytes.
        grid: blocks in each dimension.
        threads: of a block.
        dynamic_shared: bytes of shared memory that the launch asks for.
        ranges: start and end of all memory that it may touch.
        order: of the blocks, int64; None: in turn.
        random_turns: warps one at a time, in random turns, instead of the whole block.
        seed: of the turns.
        max_steps: of a block.
        coverage: uint64, one per instruction; how many threads executed it is added.

    Raises:
        LaunchError: a launch that CUDA would refuse. What happens inside is in the result.
    """
    if len(parameters) != entry.parameter_bytes:
        raise LaunchError(
            f"{entry.name}: {len(parameters)} bytes of parameters, the kernel wants {entry.parameter_bytes}"
        )
    if any(n < 1 for n in grid) or grid[0] > 2**31 - 1 or max(grid[1:], default=1) > 65535:
        raise LaunchError(f"{entry.name}: grid {tuple(grid)} is not one that CUDA launches")
    if threads > (entry.threads or 1024):
        raise LaunchError(f"{entry.name}: {threads} threads, compiled for {entry.threads}")
    lo, hi = merged(ranges)
    code, constants = np.ascontiguousarray(entry.code), np.array(entry.constants or [0], dtype=np.uint64)
    blob = np.frombuffer(parameters or b"\0", dtype=np.uint8).copy()
    coverage = np.zeros(len(code), dtype=np.uint64) if coverage is None else coverage
    reports = np.zeros(64, _REPORT)
    shared = entry.static_shared if entry.extern_shared is None else entry.extern_shared + dynamic_shared
    c = _Launch(
        code=code.ctypes.data,
        n_ins=len(code),
        n_regs=entry.registers,
        consts=constants.ctypes.data,
        params=blob.ctypes.data,
        param_bytes=len(parameters),
        threads=threads,
        shared_bytes=shared,
        grid=(ctypes.c_int32 * 3)(*grid, *[1] * (3 - len(grid))),
        warp_mode=int(random_turns),
        seed=seed,
        order=None if order is None else order.ctypes.data,
        lo=lo.ctypes.data,
        hi=hi.ctypes.data,
        n_alloc=len(lo),
        races=int((hi - lo).sum()) <= MOST_TRACKED,
        coverage=coverage.ctypes.data,
        max_steps=max_steps,
        reports=reports.ctypes.data,
        max_reports=len(reports),
    )
    _library().emulate(ctypes.byref(c))
    return Result([_finding(entry, r) for r in reports[: c.n_reports]], c.steps, c.lane_steps)


def _finding(entry: Entry, report: np.void) -> Finding:
    def at(i: int) -> str:
        line, text = entry.lines[i]
        return f"ptx line {line} `{text}` [{entry.where[i]}]"

    kind = KINDS[report["kind"]]
    text = (
        f"{kind} in {entry.name} ({entry.target}): {at(report['ins'])}, block {report['cta']} "
        f"thread {report['thread']}, address {int(report['address']):#x} size {report['size']}, {report['count']} times"
    )
    if report["ins2"] >= 0:
        text += f"; against {at(report['ins2'])} of block {report['cta2']} thread {report['thread2']}"
    return Finding(kind, text, int(report["count"]))
