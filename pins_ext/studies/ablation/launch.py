"""Running the cells one after another, each in a process of its own.

A process of its own makes its peak memory that of one run, keeps a cell that is killed for memory from taking the
others with it, and costs the seconds that the imports take. Linux lets a new process start from the peak of the one
that started it; this one has imported less than any cell does and trains nothing, so that bound is never reached.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from pins_ext.runs.errors import EXIT_OK, StoppedError
from pins_ext.runs.signals import handled
from pins_ext.studies.ablation.cells import Cell

_ERROR = "pins-ext train: "
"""How the command's error begins, the last line of a cell that failed."""
_ENDED = "ended by "


def run_cells(cells: Sequence[Cell], console: Console, overwrite: bool) -> list[Cell]:
    """Run every cell that has no result yet; one that fails does not stop the others.

    Args:
        overwrite: run those that have a result too.

    Returns:
        The cells that failed; their logs say why.

    Raises:
        StoppedError: by a signal. The cell under way has saved a checkpoint, if it had begun to train.
    """
    todo = [cell for cell in cells if overwrite or cell.record() is None]
    if len(todo) < len(cells):
        console.print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished already")
    failed: list[Cell] = []
    begin = time.perf_counter()
    for i, cell in enumerate(todo):
        where = f"cell {i + 1} of {len(todo)}  {cell.name}"
        console.print(where, soft_wrap=True, markup=False)
        began = time.perf_counter()
        try:
            succeeded = _run(cell, console, overwrite, where)
        except StoppedError as stop:
            again = "without --overwrite the same command" if overwrite else "the same command"
            done = f"{i} of {len(todo)} cells done: {again} goes on from there"
            raise StoppedError(f"{stop}; {done}", stop.signal) from stop
        if not succeeded:
            failed.append(cell)
        elapsed = time.perf_counter() - begin
        rest = elapsed / (i + 1) * (len(todo) - i - 1)
        outcome = "done" if succeeded else f"FAILED: {failure(cell)}"
        console.print(
            f"  {outcome}, {_clock(time.perf_counter() - began)}; elapsed {_clock(elapsed)}, about {_clock(rest)} left",
            soft_wrap=True,
            markup=False,
        )
    return failed


def failure(cell: Cell) -> str:
    """Why a cell has no result, as its log ends."""
    if not cell.log.is_file():
        return "not run"
    lines = [line.strip() for line in cell.log.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = [line for line in lines if line] or ["nothing printed yet"]
    if said[-1].startswith((_ERROR, _ENDED)):
        return said[-1].removeprefix(_ERROR)
    return f"not finished: {said[-1]}"


def _run(cell: Cell, console: Console, overwrite: bool, where: str) -> bool:
    """Run one cell; returns whether its result is there."""
    how = ["--resume"] if cell.interrupted and not overwrite else ["--overwrite"] if overwrite else []
    arguments = ["train", *cell.flags, "--output-dir", str(cell.folder), *how]
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    shown = console.status(escape(where)) if console.is_terminal else nullcontext()
    with shown as status, cell.log.open("w", encoding="utf-8") as log:
        code = in_process_of_its_own(arguments, log, _live(status, where))
        if code < 0:
            print(f"{_ENDED}{signal.Signals(-code).name}", file=log)
    return code == EXIT_OK and cell.record() is not None


def _live(status: Status | None, where: str) -> Callable[[str], None]:
    def show(line: str) -> None:
        if status is not None and "  step " in line:
            status.update(escape(f"{where}  step {line.partition('  step ')[2].strip()}"))

    return show


def in_process_of_its_own(arguments: Sequence[str], log: IO[str], show: Callable[[str], None]) -> int:
    """Run `pins-ext` with these arguments in a new process.

    Args:
        log: where to write what it prints.
        show: called with each line.

    Returns:
        Its exit code; that of a process ended by a signal is negative.

    Raises:
        StoppedError: by a signal, which the process was handed and has dealt with.
    """
    # Its own session, so that Ctrl-C reaches it once, from here, and not a second time from the terminal. The working
    # directory stays off its path: it may hold a checkout without the compiled module.
    process = subprocess.Popen(
        [sys.executable, "-m", "pins_ext", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"},
    )
    with _forwarding(process) as received:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            show(line)
        code = process.wait()
    if received:
        raise StoppedError("stopped", received[0])
    return code


@contextmanager
def _forwarding(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Hand signals on to the process and go on waiting for it; yields those that came."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if not received:
            print("\nstopping the cell under way after its step; once more to stop it at once", file=sys.stderr)
        received.append(number)
        process.send_signal(number)

    with handled(forward):
        yield received


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
