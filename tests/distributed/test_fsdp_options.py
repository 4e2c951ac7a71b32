"""What users set beside FSDP 2: mixed precision, offloading, checkpointed or compiled blocks, accumulated gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Block, Network, batches
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, digest, masks, whole
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from pins_ext import PruneConfig, Pruner
from pins_ext.distributed.shards import forget_gathered

pytestmark = pytest.mark.slow

WAYS: dict[str, dict[str, Any]] = {
    "mixed precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "offloaded to the CPU": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "gathered until backward": {"reshard_after_forward": False},
    "bfloat16 weights": {},
    "checkpointed": {},
    "compiled": {},
    "compiled in place": {},
    "accumulated": {},
    "accumulated apart": {},
    "other data": {},
}


def prepared(way: str, ranks: bool) -> Any:
    model: Any = Network(16)
    if way == "bfloat16 weights":
        model = model.bfloat16()
    if way == "checkpointed":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    if way == "compiled":
        model.layers = nn.ModuleList(torch.compile(layer, backend="aot_eager") for layer in model.layers)  # type: ignore[misc]
    if way == "compiled in place":
        for layer in model.layers:
            layer.compile(backend="aot_eager")
    if ranks:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, **WAYS[way])
        fully_shard(model, mesh=mesh, **WAYS[way])
    return model


def answer(model: nn.Module, x: Tensor, way: str, ranks: bool) -> Tensor:
    """The logits; mixed precision without ranks is a cast of the weights and of the inputs."""
    if way == "mixed precision" and not ranks:
        narrow = {name: p.bfloat16() for name, p in model.named_parameters()}
        return torch.func.functional_call(model, narrow, (x.bfloat16(),)).float()
    return model(x.bfloat16() if way == "bfloat16 weights" else x).float()


def trained(way: str, optimizer_name: str, ranks: bool) -> dict[str, Any]:
    model = prepared(way, ranks)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    parts = 2 if way.startswith("accumulated") else 1
    seed = 1 + dist.get_rank() if way == "other data" and ranks else 1
    told: dict[str, Any] = {"masks": []}
    for place, (x, labels) in enumerate(batches(parts * STEPS, seed)):
        ends = place % parts == parts - 1
        if way == "accumulated apart" and ranks:
            model.set_requires_gradient_sync(ends)
        if way == "other data" and place == STEPS - 1 and ranks:
            # As a last batch is: two examples on the first rank, five on the second.
            few = 2 + 3 * dist.get_rank()
            x, labels = x[:few], labels[:few]
        (nn.functional.cross_entropy(answer(model, x, way, ranks), labels) / parts).backward()
        if ends:
            optimizer.step()
            optimizer.zero_grad()
            told["masks"].append(masks(pruner))
    told["final"] = pruner.finalize()
    x, labels = next(batches(1, seed=9))
    with torch.no_grad():
        told["answer"] = answer(model, x, way, ranks).tolist()
    forget_gathered(model)
    return told | {"weights": digest(whole(p).float() for p in model.parameters()), "names": pruner.names}


def several() -> dict[tuple[str, str], dict[str, Any]]:
    return {(way, name): trained(way, name, True) for way in WAYS for name in ("PinsAdamW", "SGD")}


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run(2, several)


@pytest.mark.parametrize(
    ("way", "optimizer"),
    # What torch's SGD makes of 16 bits depends on where a vector ends.
    [
        (way, name)
        for way in WAYS
        for name in ("PinsAdamW", "SGD")
        if way != "other data" and (way, name) != ("bfloat16 weights", "SGD")
    ],
)
def test_masks_and_weights_are_those_of_one_process(
    ranks: list[dict[tuple[str, str], dict[str, Any]]], way: str, optimizer: str
) -> None:
    """Both ranks see the same batches, so that the mean of their gradients is that of one."""
    alone = trained(way, optimizer, False)
    assert len(set(alone["masks"])) > 4
    for told in ranks:
        assert told[way, optimizer] == alone


@pytest.mark.parametrize("optimizer", ["PinsAdamW", "SGD"])
def test_ranks_with_data_of_their_own_have_one_mask(
    ranks: list[dict[tuple[str, str], dict[str, Any]]], optimizer: str
) -> None:
    first, second = (told["other data", optimizer] for told in ranks)
    assert first == second
    assert first["masks"] != ranks[0]["gathered until backward", optimizer]["masks"]
    assert first["final"]["zeros"] == ranks[0]["gathered until backward", optimizer]["final"]["zeros"]
