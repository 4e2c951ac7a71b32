"""One small model cut over ranks in every way, stepped with the same full gradients: digests of masks and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from models import Network
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from pins_ext import PruneConfig, Pruner
from pins_ext.distributed.shards import like, local, shard_of
from pins_ext.optim import PinsAdamW, PinsSGD

STEPS = 24
CONFIG: dict[str, Any] = {"sparsity": 0.7, "delta_t": 3, "warmup": 3, "cooldown": 6}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "PinsAdamW": partial(PinsAdamW, lr=1e-2),
    "PinsSGD": partial(PinsSGD, lr=1e-2, momentum=0.9),
    # Of torch's own, the two whose arithmetic does not depend on where a vector ends.
    "AdamW": partial(torch.optim.AdamW, lr=1e-2, foreach=False),
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, foreach=False),
}

_PARALLEL = {
    "attention.self": ColwiseParallel, "attention.output.dense": RowwiseParallel,
    "intermediate.dense": ColwiseParallel, "output.dense": RowwiseParallel,
}  # fmt: skip


def sharded(how: str, width: int = 13) -> nn.Module:
    """The model, cut: whole | rows (FSDP2) | columns | hybrid (HSDP) | parallel (tensor parallel) | both."""
    model = Network(width)
    if how == "whole":
        return model
    size = dist.get_world_size()
    if how in ("parallel", "both"):
        columns = size if how == "parallel" else 2
        mesh = init_device_mesh("cpu", (size // columns, columns), mesh_dim_names=("dp", "tp"))
        for layer in model.layers:
            parallelize_module(layer, mesh["tp"], {name: style() for name, style in _PARALLEL.items()})
        if how == "parallel":
            return model
        fsdp = {"mesh": mesh["dp"]}
    elif how == "hybrid":
        fsdp = {"mesh": init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))}
    else:
        fsdp = {"mesh": init_device_mesh("cpu", (size,))}
    if how == "columns":
        fsdp["shard_placement_fn"] = lambda p: Shard(p.dim() - 1 if p.shape[-1] % size == 0 else 0)  # type: ignore[assignment]
    for layer in model.layers:
        fully_shard(layer, **fsdp)  # type: ignore[arg-type]
    return fully_shard(model, **fsdp)  # type: ignore[arg-type]


def inject(model: nn.Module, step: int) -> None:
    """Full gradients of this step, the same however many ranks there are."""
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        full = torch.randn(p.shape, generator=generator) * 1e-2
        shard = shard_of(name, p)
        if shard is not None:
            box = tuple(slice(s, s + n) for s, n in zip(shard.start, local(p).shape, strict=True))
            full = like(p, full[box].contiguous())
        p.grad = full


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def digest(tensors: Iterable[Tensor]) -> str:
    """One for all of them."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def masks(pruner: Pruner) -> str:
    """A digest of all masks."""
    return digest(whole(pruner.mask(name)) for name in pruner.names)


def pruned(how: str, optimizer_name: str, options: dict[str, Any], width: int = 13) -> dict[str, Any]:
    """Train and tell: a digest of the masks after every step and of the weights at the end, what finalize returns."""
    model = sharded(how, width)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**(CONFIG | options)), STEPS)
    told: dict[str, Any] = {"masks": []}
    for step in range(STEPS):
        inject(model, step)
        optimizer.step()
        told["masks"].append(masks(pruner))
        if step == STEPS // 2:
            stats = pruner.stats()
            told["stats"] = {name: stats[name] for name in ("sparsity", "threshold", "churn", "nan", "per_layer")}
        if step == STEPS // 2 + 1:  # between two masks
            with pruner.masked_view():
                told["view"] = digest(whole(p) for p in model.parameters())
    told["final"] = pruner.finalize()
    told["masks"].append(masks(pruner))
    told["weights"] = digest(whole(p) for p in model.parameters())
    told["placements"] = sorted({str(getattr(p, "placements", None)) for p in pruner.parameters})
    return told
