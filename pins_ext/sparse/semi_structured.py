"""2:4 weights in torch's own kernels for them, on GPUs that have such kernels, and what that gains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.patterns import Fit, Pattern
from pins_ext.sparse.calibration import Calibration, Trial, measure
from pins_ext.sparse.inference import (
    NothingSparseError,
    bias_of,
    by_weight,
    candidates,
    groups_of,
    sparsity_of,
    weight_matrix,
)

TOKENS = (1, 128, 2048)

_TWO_OF_FOUR = Fit(Pattern("2:4", 2, 4), -1)
_CAPABILITY = 8
"""Compute capability from which on tensor cores know 2:4 (Ampere)."""


def to_semi_structured(
    model: nn.Module,
    *,
    only_faster: bool = False,
    tokens: Sequence[int] = TOKENS,
    say: Callable[[str], None] | None = print,
) -> Any:
    """Hand the linear layers whose weights are 2:4 to `torch.sparse.to_sparse_semi_structured`, and say what it gains.

    Every layer shape is timed dense and 2:4 first. On many models and batches the gain is less than nothing, which is
    said as well. The model is changed in place, for inference only: save it before.

    Args:
        model: a model with 2:4 zeros (`PruneConfig(pattern="2:4")`) on a CUDA device of compute capability 8.0 or more;
            bfloat16 or float16 weights, or float32 where torch's CUTLASS kernels are used. torch takes matrices whose
            sizes are multiples of what its library asks for (CUTLASS in 16 bits: outputs of 32, inputs of 64); others
            stay dense, with torch's words in `pins_calibration.dense`. It is set to evaluation mode.
        only_faster: leave layers dense that are not faster over all numbers of tokens (geometric mean).
        tokens: numbers of tokens (batch × sequence) to measure.
        say: told what was measured; None for silence.

    Returns:
        The model; `model.pins_calibration` holds what was measured (`pins_ext.sparse.calibration.Calibration`).

    Raises:
        ValueError: no GPU, one without such kernels, or tokens that are no numbers.
        NothingSparseError: no layer is 2:4, or torch takes none of those that are.
    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be positive numbers of tokens, got {tuple(tokens)}")
    device = _device(model)
    places, dense = two_of_four(model)
    trials, converted = [], 0
    model.eval()
    for group in groups_of(model, places):
        layers, why = _converted(model, group)
        if why is not None:
            dense |= dict.fromkeys(group, why)
            continue
        try:
            trial = _timed(model.get_submodule(group[0]), layers[0], group, tuple(tokens), device)
        except (RuntimeError, NotImplementedError) as error:
            # Packed, and yet no kernel multiplies it on this device.
            dense |= dict.fromkeys(group, refusal(error))
            continue
        trials.append(trial)
        if trial.speedup > 1 or not only_faster:
            converted += len(set(layers))
            for name, layer in zip(group, layers, strict=True):
                path, _, leaf = name.rpartition(".")
                model.get_submodule(path)._modules[leaf] = layer
    calibration = Calibration(torch.cuda.get_device_name(device), tuple(trials), dense)
    if not trials:
        raise NothingSparseError(f"torch takes none of the {len(places)} layers that are 2:4: {dense[places[0]]}")
    if say is not None:
        say(calibration.table())
        say(verdict(trials, converted))
    model.pins_calibration = calibration  # type: ignore[assignment]
    return model


def two_of_four(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Names of the linear layers whose weights are 2:4 along the inputs, and why the others stay dense.

    Raises:
        NothingSparseError: there are none.
    """
    sparse, dense = candidates(model, 0.5)
    places = []
    for name in sparse:
        kept = weight_matrix(model.get_submodule(name)) != 0
        if _TWO_OF_FOUR.misfit(kept.shape) is None and _TWO_OF_FOUR.violations(kept) == 0:
            places.append(name)
        else:
            dense[name] = "its zeros are not 2:4 along the inputs"
    if not places:
        raise NothingSparseError('no linear layer is 2:4: prune with pattern="2:4" first')
    return places, dense


def verdict(trials: Sequence[Trial], converted: int) -> str:
    """What 2:4 does to the time in these layers, in a sentence for each number of tokens.

    Args:
        trials: the measurements.
        converted: layers that were handed over.
    """
    lines = []
    for i, n in enumerate(trials[0].tokens):
        before, after = (sum(times[i] * len(t.layers) for t, times in zip(trials, each, strict=True))
                         for each in ([t.dense for t in trials], [t.sparse for t in trials]))  # fmt: skip
        what = "faster than dense" if after < before else "no faster than dense: 2:4 gains nothing here"
        lines.append(
            f"2:4 at {n:,} token{'s' if n > 1 else ''}: {before / 1e3:,.3f} ms dense, {after / 1e3:,.3f} ms 2:4 "
            f"({before / after:.2f} x), {what}"
        )
    return "\n".join([*lines, f"{converted} layers are 2:4 now"])


def _device(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"torch has 2:4 kernels for CUDA alone, and this model is on {found}: move it with "
            'model.to("cuda", torch.bfloat16), or use sparsify_for_inference, which measures what zeros gain on the CPU'
        )
    device = devices.pop()
    capability = torch.cuda.get_device_capability(device)
    if capability[0] < _CAPABILITY:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no 2:4 kernels: compute capability {capability[0]}."
            f"{capability[1]}, and {_CAPABILITY}.0 is needed"
        )
    return device


def _converted(model: nn.Module, group: Sequence[str]) -> tuple[list[nn.Module], str | None]:
    """The layers of a group with 2:4 weights; or why torch doesn't take them."""
    # A layer of several names stays one, and layers over one weight share its packed form.
    made: dict[nn.Module, nn.Module] = {}
    try:
        for names in by_weight(model, group):
            modules = [model.get_submodule(name) for name in names]
            weight = packed(weight_matrix(modules[0]))
            made |= {module: layer_over(weight, bias_of(module)) for module in dict.fromkeys(modules)}
    except (RuntimeError, NotImplementedError) as error:
        return [], refusal(error)
    return [made[model.get_submodule(name)] for name in group], None


def refusal(error: Exception) -> str:
    """In one short line, what torch says.

    Args:
        error: that it raised.
    """
    return f"torch says: {' '.join(str(error).split())[:200]}"


def packed(weight: Tensor) -> nn.Parameter:
    """A matrix in torch's 2:4 format.

    Args:
        weight: [out, in], 2:4 along the inputs.

    Raises:
        RuntimeError: torch doesn't take it.
    """
    with warnings.catch_warnings():
        # That the interface is a prototype.
        warnings.simplefilter("ignore", UserWarning)
        return nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.contiguous()), requires_grad=False)


def layer_over(weight: nn.Parameter, bias: Tensor | None) -> nn.Linear:
    """A linear layer for inference over a packed weight.

    Args:
        weight: of `packed`, [out, in].
        bias: [out], or None.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = weight
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer.eval()


def _timed(
    dense: nn.Module, sparse: nn.Module, group: Sequence[str], tokens: tuple[int, ...], device: torch.device
) -> Trial:
    weight = weight_matrix(dense)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, weight.shape[1], generator=generator).to(device, weight.dtype) for n in tokens]
    before, after = measure(copy.copy(dense), sparse, inputs)
    return Trial((weight.shape[0], weight.shape[1]), sparsity_of(dense), tokens, before, after, tuple(group))
