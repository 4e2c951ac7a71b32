"""What a pruner can tell: statistics of a running one, the plan of one that has not started, and whether all holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pins_ext import ops

if TYPE_CHECKING:
    from pins_ext.pruning.pruner import Pruner


def _zeros(pruner: Pruner) -> list[int]:
    """Weights that are zero, per pruned tensor."""
    counts = [p.numel() - torch.count_nonzero(p) for p in pruner.parameters]
    return torch.stack(counts).tolist()


@torch.no_grad()
def stats(pruner: Pruner) -> dict[str, Any]:
    """Statistics of the model and of its last selection; one synchronisation.

    Returns:
        step; target_sparsity (what the schedule asks for at this step) and sparsity (share of the prunable weights that
        is zero now); threshold (a score; the highest where tensors differ) or None before the first mask;
        churn (share of mask bits the last selection flipped), nan (scores that are NaN: kept), ms (host time spent in
        pruning since the last call, the fused update apart), frozen, per_layer (parameter name to its sparsity).
    """
    zeros = _zeros(pruner)
    packed = pruner._pack_stats.sum(0).tolist()
    threshold = ops.score_of_key(pruner.threshold).max().item() if pruner._selected_for else None
    ms, pruner.seconds = 1e3 * pruner.seconds, 0.0
    return {
        "step": pruner.step,
        "target_sparsity": 1 - pruner.remaining_ratio,
        "sparsity": sum(zeros) / pruner.n_weights,
        "threshold": threshold,
        "churn": packed[1] / pruner.n_weights,
        "nan": packed[2],
        "ms": ms,
        "frozen": pruner.frozen,
        "per_layer": {n: z / p.numel() for n, z, p in zip(pruner.names, zeros, pruner.parameters, strict=True)},
    }


@torch.no_grad()
def verify(pruner: Pruner) -> dict[str, Any]:
    """Check that model, optimizer and masks agree; see Pruner.verify.

    Returns:
        weights, zeros, kept (mask bits), sparsity, final_sparsity, masked (whether pruned weights are to be zero now).
    """
    problems = []
    parameters = dict(pruner.model.named_parameters())
    for name, p in zip(pruner.names, pruner.parameters, strict=True):
        if parameters.get(name) is not p:
            problems.append(
                f"{name} is no longer the parameter this Pruner was given (the model was copied or rebuilt)"
            )
    if not pruner.attached:
        problems.append(
            "an optimizer no longer calls this Pruner (it was copied or rebuilt): attach a new Pruner to it"
        )
    zeros, kept = _zeros(pruner), 0
    for i, (name, p) in enumerate(zip(pruner.names, pruner.parameters, strict=True)):
        mask = pruner.mask(name)
        kept += int(mask.sum())
        if pruner.masked and (alive := int(torch.count_nonzero(p[~mask]))):
            problems.append(f"{name}: {alive:,} pruned weights are not zero")
        if not bool(torch.isfinite(p).all()):
            problems.append(f"{name} holds NaN or infinite weights")
        if zeros[i] < p.numel() - int(mask.sum()) and pruner.masked:
            problems.append(f"{name}: fewer zeros than its mask prunes")
    if problems:
        raise RuntimeError("verification failed:\n  " + "\n  ".join(problems))
    return {
        "weights": pruner.n_weights,
        "zeros": sum(zeros),
        "kept": kept,
        "sparsity": sum(zeros) / pruner.n_weights,
        "final_sparsity": 1 - pruner.schedule.final_ratio,
        "masked": pruner.masked,
    }


class Plan(dict[str, Any]):
    """A dry run as plain data; `str` makes it a page to read."""

    def __str__(self) -> str:
        lines = [
            f"{self['weights']:,} prunable weights in {len(self['tensors'])} tensors "
            f"({self['share_of_model']:.1%} of the model's {self['model_weights']:,})",
            f"{self['zeros_at_the_end']:,} of them zero at the end: sparsity {self['final_sparsity']:.4%}",
            f"state {self['state_bytes'] / 2**20:,.1f} MiB ({self['state_bytes'] / self['weights']:.2f} B per weight) "
            f"+ masks {self['mask_bytes'] / 2**20:,.2f} MiB",
            f"schedule {self['schedule']}: dense to step {self['warmup']}, at the end from step {self['final_start']} "
            f"of {self['total_steps']}, {self['masks']} masks on the way",
            "  step  sparsity",
            *(f"{t:6d}  {s:8.2%}" for t, s in self["points"]),
            "tensors:",
            *(f"  {name}  {shape}" for name, shape in self["tensors"].items()),
        ]
        return "\n".join(lines + [f"conflict: {text}" for text in self["conflicts"]])


def plan(pruner: Pruner) -> Plan:
    """What this pruner is going to do; see Pruner.plan."""
    s, config = pruner.schedule, pruner.config
    states = [t for tensors in pruner.importance.tensors().values() for t in tensors]
    model_weights = sum(p.numel() for p in pruner.model.parameters())
    ramp = range(s.initial_warmup + 1, s.final_start)
    points = sorted({0, s.initial_warmup, *ramp[:: max(1, len(ramp) // 8)], s.final_start, s.total - 1})
    conflicts = []
    if config.smoothed and s.final_start < config.delta_t:
        conflicts.append(f"the final sparsity starts before the first window of {config.delta_t} steps has ended")
    if not any(s.mask_due(t) for t in range(s.initial_warmup + 1, s.final_start)) and not callable(s.kind):
        conflicts.append("no mask falls between warm-up and cool-down: the model jumps to its final sparsity")
    if config.needs_shadow:
        conflicts.append(
            f"{config.criterion} under strict masks keeps one more state, so that pruned weights can return"
        )
    if config.criterion == "pins-signed":
        conflicts.append("pins-signed collapsed to chance at 90 % sparsity in a trial: it is meant for ablations")
    return Plan(
        weights=pruner.n_weights,
        model_weights=model_weights,
        share_of_model=pruner.n_weights / model_weights,
        tensors={name: tuple(p.shape) for name, p in zip(pruner.names, pruner.parameters, strict=True)},
        zeros_at_the_end=sum(pruner.selection.n_prune(s.final_ratio)),
        final_sparsity=sum(pruner.selection.n_prune(s.final_ratio)) / pruner.n_weights,
        state_bytes=sum(t.numel() * t.element_size() for t in states),
        mask_bytes=sum(m.numel() for m in pruner.masks),
        schedule=s.kind if isinstance(s.kind, str) else getattr(s.kind, "__qualname__", repr(s.kind)),
        warmup=s.initial_warmup,
        final_start=s.final_start,
        total_steps=s.total,
        masks=sum(t % s.delta_t == 0 for t in ramp),
        points=[(t, 1 - s.remaining_ratio(t)) for t in points],
        conflicts=conflicts,
        config=config.to_dict(),
    )
