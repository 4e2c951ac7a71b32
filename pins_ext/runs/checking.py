"""Whether a result on the disk is what its record says, for a reader who has only transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pins_ext.patterns import Fit
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.patterns import fitted
from pins_ext.runs.record import RunRecord


def check(folder: Path, record: RunRecord) -> list[str]:
    """Everything about a result that differs from its record."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        dtype = getattr(torch, record.model.dtype)
        kind = getattr(transformers, record.model.auto_class)
        model, report = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except Exception as error:
        return [f"transformers can't load it: {' '.join(str(error).split())}"]
    problems = [f"{kind.replace('_', ' ')}: {sorted(names)[0]}" for kind, names in report.items() if names]
    parameters = dict(model.named_parameters())
    problems += [f"{name} holds NaN or infinite weights" for name, p in parameters.items() if not p.isfinite().all()]
    for name, expected in record.final.tensors.items():
        p = parameters.get(name)
        if p is None or p.numel() != expected.weights:
            problems.append(f"{name} is missing or has another shape")
        elif (zeros := p.numel() - int(torch.count_nonzero(p))) != expected.zeros:
            problems.append(f"{name} has {zeros:,} zeros, recorded are {expected.zeros:,}")
    if not record.final.tensors:
        return problems
    zeros, weights = (sum(getattr(t, kind) for t in record.final.tensors.values()) for kind in ("zeros", "weights"))
    if (zeros, weights) != (record.final.zeros, record.final.weights):
        problems.append(
            f"recorded are {record.final.zeros:,} zeros of {record.final.weights:,} weights, and tensor by tensor "
            f"{zeros:,} of {weights:,}"
        )
    # A tensor that is missing is among the problems already.
    fits = _fits(record, model, parameters) if not problems else {}
    return problems + _check_masks(folder, record, parameters, fits)


def _fits(record: RunRecord, model: Any, parameters: Mapping[str, Any]) -> dict[str, Fit]:
    """The pattern of each pruned tensor that was to have one."""
    config = PruneConfig(pattern=record.config.pruning.get("pattern", "none"))
    pruned = {name: parameters[name] for name in record.final.tensors}
    found, _ = fitted(model, pruned, config)
    return {name: fit for name, fit in zip(pruned, found, strict=True) if fit is not None}


def _check_masks(folder: Path, record: RunRecord, parameters: Mapping[str, Any], fits: Mapping[str, Fit]) -> list[str]:
    """What the pruner's file says is pruned must be zero, and have the pattern that was asked for."""
    from safetensors.torch import load_file

    from pins_ext.integrations.callback import PRUNER_FILE
    from pins_ext.ops import unpack_bits

    try:
        state = load_file(folder / PRUNER_FILE)
    except Exception as error:
        return [f"{PRUNER_FILE} can't be read: {' '.join(str(error).split())}"]
    problems, kept = [], 0
    for name in record.final.tensors:
        bits = state.get(f"mask/{name}")
        if bits is None or name not in parameters:
            problems.append(f"{PRUNER_FILE} has no mask for {name}")
            continue
        mask = unpack_bits(bits, parameters[name].shape)
        kept += int(mask.sum())
        if name in fits and (broken := fits[name].violations(mask)):
            problems.append(f"{name}: {broken:,} groups or blocks do not have the pattern {fits[name].pattern.name}")
        if alive := int(parameters[name].detach()[~mask].count_nonzero()):
            problems.append(f"{name}: {alive:,} weights that the mask prunes are not zero")
    if not problems and kept != record.final.kept:
        problems.append(f"the masks keep {kept:,} weights, recorded are {record.final.kept:,}")
    return problems
