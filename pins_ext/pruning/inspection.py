"""What a running pruner can tell: statistics of its weights and masks, and whether all of it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import local
from pins_ext.pruning.attachment import Slot
from pins_ext.pruning.masks import Masks
from pins_ext.pruning.parameters import overlapping
from pins_ext.pruning.schedule import Schedule
from pins_ext.wrappers import named_parameters

_JUMP = 0.01
"""Share of the weights that may go without a word (released code: a model is at its target if |r - rF| <= .01)."""


@torch.no_grad()
def zeros(parameters: Sequence[Tensor], ranks: Ranks) -> list[int]:
    """Weights that are zero, per tensor, on all ranks; one synchronisation."""
    counts = torch.stack([p.numel() - torch.count_nonzero(p) for p in map(local, parameters)])
    others = [i for i in range(len(counts)) if not ranks.counts(i)]
    counts[others] = 0
    return ranks.sum(counts).tolist()


def stats(parameters: Mapping[str, Tensor], masks: Masks) -> dict[str, Any]:
    """Statistics of the pruned tensors and of their last selection, see Pruner.stats; a few synchronisations."""
    found = zeros(list(parameters.values()), masks.ranks)
    n = sum(p.numel() for p in parameters.values())
    _, flipped, nan = masks.counts()
    return {
        "sparsity": sum(masks.pruned()) / n,
        "zeros": sum(found) / n,
        "threshold": masks.threshold(),
        "churn": flipped / n,
        "nan": nan,
        "frozen": masks.frozen,
        "per_layer": {name: z / p.numel() for (name, p), z in zip(parameters.items(), found, strict=True)},
    }


@torch.no_grad()
def verify(model: nn.Module, parameters: Mapping[str, Tensor], masks: Masks, slots: Sequence[Slot]) -> dict[str, Any]:
    """Check that model, optimizers and masks agree, see Pruner.verify."""
    problems, ranks = [], masks.ranks
    found = dict(named_parameters(model))
    for name, p in parameters.items():
        if found.get(name) is not p:
            problems.append(
                f"{name} is no longer the parameter this Pruner was given (the model was copied, rebuilt or sharded "
                f"since)"
            )
    for name, other in overlapping(parameters):
        problems.append(f"{name} has come to share memory with {other}: their masks zero each other's weights")
    if not all(slot.attached for slot in slots):
        problems.append(
            "an optimizer no longer calls this Pruner (it was copied or rebuilt, or detach called): make a new Pruner"
        )
    kept = 0
    patterns: dict[str, int] = {}
    for i, (name, p) in enumerate((name, local(p)) for name, p in parameters.items()):
        mask = masks.keep(i, p.shape)
        kept += int(mask.sum()) if ranks.counts(i) else 0
        if fit := masks.pattern_now(i):
            patterns[fit.pattern.name] = patterns.get(fit.pattern.name, 0) + 1
            if broken := fit.violations(mask):
                problems.append(f"{name}: {broken:,} groups or blocks do not have the pattern {fit.pattern.name}")
        if masks.applied and (alive := int(torch.count_nonzero(p[~mask]))):
            problems.append(f"{name}: {alive:,} pruned weights are not zero")
        if not bool(torch.isfinite(p).all()):
            problems.append(f"{name} holds NaN or infinite weights")
    if ranks.any(bool(problems)):
        listed = problems or ["nothing here: another rank says what it found"]
        raise RuntimeError("verification failed:\n  " + "\n  ".join(listed))
    n_zeros, kept = zeros(list(parameters.values()), ranks), int(ranks.sum(torch.tensor(kept, device="cpu")))
    n = sum(p.numel() for p in parameters.values())
    return {
        "weights": n,
        "zeros": sum(n_zeros),
        "kept": kept,
        "sparsity": sum(n_zeros) / n,
        "masked": masks.applied,
        "patterns": patterns,
    }


def surprises(before: int, pruned: Mapping[str, tuple[int, int]], schedule: Schedule, step: int) -> Iterator[str]:
    """What the user of a pruner should know of its last mask.

    Args:
        before: weights that the mask before it pruned.
        pruned: weights that it prunes, and all, by tensor.
        schedule: how it was to come about.
        step: steps that were made.
    """
    n, after = sum(size for _, size in pruned.values()), sum(count for count, _ in pruned.values())
    if (after - before) / n > _JUMP:
        why = f"The run is too short for windows of {schedule.delta_t} steps"
        if step < schedule.final_start:
            why = (
                "Where training was to end here, total_steps is too large: it counts optimizer steps, one for all the "
                "batches whose gradients are accumulated"
            )
        yield (
            f"finalize pruned in one go what the schedule spreads over training: sparsity jumped from {before / n:.1%} "
            f"to {after / n:.1%} after {step:,} of {schedule.total:,} steps, of which {schedule.final_start:,} lead to "
            f"the final sparsity. {why}"
        )
    wanted = 1 - schedule.final_ratio
    if wanted - after / n > _JUMP:
        yield f"the mask was frozen at a sparsity of {after / n:.1%}, before the schedule's {wanted:.1%}"
    empty = [name for name, (count, size) in pruned.items() if count == size]
    if empty:
        more = f" and {len(empty) - 1} other tensors" if len(empty) > 1 else ""
        yield f"{empty[0]}{more} lost all weights: min_density keeps a share of every tensor"
