"""Runs a function in several processes that form one gloo group: what each of them returns."""

from __future__ import annotations

import faulthandler
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

TIMEOUT = 240

# One process imports everything once; each rank is a fork of it, before any thread of torch's has started.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "pins_ext"])


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(*args) on every rank.

    Args:
        size: how many ranks.
        function: of a module that the ranks can import.

    Returns:
        What each rank returned; it must be picklable.
    """
    with tempfile.TemporaryDirectory() as folder:
        queue = _CONTEXT.SimpleQueue()
        processes = [
            _CONTEXT.Process(target=_rank, args=(rank, size, folder, queue, function, args)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            told = _answers(queue, processes)
        finally:
            for process in processes:
                process.join(10)
                if process.is_alive():
                    process.kill()
    failures = [text for _, failed, text in told if failed]
    # What the others say is mostly that the one that failed is gone.
    assert not failures, min(failures, key=lambda text: "Connection closed by peer" in text)
    return [result for _, _, result in sorted(told, key=lambda answer: answer[0])]


def _answers(queue: Any, processes: list[Any]) -> list[tuple[int, bool, Any]]:
    """One of each rank: one that dies without an answer, killed or aborted, gives its exit code."""
    told: list[tuple[int, bool, Any]] = []
    end = time.monotonic() + TIMEOUT
    while len(told) < len(processes):
        answered = {rank for rank, _, _ in told}
        missing = {process.sentinel: rank for rank, process in enumerate(processes) if rank not in answered}
        ready = wait([queue._reader, *missing], max(0.0, end - time.monotonic()))
        if queue._reader in ready:
            told.append(queue.get())
        elif ready:
            rank = missing[ready[0]]
            processes[rank].join()
            told.append((rank, True, f"rank {rank} ended with exit code {processes[rank].exitcode}, without a word"))
        else:
            said = [text for _, failed, text in told if failed]
            raise TimeoutError("\n".join(["the ranks wait for one another, or take too long", *said]))
    return told


def _rank(rank: int, size: int, folder: str, queue: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.enable()  # tells where Python was when a rank is aborted
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        queue.put((rank, False, function(*args)))
    except BaseException:
        # The others wait in a collective for this rank: what it says comes first.
        queue.put((rank, True, f"rank {rank}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()
