"""One small model cut over ranks in every way, stepped with the same full gradients: digests of masks and weights."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

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


def in_8_bits(parameters: Iterable[Any]) -> PinsAdamW:
    """8-bit moments of all but biases, whose few weights are one row that ranks would cut.

    Args:
        parameters: with their names, or without.
    """
    matrices = [given for given in parameters if (given[1] if isinstance(given, tuple) else given).dim() > 1]
    return PinsAdamW(matrices, lr=1e-2, moment_dtype="8bit")


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "PinsAdamW": partial(PinsAdamW, lr=1e-2),
    "PinsAdamW8": in_8_bits,
    "PinsSGD": partial(PinsSGD, lr=1e-2, momentum=0.9),
    # Of torch's own, the two whose arithmetic does not depend on where a vector ends.
    "AdamW": partial(torch.optim.AdamW, lr=1e-2, foreach=False),
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, foreach=False),
}

_PARALLEL = {
    "attention.self": ColwiseParallel, "attention.output.dense": RowwiseParallel,
    "intermediate.dense": ColwiseParallel, "output.dense": RowwiseParallel,
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ColwiseParallel),
    **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel),
}  # fmt: skip


def llama() -> nn.Module:
    """A tiny Llama of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))


def sharded(how: str, width: int | None = 13) -> nn.Module:
    """The model, cut: whole | rows (FSDP2) | columns | hybrid (HSDP) | parallel (tensor parallel) | both.

    Args:
        how: see above.
        width: of the small model; None: a Llama.
    """
    model: Any = Network(width) if width is not None else llama()
    if how == "whole":
        return cast(nn.Module, model)
    layers = model.layers if width is not None else model.model.layers
    size = dist.get_world_size()
    if how in ("parallel", "both"):
        columns = size if how == "parallel" else 2
        mesh = init_device_mesh("cpu", (size // columns, columns), mesh_dim_names=("dp", "tp"))
        for layer in layers:
            known = dict(layer.named_modules())
            plan = {name: style() for name, style in _PARALLEL.items() if name in known}
            parallelize_module(layer, mesh["tp"], plan)
        if how == "parallel":
            return cast(nn.Module, model)
        fsdp = {"mesh": mesh["dp"]}
    elif how == "hybrid":
        fsdp = {"mesh": init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))}
    else:
        fsdp = {"mesh": init_device_mesh("cpu", (size,))}
    if how == "columns":
        fsdp["shard_placement_fn"] = lambda p: Shard(p.dim() - 1 if p.shape[-1] % size == 0 else 0)  # type: ignore[assignment]
    for layer in layers:
        fully_shard(layer, **fsdp)  # type: ignore[arg-type]
    return cast(nn.Module, fully_shard(model, **fsdp))  # type: ignore[arg-type]


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


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """How often each collective is called."""
    counts: Counter[str] = Counter()
    # The last has another name since torch 2.13.
    names = ("all_reduce", "all_gather_into_tensor", "all_gather_single")
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts["all_gather" if "gather" in name else name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


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


def pruned(how: str, optimizer_name: str, options: dict[str, Any], width: int | None = 13) -> dict[str, Any]:
    """Train and tell: a digest of the masks after every step and of the weights at the end, what finalize returns."""
    model = sharded(how, width)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**(CONFIG | options)), STEPS)
    told: dict[str, Any] = {"masks": [], "collectives": []}
    for step in range(STEPS):
        inject(model, step)
        with counted_collectives() as counts:
            optimizer.step()
        told["collectives"].append(dict(counts))
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
