"""Mixtures of experts of transformers, whose 3-D weights ranks share: masks and weights are those of one process."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, counted_collectives, digest, inject, masks, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from pins_ext import PruneConfig, Pruner
from pins_ext.distributed.shards import is_dtensor, shard_of
from pins_ext.optim import PinsSGD

# Without momentum, which goes on where there is no gradient and stops where it is missing.
PLAIN: dict[str, Any] = {"PinsSGD": PinsSGD, "SGD": torch.optim.SGD}

pytestmark = pytest.mark.slow

_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 1,
    "pad_token_id": 0,
}


def mixture(family: str) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    if family == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES, num_local_experts=4))
    sizes = {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**_SIZES, **sizes))


def cut(family: str, how: str) -> Any:
    """The model: whole | rows, of experts whole ones | columns, a part of every expert | hybrid | experts (see below).

    "experts": whole experts on one dimension of the mesh, each cut by rows along the other; all else over all ranks.
    """
    model = mixture(family)
    if how == "whole":
        return model
    size, options = dist.get_world_size(), dict[str, Any]()
    if how in ("hybrid", "experts"):
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "ep"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    if how == "columns":
        options["shard_placement_fn"] = lambda p: Shard(1) if p.dim() == 3 else Shard(0)
    everyone = mesh["dp", "ep"]._flatten("all") if how == "experts" else mesh
    for layer in model.model.layers:
        if how == "experts":
            experts = layer.mlp.experts
            for name, p in list(experts.named_parameters()):
                setattr(experts, name, nn.Parameter(distribute_tensor(p.detach(), mesh["ep"], [Shard(0)])))
            fully_shard(experts, mesh=mesh["dp"], shard_placement_fn=lambda p: Shard(1))
        fully_shard(layer, mesh=everyone, **options)
    return fully_shard(model, mesh=everyone, **options)


def lose(model: nn.Module, step: int, size: int) -> None:
    """In turn no gradient is missing, those of all experts are, and those of the experts of one rank, cut by rows."""
    for name, p in model.named_parameters():
        if ".experts." not in name:
            continue
        assert p.dim() == 3
        assert p.grad is not None
        if step % 3 == 1:
            p.grad = None
        elif step % 3 == 2:
            rank, rows = step % size, -(-len(p) // size)
            if not is_dtensor(p):
                p.grad[rank * rows : (rank + 1) * rows] = 0
            elif dist.get_rank() == rank:
                shard = shard_of(name, p)
                assert shard is not None
                assert shard.start == (min(rank * rows, len(p)), 0, 0)
                p.grad = None


def pruned(family: str, how: str, optimizer_name: str, size: int, learns: bool, loses: bool) -> dict[str, Any]:
    """Train, on the same few tokens everywhere, or by injected gradients."""
    model = cut(family, how)
    parameters = model.parameters()
    optimizer = PLAIN[optimizer_name](parameters, lr=1e-2) if loses else OPTIMIZERS[optimizer_name](parameters)
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    experts = [name for name in pruner.names if ".experts." in name]
    assert len(experts) == 4
    told: dict[str, Any] = {"masks": [], "idle": 0}
    sent: list[Counter[str]] = []
    for step in range(STEPS):
        if learns:
            tokens = torch.randint(1, 32, (1, 3), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            # Experts to which no token went.
            idle = [(whole(dict(model.named_parameters())[name].grad).flatten(1) == 0).all(1) for name in experts]
            told["idle"] += int(torch.stack(idle).sum())
        else:
            inject(model, step)
        if loses:
            lose(model, step, size)
        with counted_collectives() as counts:
            optimizer.step()
        sent.append(counts)
        told["masks"].append(masks(pruner))
    if how != "whole":
        selections = [counts for counts in sent[1:] if counts["all_gather"]]
        # For all meshes together; an all-reduce more where the threshold has left its bracket.
        assert len(selections) >= 4
        assert all(counts["all_gather"] == 1 and counts["all_reduce"] <= 2 for counts in selections[1:])
    told["final"] = pruner.finalize()
    told["kept"] = {name: int(whole(pruner.mask(name)).sum()) for name in experts}
    told["weights"] = digest(whole(p) for p in model.parameters())
    return told


def several(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [pruned(*case) for case in cases]


def agree(size: int, *cases: tuple[Any, ...]) -> None:
    told = run(size, several, list(cases))
    for i, (family, _, *rest) in enumerate(cases):
        alone = pruned(family, "whole", *rest)
        assert len(set(alone["masks"])) >= 4
        assert sum(alone["kept"].values()) > 0
        if rest[2]:
            assert alone["idle"] > STEPS
        for rank in told:
            assert rank[i] == alone, cases[i]


def test_experts_on_two_ranks() -> None:
    agree(
        2,
        ("mixtral", "rows", "PinsSGD", 2, True, True),
        ("mixtral", "rows", "PinsAdamW", 2, True, False),
        ("mixtral", "columns", "PinsAdamW", 2, True, False),
        ("qwen", "rows", "SGD", 2, True, True),
        ("qwen", "columns", "PinsSGD", 2, True, False),
    )


def test_a_rank_without_any_expert() -> None:
    """Four of them over three ranks."""
    agree(3, ("mixtral", "rows", "PinsSGD", 3, False, True), ("qwen", "rows", "SGD", 3, False, True))


def test_experts_on_a_mesh_of_their_own() -> None:
    agree(
        4,
        ("mixtral", "hybrid", "PinsAdamW", 4, True, False),
        ("mixtral", "experts", "PinsAdamW", 4, False, False),
        ("qwen", "experts", "SGD", 4, False, False),
    )
