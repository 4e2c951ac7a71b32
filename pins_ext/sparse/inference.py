"""Make a pruned model run on what is left of it: its pruned linear layers become sparse ones, where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.contention import Neighbours
from pins_ext.files.atomic import SaveError
from pins_ext.sparse.calibration import Calibration, Trial, measure
from pins_ext.sparse.direct_reads import weights_read
from pins_ext.sparse.encoding import refuse_overflow
from pins_ext.sparse.grouped import VALUES as GPU_VALUES
from pins_ext.sparse.grouped import GroupedLinear
from pins_ext.sparse.linear import VALUES, SparseLinear

TOKENS = {"cpu": (1, 128), "cuda": (1,)}
"""What is measured by default. On a GPU the packed weights are for decoding, a token at a time."""


MEASURED_FROM, FASTER_FROM = 0.3, 0.7
"""Shares of zeros from which on a layer is measured, and from which on one that is not is taken to be faster."""


class NothingSparseError(ValueError):
    """A model without a single layer that has enough zeros."""


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparsify_for_inference(
    model: nn.Module,
    min_sparsity: float | None = None,
    *,
    values: str | None = None,
    tokens: Sequence[int] | None = None,
    calibrate: bool = True,
    say: Callable[[str], None] | None = print,
    save_to: str | Path | None = None,
) -> Any:
    """Replace pruned linear layers (and transformers' Conv1D) by sparse ones for inference, on the CPU or on a GPU.

    The model is changed in place: save it before. A layer is replaced where it has enough zeros and was faster sparse
    in a short measurement on this machine, with the number of threads of this process. Layers that share a weight share
    its packed form, and a layer of several names stays one. On a GPU packed
    weights (see `GroupedLinear`) save memory even where they are no faster: `calibrate=False`.

    Args:
        model: a pruned model, all of it on the CPU or on one GPU; it is set to evaluation mode.
        min_sparsity: share of zeros from which on a layer is considered; None for MEASURED_FROM, or FASTER_FROM where
            nothing is measured.
        values: how the weights are kept: "float32", "bfloat16" or "int8" (which rounds weights and activations: look at
            the accuracy); None for the exact one, bfloat16 where the weights are, otherwise float32. On a GPU
            "float32", "bfloat16" or "float16"; None keeps the weights' own dtype.
        tokens: numbers of tokens (batch × sequence) to measure; the geometric mean over them decides. None for 1
            and 128, on a GPU for 1.
        calibrate: measure; without it every layer with enough zeros becomes sparse.
        say: told what was measured; None for silence.
        save_to: a JSON file for the measurements.

    Returns:
        The model; `model.pins_calibration` holds what was measured (`pins_ext.sparse.calibration.Calibration`).

    Raises:
        ValueError: options out of range, a model on several devices or on another than a CPU or GPU, weights that
            are infinite or NaN where int8 is asked for, or infinite in the values asked for. The model is unchanged.
        NothingSparseError: no layer has enough zeros.
        SaveError: `save_to` can't be written; where its folder is missing, before anything else is done.
    """
    if min_sparsity is None:
        min_sparsity = MEASURED_FROM if calibrate else FASTER_FROM
    if not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity must be between 0 and 1, got {min_sparsity}")
    device = _device(model)
    if tokens is None:
        tokens = TOKENS[device.type]
    if not isinstance(tokens, Sequence) or not tokens or not all(type(n) is int and n > 0 for n in tokens):
        raise ValueError(f"tokens must be positive numbers of tokens, such as (1, 128); got {tokens!r}")
    allowed = VALUES if device.type == "cpu" else GPU_VALUES
    if values is not None and values not in allowed:
        raise ValueError(f"on {device} values must be one of {', '.join(allowed)}; got {values!r}")
    if save_to is not None and not Path(save_to).parent.is_dir():
        raise SaveError(f"could not save {save_to}: there is no folder {Path(save_to).parent}")
    places, dense = candidates(model, min_sparsity)
    if not places:
        raise NothingSparseError(_nothing(model, min_sparsity, dense))
    if values == "int8":
        _refuse_not_finite(model, places)
    elif values is not None:
        for name in places:
            refuse_overflow(name, weight_matrix(model.get_submodule(name)), getattr(torch, values))
    model.eval()
    trials = []
    neighbours = Neighbours(device)
    neighbours.begin()
    for group in groups_of(model, places):
        trial = _tried(model, group, tuple(tokens) if calibrate else (), values)
        if trial is not None:
            trials.append(trial)
        if trial is None or trial.chosen == "sparse":
            for names in by_weight(model, group):
                _replace(model, names, values)
    neighbours.keep()
    calibration = Calibration(_machine(device), tuple(trials), dense, neighbours.disturbance if trials else None)
    if say is not None:
        say(calibration.table())
    if save_to is not None:
        calibration.save(save_to)
    model.pins_calibration = calibration  # type: ignore[assignment]
    return model


def _nothing(model: nn.Module, min_sparsity: float, dense: Mapping[str, str]) -> str:
    if already := sum(isinstance(module, SparseLinear) for module in model.modules()):
        return f"{already} layers of the model are sparse already, and no other has {min_sparsity:.0%} zeros or more"
    few = f"less than {min_sparsity:.0%} zeros"
    others = [f"{name or 'the model'}: {reason}" for name, reason in dense.items() if reason != few]
    more = f" ({len(others) - 3} more)" if len(others) > 3 else ""
    why = f"; left as they are: {'; '.join(others[:3])}{more}" if others else ""
    return (
        f"no linear layer has {min_sparsity:.0%} zeros or more, so none was tried: prune the model further, or lower "
        f"min_sparsity{why}"
    )


def _refuse_not_finite(model: nn.Module, places: Sequence[str]) -> None:
    for name in places:
        if not weight_matrix(model.get_submodule(name)).isfinite().all():
            raise ValueError(f'{name} has infinite or NaN weights, which have no int8 codes: use values="float32"')


def _device(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
    if len(devices) > 1 or next(iter(devices)).type not in TOKENS:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"the sparse kernels want a model on the CPU or on one GPU, and this one is on {found}: "
            'move it, for example with model.to("cpu")'
        )
    return devices.pop()


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.ops.pins_ext.cpu_capability()}, {torch.get_num_threads()} threads"


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight as [out, in], a view: Conv1D of transformers stores its transpose.

    Args:
        module: a Linear or Conv1D.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().t()


def sparsity_of(module: nn.Module) -> float:
    """Share of the weight that is zero.

    Args:
        module: a Linear or Conv1D.
    """
    weight = weight_matrix(module)
    return 1 - int(weight.count_nonzero()) / max(1, weight.numel())


def candidates(model: nn.Module, min_sparsity: float) -> tuple[list[str], dict[str, str]]:
    """Names of the linear layers to try, and why the others stay dense.

    Args:
        model: whose layers.
        min_sparsity: share of zeros from which on a layer is tried.
    """
    places: list[str] = []
    dense: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear) and not _is_conv1d(module):
            continue
        reason = _reason(model, name, module)
        if reason is None and sparsity_of(module) < min_sparsity:
            reason = f"less than {min_sparsity:.0%} zeros"
        if reason is None:
            places.append(name)
        else:
            dense[name] = reason
    return places, dense


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _reason(model: nn.Module, name: str, module: nn.Module) -> str | None:
    if type(module) is not nn.Linear and not _is_conv1d(module):
        return f"it is a {type(module).__name__}, which may compute something else"
    if not name:
        return "it is the model itself, and can't be replaced in it: wrap it in nn.Sequential"
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.layout != torch.strided:
        return f"its weight is {weight.layout}"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}"
    if not weight.numel():
        return "it has no weights"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    if "forward" in vars(module):
        return "its forward was replaced"
    parent = model.get_submodule(name.rpartition(".")[0])
    home = type(parent).__module__
    if name.rpartition(".")[2] in weights_read(type(parent)):
        return f"{type(parent).__name__} reads its weight directly"
    if home.startswith("torch.nn.") and home != "torch.nn.modules.container":
        return f"{type(parent).__name__} reads its weight directly"
    return None


def groups_of(model: nn.Module, places: Sequence[str]) -> list[list[str]]:
    """Layers of one shape, dtype and sparsity, to five percent: one of them is measured for all.

    Args:
        model: whose layers.
        places: their names.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in places:
        module = model.get_submodule(name)
        weight = weight_matrix(module)
        key = (tuple(weight.shape), weight.dtype, type(module), round(sparsity_of(module) * 20))
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _tried(model: nn.Module, group: Sequence[str], tokens: tuple[int, ...], values: str | None) -> Trial | None:
    if not tokens:
        return None
    # The middle one by sparsity stands for the group.
    name = sorted(group, key=lambda n: sparsity_of(model.get_submodule(n)))[len(group) // 2]
    module = model.get_submodule(name)
    weight = weight_matrix(module)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, weight.shape[1], generator=generator).to(weight) for n in tokens]
    dense, sparse = measure(module, _sparse(module, values), inputs)
    return Trial((weight.shape[0], weight.shape[1]), sparsity_of(module), tokens, dense, sparse, tuple(group))


