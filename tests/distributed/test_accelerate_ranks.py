"""A loop of one's own with accelerate under FSDP 2: the pruner may be made before `prepare` or after it."""

from __future__ import annotations

import os
from typing import Any

import fsdp_job
import pytest
import torch.distributed as dist
from models import Network, batches
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, digest, masks, whole
from torch import nn

from pins_ext import PruneConfig, Pruner

pytestmark = pytest.mark.slow


def trained(name: str, before: bool) -> dict[str, Any]:
    """Train; several ranks on the same batches.

    Args:
        name: of the optimizer.
        before: whether the pruner is there first.
    """
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    alone = not dist.is_initialized()
    model: Any = Network(16)
    optimizer: Any = OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS) if before or alone else None
    told: dict[str, Any] = {"masks": []}
    if not alone:
        fsdp_job.as_launched()
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        PartialState(cpu=True)
        fsdp_job.talk_into_fsdp()
        blocks = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Block"]}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **blocks)  # type: ignore[arg-type]
        accelerator = Accelerator(fsdp_plugin=plugin, cpu=True)
        assert str(accelerator.distributed_type) == "DistributedType.FSDP"
        model, optimizer = accelerator.prepare(model, optimizer)
    if pruner is None:
        pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    for x, labels in batches(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        told["masks"].append(masks(pruner))
    told["final"] = pruner.finalize()
    cut = {hasattr(p, "placements") for p in pruner.parameters}
    assert cut == {not alone}
    return told | {"weights": digest(whole(p) for p in model.parameters())}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", ["PinsAdamW", "SGD"])
def test_masks_and_weights_are_those_of_one_process(name: str, before: bool) -> None:
    alone = trained(name, before)
    assert len(set(alone["masks"])) > 4
    assert run(2, trained, name, before) == [alone, alone]
