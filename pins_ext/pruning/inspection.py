"""What a running pruner can tell: statistics of its weights and masks, and whether all of it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.pruning.attachment import Slot
from pins_ext.pruning.masks import Masks


@torch.no_grad()
def zeros(parameters: Sequence[Tensor]) -> list[int]:
    """Weights that are zero, per tensor; one synchronisation."""
    return torch.stack([p.numel() - torch.count_nonzero(p) for p in parameters]).tolist()


def stats(parameters: Mapping[str, Tensor], masks: Masks) -> dict[str, Any]:
    """Statistics of the pruned tensors and of their last selection; a few synchronisations.

    Returns:
        sparsity (share of the weights that is zero now); threshold (a score) or None before the first mask; churn
        (share of mask bits the last selection flipped); nan (scores that are NaN: kept); frozen; per_layer (name to
        sparsity).
    """
    found = zeros(list(parameters.values()))
    n = sum(p.numel() for p in parameters.values())
    _, flipped, nan = masks.counts()
    return {
        "sparsity": sum(found) / n,
        "threshold": masks.threshold(),
        "churn": flipped / n,
        "nan": nan,
        "frozen": masks.frozen,
        "per_layer": {name: z / p.numel() for (name, p), z in zip(parameters.items(), found, strict=True)},
    }


@torch.no_grad()
def verify(model: nn.Module, parameters: Mapping[str, Tensor], masks: Masks, slots: Sequence[Slot]) -> dict[str, Any]:
    """Check that model, optimizers and masks agree; see Pruner.verify.

    Returns:
        weights, zeros, kept (mask bits), sparsity, masked (whether pruned weights are to be zero now).
    """
    problems = []
    found = dict(model.named_parameters())
    for name, p in parameters.items():
        if found.get(name) is not p:
            problems.append(
                f"{name} is no longer the parameter this Pruner was given (the model was copied or rebuilt)"
            )
    if not all(slot.attached for slot in slots):
        problems.append(
            "an optimizer no longer calls this Pruner (it was copied or rebuilt): attach a new Pruner to it"
        )
    n_zeros, kept = zeros(list(parameters.values())), 0
    for i, (name, p) in enumerate(parameters.items()):
        mask = masks.keep(i, p.shape)
        kept += int(mask.sum())
        if masks.applied and (alive := int(torch.count_nonzero(p[~mask]))):
            problems.append(f"{name}: {alive:,} pruned weights are not zero")
        if not bool(torch.isfinite(p).all()):
            problems.append(f"{name} holds NaN or infinite weights")
        if masks.applied and n_zeros[i] < p.numel() - int(mask.sum()):
            problems.append(f"{name}: fewer zeros than its mask prunes")
    if problems:
        raise RuntimeError("verification failed:\n  " + "\n  ".join(problems))
    n = sum(p.numel() for p in parameters.values())
    return {
        "weights": n,
        "zeros": sum(n_zeros),
        "kept": kept,
        "sparsity": sum(n_zeros) / n,
        "masked": masks.applied,
    }