def _sparse(module: nn.Module, values: str | None) -> SparseLinear:
    weight, bias = weight_matrix(module), bias_of(module)
    if weight.is_cuda:
        return GroupedLinear(weight, bias, values)
    exact = "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
    return SparseLinear(weight, bias, values or exact)


def by_weight(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Names of layers over the same memory, together.

    Args:
        model: whose layers.
        names: of them.
    """
    together: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        weight = weight_matrix(model.get_submodule(name))
        together.setdefault((weight.data_ptr(), tuple(weight.shape), weight.stride()), []).append(name)
    return list(together.values())


def _replace(model: nn.Module, names: Sequence[str], values: str | None) -> None:
    """One packed copy for all names of a weight; names of one layer stay names of one."""
    modules = [model.get_submodule(name) for name in names]
    parents = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    packed = _sparse(modules[0], values).eval()
    layers: dict[nn.Module, SparseLinear] = {modules[0]: packed}
    for name, parent, module in zip(names, parents, modules, strict=True):
        if module not in layers:
            layers[module] = packed.with_bias(bias_of(module))
        # By its registered name: a parent may be a Sequential or a ModuleDict.
        parent._modules[name.rpartition(".")[2]] = layers[module]


def bias_of(module: nn.Module) -> Tensor | None:
    """[out], or None.

    Args:
        module: a Linear or Conv1D.
    """
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias
