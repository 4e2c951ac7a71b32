"""Bytes that are planned for a rank against bytes that it holds after steps under FSDP 2."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from allocations import allocated, storages
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertForSequenceClassification

from pins_ext import PruneConfig, Pruner
from pins_ext.distributed.select import most_bytes
from pins_ext.distributed.shards import local
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.memory import memory
from pins_ext.pruning.parameters import prunable_parameters

SIZES = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}


def held(size: int, replicas: int) -> tuple[int, int, int]:
    """Bytes that torch holds on this rank after three steps with a mask, and what is planned."""
    shape, config = BertConfig(**SIZES, vocab_size=8000), PruneConfig(warmup=0, cooldown=2, delta_t=1)
    with torch.device("meta"):
        nothing = BertForSequenceClassification(shape)
    gc.collect()
    before = storages()
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(shape)
    dims = (size,) if replicas == 1 else (replicas, size // replicas)
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("shard",) if replicas == 1 else ("replicate", "shard"))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = PinsAdamW(model.parameters())
    pruner = Pruner(model, optimizer, config, total_steps=3)
    tokens = torch.arange(1, 9).reshape(1, 8)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    gc.collect()
    there = sum(n for address, n in storages().items() if before.get(address) != n)
    pruned = prunable_parameters(nothing, config)
    counted = memory(nothing, set(pruned), config, ranks=size, replicas=replicas)
    # Asked for while a mask is chosen, and given back.
    passing = most_bytes(size, [local(p).numel() for p in pruner.parameters], sum(p.numel() for p in pruned.values()))
    return there, counted.total - passing, counted.gradients


@pytest.mark.slow
@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_what_a_rank_holds_is_planned(size: int, replicas: int) -> None:
    told = run(size, held, size, replicas)
    print(told)
    there, planned, _ = max(told)
    assert planned == pytest.approx(there, rel=0.05)


def asked_for(options: dict[str, Any]) -> tuple[int, int]:
    """Bytes that this rank asks for while masks are chosen by several thresholds, and what is planned."""
    size = dist.get_world_size()
    model: Any = nn.Sequential(*(nn.Linear(64, 128, bias=False) for _ in range(40)))
    names = [name for name, _ in model.named_parameters()]
    config = PruneConfig(sparsity=0.5, warmup=0, cooldown=2, delta_t=1, **options)
    planned = memory(model, names, config, ranks=size).selection
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), config, 20)
    for tensors in pruner.importance.tensors().values():
        for t in tensors:
            t.uniform_()
    score, places = pruner.importance.score(), pruner.importance.layout
    # Work lists are there all the time.
    planned -= places.places.nbytes + places.chunks.nbytes
    return allocated(lambda: pruner.masks.choose(score, 0.7)), planned


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"scope": "layer"}, {"min_density": {"*": 0.1}}, {"scope": "layer", "max_density": {"*": 0.9}}],
    ids=str,
)
def test_what_several_thresholds_ask_for_is_planned(options: dict[str, Any]) -> None:
    for asked, planned in run(2, asked_for, options):
        print(f"{asked:,} bytes there, {planned:,} planned")
        assert 0.95 * planned < asked <= 1.05 * planned
