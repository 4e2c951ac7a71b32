"""Twenty times a random rank is killed at a random moment; the run goes on from its last checkpoint on other ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import threading
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import CONFIG, OPTIMIZERS, STEPS, digest, inject, masks, sharded, whole
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from pins_ext import PruneConfig, Pruner, ShardedState
from pins_ext.pruning import checkpoint

ROUNDS = 20
WAYS = [(2, "rows"), (3, "rows"), (4, "both"), (4, "hybrid"), (2, "parallel"), (2, "columns")]

pytestmark = pytest.mark.slow


def complete(folder: Path) -> list[Path]:
    """Checkpoints in their order; torch writes the file that makes one last."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def train(folder: Path, how: str, dies: tuple[int, int, float] | None) -> None:
    """Go on from the newest checkpoint, a new one every second step, and tell the mask of every step.

    Args:
        folder: of the checkpoints.
        how: how the model is cut.
        dies: the rank, the step, and how many seconds after its beginning.
    """
    model = sharded(how)
    optimizer = OPTIMIZERS["PinsAdamW"](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)

    def everything() -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "pruner": ShardedState(pruner),
        }

    if found := complete(folder):
        state = everything()
        dcp.load(state, checkpoint_id=found[-1])
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    rank = dist.get_rank()
    for step in range(pruner.step, STEPS):
        if dies is not None and (rank, step) == dies[:2]:
            threading.Timer(dies[2], os.kill, (os.getpid(), signal.SIGKILL)).start()
        inject(model, step)
        optimizer.step()
        told = masks(pruner)
        if rank == 0:
            with (folder / "masks.jsonl").open("a") as log:
                log.write(json.dumps([step, told]) + "\n")
        if step % 2:
            dcp.save(everything(), checkpoint_id=folder / f"step-{step:03d}")
            pruner.save(folder / "pruner.safetensors")
    final = {"final": pruner.finalize(), "weights": digest(whole(p) for p in model.parameters())}
    if rank == 0:
        (folder / "final.json").write_text(json.dumps(final))


def survives(size: int, *args: Any) -> bool:
    """Train on so many ranks; when one is gone the rest is stopped, as a launcher does. Returns whether none was."""
    with tempfile.TemporaryDirectory() as store:
        queue = ranks._CONTEXT.SimpleQueue()
        processes = [
            ranks._CONTEXT.Process(target=ranks._rank, args=(rank, size, store, queue, train, args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        waiting = {process.sentinel: process for process in processes}
        while waiting and not any(process.exitcode == -signal.SIGKILL for process in processes):
            for sentinel in wait(list(waiting), timeout=ranks.TIMEOUT):
                waiting.pop(sentinel).join()  # type: ignore[call-overload]
        died = any(process.exitcode == -signal.SIGKILL for process in processes)
        for process in processes:
            process.kill()
            process.join()
        if not died:
            told = [queue.get() for _ in processes]
            assert not any(failed for _, failed, _ in told), told
        return not died


def unbroken() -> tuple[list[str], dict[str, Any]]:
    """Masks after every step of one process, and the end."""
    model = sharded("whole")
    optimizer = OPTIMIZERS["PinsAdamW"](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    told = []
    for step in range(STEPS):
        inject(model, step)
        optimizer.step()
        told.append(masks(pruner))
    return told, {"final": pruner.finalize(), "weights": digest(whole(p) for p in model.parameters())}


def test_whoever_is_killed_no_mask_is_wrong_and_no_file_broken(tmp_path: Path) -> None:
    expected, end = unbroken()
    chance = random.Random(7)
    killed = finished = 0
    while killed < ROUNDS or not finished:
        folder = tmp_path / f"run-{finished}"
        folder.mkdir(exist_ok=True)
        size, how = chance.choice(WAYS)
        begin = int(complete(folder)[-1].name[5:]) + 1 if complete(folder) else 0
        if begin < STEPS:
            dies = (chance.randrange(size), begin + chance.randrange(8), 0.3 * chance.random() ** 2)
            killed += not survives(size, folder, how, dies)
            if (folder / "pruner.safetensors").exists():
                checkpoint.read(folder / "pruner.safetensors")
        else:
            assert survives(size, folder, how, None)
        for line in (folder / "masks.jsonl").read_text().splitlines() if (folder / "masks.jsonl").exists() else []:
            step, told = json.loads(line)
            assert told == expected[step], (killed, size, how, step)
        if (folder / "final.json").exists():
            assert json.loads((folder / "final.json").read_text()) == json.loads(json.dumps(end))
            finished += 1
        print(f"killed {killed}, finished {finished}: {size} {how}, from step {begin}", flush=True)
