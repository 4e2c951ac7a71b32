"""A pruner's state on one number of ranks goes on on another, bit for bit; a step that is none changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, digest, inject, masks, sharded, whole
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from pins_ext import PruneConfig, Pruner
from pins_ext.distributed.shards import like, local, shard_of

HALF = STEPS // 2 + 1


def half(how: str, folder: Path, resumed: bool) -> dict[str, Any]:
    """The first half of training and its checkpoint, or the second half from it."""
    model = sharded(how)
    # Without moments: their checkpoints are torch's matter.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, foreach=False)
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    if resumed:
        pruner.load(folder / "pruner.safetensors")
        for name, full in torch.load(folder / "model.pt", weights_only=True).items():
            p = dict(model.named_parameters())[name]
            shard = shard_of(name, p)
            begin = shard.start if shard is not None else (0,) * p.dim()
            box = tuple(slice(s, s + n) for s, n in zip(begin, local(p).shape, strict=True))
            p.data.copy_(like(p, full[box].contiguous()))
    for step in range(HALF, STEPS) if resumed else range(HALF):
        inject(model, step)
        optimizer.step()
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    if not resumed:
        pruner.save(folder / "pruner.safetensors")
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(weights, folder / "model.pt")
        if dist.is_initialized():
            dist.barrier()
    return {"masks": masks(pruner), "weights": digest(weights.values()), "zeros": pruner.finalize()["zeros"]}


def rehearsed() -> list[str]:
    """What is wrong after the optimizer was asked for its state before the first step."""
    wrong = []
    for name in ("PinsAdamW", "AdamW"):
        model = sharded("rows")
        optimizer = OPTIMIZERS[name](model.parameters())
        pruner = Pruner(model, optimizer, PruneConfig(**(CONFIG | {"warmup": 0, "delta_t": 1})), STEPS)
        before = digest(whole(p) for p in model.parameters())
        get_optimizer_state_dict(model, optimizer)
        if pruner.step or digest(whole(p) for p in model.parameters()) != before or bool(pruner.importance.seen):
            wrong.append(name)
        inject(model, 0)
        optimizer.step()
        if pruner.step != 1:
            wrong.append(f"{name} does not count")
        if name == "PinsAdamW" and {state["step"] for state in optimizer.state.values()} != {1.0}:
            wrong.append("the step that was none is counted")
    return wrong


@pytest.mark.parametrize(
    ("before", "how", "after", "then"),
    [pytest.param(4, "both", 2, "rows", marks=pytest.mark.slow), (1, "whole", 2, "parallel")],
)
def test_training_goes_on_on_other_ranks(before: int, how: str, after: int, then: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    half("whole", tmp_path / "whole", False)
    unbroken = half("whole", tmp_path / "whole", True)
    first = [half(how, tmp_path, False)] if before == 1 else run(before, half, how, tmp_path, False)
    assert len({str(told) for told in first}) == 1
    for told in run(after, half, then, tmp_path, True):
        assert told == unbroken


def test_a_state_before_the_first_step_changes_nothing() -> None:
    assert run(2, rehearsed) == [[], []]
