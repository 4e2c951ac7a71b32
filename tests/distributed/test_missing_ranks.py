"""Gradients that are there on some ranks alone, as of experts: every rank enters the same collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from sharded import CONFIG, STEPS, digest, inject, masks, sharded, whole

from pins_ext import PruneConfig, Pruner
from pins_ext.distributed.shards import local, shard_of
from pins_ext.optim import PinsSGD

OPTIMIZERS: dict[str, Any] = {"PinsSGD": PinsSGD, "SGD": torch.optim.SGD}


def trained(how: str, size: int, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Some tensors have no gradient on one rank in some steps, from the first on; one process has zeros in its rows."""
    model = sharded(how)
    optimizer = OPTIMIZERS[kind](model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, PruneConfig(**(CONFIG | options)), STEPS)
    told: dict[str, Any] = {"masks": []}
    for step in range(STEPS):
        inject(model, step)
        for i, (name, p) in enumerate(model.named_parameters()):
            missing = (i + step) % (size + 1)  # the rank; one number more is none
            assert p.grad is not None
            if how == "whole":
                rows = -(-len(p) // size)
                p.grad[missing * rows : (missing + 1) * rows] = 0
            elif dist.get_rank() == missing:
                assert shard_of(name, p) is not None
                p.grad = None
        optimizer.step()
        told["masks"].append(masks(pruner))
    told["final"] = pruner.finalize()
    told["weights"] = digest(whole(p) for p in model.parameters())
    assert all(local(p).isfinite().all() for p in model.parameters())
    return told


@pytest.mark.parametrize(
    ("size", "kind", "options"),
    [
        (2, "PinsSGD", {}),
        pytest.param(3, "SGD", {"beta2": 0.0}, marks=pytest.mark.slow),
        pytest.param(4, "PinsSGD", {"scope": "layer", "mask_policy": "strict"}, marks=pytest.mark.slow),
    ],
)
def test_a_gradient_that_one_rank_lacks_is_zero_there(size: int, kind: str, options: dict[str, Any]) -> None:
    alone = trained("whole", size, kind, options)
    assert len(set(alone["masks"])) > 4
    for told in run(size, trained, "rows", size, kind, options):
        assert told == alone
