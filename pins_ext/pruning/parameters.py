"""Which parameters are pruned: the linear weights of the transformer blocks, or what the user's patterns name."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from pins_ext.pruning.config import PruneConfig
from pins_ext.regularization.teacher import is_sharded

# Output heads, embeddings and poolers are small, or carry the task; the released code leaves them dense too. Adapters
# are small as well, and what they are merged into has zeros of its own.
_NEVER = ("embed", "pooler", "classifier", "lm_head", "qa_outputs", "score", "norm", "lora_")
_RELEASED = ("attention.self", "attention.output.dense", "output.dense", "intermediate.dense")


def prunable_parameters(model: nn.Module, config: PruneConfig) -> dict[str, nn.Parameter]:
    """The parameters to prune, by name, in the model's order; each piece of memory once.

    Raises:
        ValueError: a sharded model (FSDP, DTensor), a pattern that matches nothing, nothing left to prune, a frozen
            parameter that was asked for, parameters of several devices or dtypes, a non-contiguous parameter, or two
            that overlap in memory.
    """
    if is_sharded(model):
        raise ValueError(
            "the model's parameters are sharded (FSDP or DTensor), which a Pruner does not follow yet: train on one "
            "device or with DistributedDataParallel"
        )
    parameters = dict(model.named_parameters())
    for pattern in (*config.include, *config.exclude):
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ValueError(f"the pattern {pattern!r} matches no parameter; names look like {_examples(parameters)}")
    if config.include:
        chosen = {name for name in parameters if _matches(name, config.include)}
        frozen = [name for name in chosen if not parameters[name].requires_grad and not _matches(name, config.exclude)]
        if frozen:
            raise ValueError(
                f"{frozen[0]} is included but frozen (requires_grad=False): its importance cannot be known"
            )
    elif config.parameter_set == "released":
        chosen = {name for name in parameters if any(part in name for part in _RELEASED)}
    else:
        chosen = set(_default_names(model))
    kept = {
        name: p
        for name, p in parameters.items()
        if name in chosen and p.requires_grad and p.numel() > 0 and not _matches(name, config.exclude)
    }
    if not kept:
        raise ValueError(f"no prunable parameter: name them with include; names look like {_examples(parameters)}")
    _check_uniform(kept)
    return _without_aliases(kept)


def _default_names(model: nn.Module) -> list[str]:
    """2-D weights of linear and Conv1D modules and 3-D expert stacks, within module lists where the model has any."""
    found: list[tuple[str, bool]] = []

    def visit(module: nn.Module, path: str, in_block: bool) -> None:
        kind = type(module).__name__
        for name, p in module.named_parameters(recurse=False):
            matrix = p.dim() == 2 and (isinstance(module, nn.Linear) or kind == "Conv1D") and name == "weight"
            experts = p.dim() == 3 and "experts" in kind.lower()
            if (matrix or experts) and not any(part in (path + name).lower() for part in _NEVER):
                found.append((path + name, in_block))
        for name, child in module.named_children():
            visit(child, f"{path}{name}.", in_block or isinstance(module, nn.ModuleList))

    visit(model, "", False)
    blocks_only = any(in_block for _, in_block in found)
    return [name for name, in_block in found if in_block or not blocks_only]


def _check_uniform(parameters: dict[str, nn.Parameter]) -> None:
    (first, like), *_ = parameters.items()
    for name, p in parameters.items():
        if p.device != like.device:
            raise ValueError(
                f"prunable parameters must share one device: {first} is on {like.device}, {name} on {p.device}"
            )
        if p.dtype != like.dtype:
            raise ValueError(f"prunable parameters must share one dtype: {first} is {like.dtype}, {name} is {p.dtype}")
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {p.dtype}; float32, bfloat16 and float16 parameters can be pruned")
        if not p.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous (strides {tuple(p.stride())}); make it so before you build the optimizer: "
                f"p.data = p.data.contiguous()"
            )


def _without_aliases(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Tied weights once, under their first name; a partial overlap has no defined mask and is refused."""
    dropped: set[str] = set()
    last: tuple[int, str] | None = None
    places = {name: _address(p) for name, p in parameters.items()}
    for name, p in sorted(parameters.items(), key=lambda item: places[item[0]]):
        begin, end = places[name], places[name] + p.numel() * p.element_size()
        if last is None or begin >= last[0]:
            last = (end, name)
            continue
        other = parameters[last[1]]
        if (begin, end, p.shape) != (places[last[1]], last[0], other.shape):
            raise ValueError(
                f"{name} and {last[1]} overlap in memory without being the same weights; exclude one of them"
            )
        dropped.add(name)
    return {name: p for name, p in parameters.items() if name not in dropped}


def _address(p: nn.Parameter) -> int:
    """Where the memory begins; of a meta tensor, which has none, where it would if each storage had its own."""
    if not p.is_meta:
        return p.data_ptr()
    return (p.untyped_storage()._cdata << 48) + p.storage_offset() * p.element_size()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _examples(names: Iterable[str]) -> str:
    shown = [name for name in names if name.endswith("weight")][:3]
    return ", ".join(shown) or "(the model has no parameters)"
