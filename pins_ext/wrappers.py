"""What other libraries put around a model or an optimizer, and the way through it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile wrappers."""
    while isinstance(inner := getattr(model, "_orig_mod", None) or _inside_ddp(model), nn.Module):
        model = inner
    return model


def _inside_ddp(model: nn.Module) -> Any:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile, activation checkpointing and peft's adapters put into it."""
    for added in ("_orig_mod.", "_checkpoint_wrapped_module.", "base_model.model.", "base_layer."):
        name = name.replace(added, "")
    return name


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """As nn.Module's, under plain names."""
    for name, p in model.named_parameters(remove_duplicate=remove_duplicate):
        yield plain_name(name), p


def unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer, which has the hooks, inside wrappers such as accelerate's.

    Raises:
        TypeError: there is none.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"a torch.optim.Optimizer is needed, got {type(optimizer).__name__}")
    return optimizer


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters are DTensors, or flattened by FullyShardedDataParallel."""
    return is_flattened(module) or any(hasattr(p, "placements") for p in module.parameters())


def is_flattened(module: nn.Module) -> bool:
    """Whether FullyShardedDataParallel, the first FSDP, has put the parameters into flat vectors."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in module.modules())
