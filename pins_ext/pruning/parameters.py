"""Which parameters are pruned: the linear weights of the transformer blocks, or what the user's patterns name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from pins_ext.distributed.shards import is_dtensor, local
from pins_ext.pruning.config import PruneConfig
from pins_ext.wrappers import is_flattened, named_parameters, plain_name

# Output heads, embeddings and poolers are small, or carry the task; the released code leaves them dense too. Adapters
# are small as well, and what they are merged into has zeros of its own. Routers choose experts: in most models they are
# bare parameters, and where they are linear modules it is no different.
_ADAPTER = "lora_"
_NEVER = ("embed", "pooler", "classifier", "lm_head", "qa_outputs", "score", _ADAPTER, "router", "expert_gate")
_ABOVE = frozenset((*_NEVER, "embedding", "embeddings"))
_RELEASED = ("attention.self", "attention.output.dense", "output.dense", "intermediate.dense")


def prunable_parameters(model: nn.Module, config: PruneConfig, frozen_too: bool = False) -> dict[str, nn.Parameter]:
    """The parameters to prune, by name, in the model's order; each piece of memory once.

    Args:
        model: the model.
        config: which of its parameters.
        frozen_too: also those that don't learn (requires_grad=False).

    Raises:
        ValueError: a model of FSDP 1, a pattern that matches nothing, nothing left to prune, a frozen parameter that
            was asked for, one that a parametrization makes a weight of, parameters of several devices or dtypes, a
            non-contiguous parameter, or two that overlap in memory.
    """
    if is_flattened(model):
        raise ValueError(
            "FullyShardedDataParallel (FSDP 1) makes flat vectors of the weights, in which nothing can be pruned: use "
            "FSDP 2 (torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate's configuration)"
        )
    parameters, names = dict(named_parameters(model)), _all_names(model)
    for pattern in (*config.include, *config.exclude):
        if not any(_matches(known, (pattern,)) for known in names.values()):
            raise ValueError(f"the pattern {pattern!r} matches no parameter; names look like {_examples(parameters)}")
    if config.include:
        chosen = {name for name in parameters if _matches(names[name], config.include)}
        # What a pattern means over a frozen base is the base; its adapters share their layers' names.
        chosen -= {name for name in chosen if frozen_too and _ADAPTER in name}
    elif config.parameter_set == "released":
        chosen = {name for name in parameters if any(part in name for part in _RELEASED)}
    else:
        chosen = set(_default_names(model))
    chosen -= {name for name in parameters if _matches(names[name], config.exclude)}
    # What peft trains a copy of, in its place.
    chosen -= {name for name in chosen if name.startswith(_replaced(model))}
    kept = {name: p for name, p in parameters.items() if name in chosen and p.numel() > 0}
    frozen = [] if frozen_too else [name for name, p in kept.items() if not p.requires_grad]
    kept = {name: p for name, p in kept.items() if name not in frozen}
    if frozen and (config.include or not kept):
        raise ValueError(
            f"{frozen[0]} is to be pruned but frozen (requires_grad=False): its importance cannot be known; "
            f"let it learn, or prune first and train adapters on the pruned model"
        )
    if not kept:
        raise ValueError(f"no prunable parameter: name them with include; names look like {_examples(parameters)}")
    _check_uniform(kept)
    _refuse_parametrized(model, kept)
    return _without_aliases(kept)


def _refuse_parametrized(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Of all that weights are computed from, only that of weight_norm has their zeros."""
    names = {id(p): name for name, p in parameters.items()}
    for module in model.modules():
        if isinstance(module, ParametrizationList):
            kinds = [type(each).__name__ for each in module]
            found = [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names]
            if found and kinds != ["_WeightNorm"]:
                raise ValueError(
                    f"{found[0]} is no weight but what {', '.join(kinds)} computes one from, whose zeros would not "
                    "stay: exclude it, or remove_parametrizations first (torch.nn.utils.parametrize)"
                )


def _replaced(model: nn.Module) -> tuple[str, ...]:
    wrapped = (path for path, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper")
    return tuple(plain_name(f"{path}.original_module.") for path in wrapped)


def _all_names(model: nn.Module) -> dict[str, list[str]]:
    """Every name of each parameter, by its first: tied weights and shared modules give it several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, p in named_parameters(model, remove_duplicate=False):
        names.setdefault(first.setdefault(id(p), name), []).append(name)
    return names


def _default_names(model: nn.Module) -> list[str]:
    """Matrices of linear, Conv1D, attention and experts modules, within module lists where the model has any."""
    found: list[tuple[str, bool]] = []

    def visit(module: nn.Module, path: str, above: str | None) -> None:
        # What a model calls the encoder above its blocks says nothing of them, unless it is a head or embeddings.
        within = path if above is None else path.removeprefix(above)
        if above is not None and not _ABOVE.isdisjoint(above.lower().split(".")):
            return
        for name, p in module.named_parameters(recurse=False):
            if _is_matrix(module, name, p) and not any(part in (within + name).lower() for part in _NEVER):
                found.append((path + name, above is not None))
        for name, child in module.named_children():
            listed = path if above is None and isinstance(module, nn.ModuleList) else above
            visit(child, plain_name(f"{path}{name}."), listed)

    visit(model, "", None)
    blocks_only = any(in_block for _, in_block in found)
    return [plain_name(name) for name, in_block in found if in_block or not blocks_only]


def _is_matrix(module: nn.Module, name: str, p: nn.Parameter) -> bool:
    """Whether it multiplies activations; experts stack their matrices, in three dimensions or on top of each other."""
    kind = type(module).__name__
    if "expert" in kind.lower():
        return p.dim() in (2, 3) and "bias" not in name
    if isinstance(module, nn.MultiheadAttention):
        return p.dim() == 2 and name.endswith("proj_weight")
    return p.dim() == 2 and name == "weight" and (isinstance(module, nn.Linear) or kind == "Conv1D")


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
        if not local(p).is_contiguous():
            raise ValueError(
                f"{name} is not contiguous (strides {tuple(p.stride())}); make it so before you build the optimizer: "
                f"p.data = p.data.contiguous()"
            )


def _without_aliases(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Tied weights once, under their first name; a partial overlap has no defined mask and is refused."""
    dropped: set[str] = set()
    for name, first in overlapping(parameters):
        p, other = parameters[name], parameters[first]
        if (_address(p), p.shape) != (_address(other), other.shape):
            raise ValueError(
                f"{name} and {first} overlap in memory without being the same weights; exclude one of them"
            )
        dropped.add(name)
    return {name: p for name, p in parameters.items() if name not in dropped}


def overlapping(parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Contiguous tensors of one dtype that share memory with an earlier one: their names, and the earlier one's."""
    end, last = 0, ""
    # A DTensor shares nothing with another parameter: what cuts the model copies.
    plain = {name: p for name, p in parameters.items() if not is_dtensor(p)}
    places = {name: _address(p) for name, p in plain.items()}
    for name, p in sorted(plain.items(), key=lambda item: places[item[0]]):
        if last and places[name] < end:
            yield name, last
        else:
            end, last = places[name] + p.numel() * p.element_size(), name


def _address(p: Tensor) -> int:
    """Where the memory begins; of a meta tensor, which has none, where it would if each storage had its own."""
    if not p.is_meta:
        return p.data_ptr()
    return (p.untyped_storage()._cdata << 48) + p.storage_offset() * p.element_size()


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether a parameter with these names is meant."""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _examples(names: Iterable[str]) -> str:
    known = list(names)
    shown = [name for name in known if name.endswith("weight")] or known
    return ", ".join(shown[:3]) or "(the model has no parameters)"
