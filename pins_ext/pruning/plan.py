"""What is going to be pruned, when, and what it costs: a dry run that allocates nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.patterns import Fit
from pins_ext.pruning.attachment import Slot
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.kept import host_bytes, moves_states, state_bytes
from pins_ext.pruning.schedule import Schedule
from pins_ext.pruning.scopes import Scopes
from pins_ext.pruning.units import units_bytes


class ConflictWarning(UserWarning):
    """Settings that work against each other, said when a Pruner is made; `plan` lists them too."""


class Plan(dict[str, Any]):
    """A dry run as plain data; `str` makes it a page to read."""

    def __str__(self) -> str:
        start = f"{self['start_sparsity']:.1%}" if self["start_sparsity"] else "dense"
        lines = [
            f"{self['weights']:,} prunable weights in {len(self['tensors'])} tensors "
            f"({self['share_of_model']:.1%} of the model's {self['model_weights']:,})",
            f"{self['zeros_at_the_end']:,} of them zero at the end: sparsity {self['final_sparsity']:.4%}"
            + (f", {self['remainder']:,} fewer than asked for: blocks go whole" if self["remainder"] else ""),
            *(f"pattern {name}: {count:,} weights in {n} tensors" for name, (n, count) in self["patterns"].items()),
            f"state {self['state_bytes'] / 2**20:,.1f} MiB ({self['state_bytes'] / self['weights']:.2f} B per weight) "
            f"+ masks {self['mask_bytes'] / 2**20:,.2f} MiB; while the masked model is evaluated up to "
            f"{self['view_bytes'] / 2**20:,.1f} MiB of hidden weights",
            *(
                [f"{self['host_bytes'] / 2**20:,.1f} MiB on the host: statistics, two buffers, masks"]
                if self["host_bytes"]
                else []
            ),
            *(
                [f"while a mask is chosen, up to {self['pattern_bytes'] / 2**20:,.1f} MiB for the scores of patterns"]
                if self["patterns"]
                else []
            ),
            f"schedule {self['schedule']}: {start} to step {self['warmup']}, at the end from step "
            f"{self['final_start']} of {self['total_steps']}, {self['masks']} "
            f"mask{'' if self['masks'] == 1 else 's'} on the way",
            "  step  sparsity",
            *(f"{t:6d}  {s:8.2%}" for t, s in self["points"]),
            "tensors:",
            *(f"  {name}  {shape}" for name, shape in self["tensors"].items()),
        ]
        return "\n".join(lines + [f"conflict: {text}" for text in self["conflicts"]])


def plan(
    config: PruneConfig,
    schedule: Schedule,
    parameters: Mapping[str, Tensor],
    scopes: Scopes,
    model_weights: int,
    fits: Sequence[Fit | None],
    frozen_base: bool = False,
    slots: Sequence[Slot] = (),
    on_host: bool = False,
) -> Plan:
    """The dry run of a pruner; see Pruner.plan.

    Args:
        config: what to prune and how.
        schedule: when.
        parameters: the pruned tensors by name.
        scopes: which of their weights compete.
        model_weights: weights of the whole model.
        fits: the pattern of each tensor.
        frozen_base: see Pruner.
        slots: the tensors by their optimizers.
        on_host: whether the statistics are in host memory and the weights are not.
    """
    shapes, element = [p.shape for p in parameters.values()], max(p.element_size() for p in parameters.values())
    states = sum(state_bytes(config, shape, element, frozen_base) for shape in shapes)
    moved = sum(state_bytes(config, shape, 0, frozen_base) for shape in shapes) if on_host else 0
    n = sum(p.numel() for p in parameters.values())
    zeros = sum(scopes.n_prune(schedule.final_ratio))
    ramp = range(schedule.initial_warmup + 1, schedule.final_start)
    points = {0, schedule.initial_warmup, *ramp[:: max(1, len(ramp) // 8)], schedule.final_start, schedule.total - 1}
    kind = schedule.kind
    return Plan(
        weights=n,
        model_weights=model_weights,
        share_of_model=n / model_weights,
        tensors={name: tuple(p.shape) for name, p in parameters.items()},
        zeros_at_the_end=zeros,
        start_sparsity=0.0,
        final_sparsity=zeros / n,
        remainder=scopes.remainder(schedule.final_ratio),
        patterns=dict(pattern_sizes(parameters, fits)),
        state_bytes=states - moved,
        host_bytes=host_bytes(config, shapes, element, frozen_base) if on_host else 0,
        mask_bytes=sum(ops.mask_bytes(p.numel()) for p in parameters.values()),
        pattern_bytes=units_bytes(fits, shapes, config),
        view_bytes=_view_bytes(config, zeros, parameters),
        schedule=kind if isinstance(kind, str) else getattr(kind, "__qualname__", repr(kind)),
        warmup=schedule.initial_warmup,
        final_start=schedule.final_start,
        total_steps=schedule.total,
        masks=sum(schedule.is_new_mask(t) and schedule.remaining_ratio(t) < 1 for t in ramp),
        points=[(t, 1 - schedule.remaining_ratio(t)) for t in sorted(points)],
        conflicts=conflicts(config, schedule, frozen_base, slots),
        config=config.to_dict(),
    )


def pattern_sizes(
    parameters: Mapping[str, Tensor], fits: Sequence[Fit | None]
) -> Iterable[tuple[str, tuple[int, int]]]:
    """Each pattern's name, and how many tensors have it and how many weights are in them.

    Args:
        parameters: the pruned ones.
        fits: the pattern of each.
    """
    found: dict[str, tuple[int, int]] = {}
    for p, fit in zip(parameters.values(), fits, strict=True):
        if fit is not None:
            tensors, weights = found.get(fit.pattern.name, (0, 0))
            found[fit.pattern.name] = (tensors + 1, weights + p.numel())
    return found.items()


def _rounded_away(slots: Sequence[Slot]) -> Iterable[str]:
    """Weights in bfloat16 whose small updates are lost."""
    for slot in slots:
        owner = type(slot.optimizer)
        narrow = any(slot.parameters[i].dtype == torch.bfloat16 for i in slot.indices)
        # Whose step it is: a class of the user's may inherit torch's.
        if narrow and owner.step.__module__.partition(".")[0] in ("torch", "transformers"):
            yield (
                f"{owner.__name__} rounds bfloat16 weights to nearest, so that updates below 2^-9 of a weight, most of "
                "fine-tuning's, are lost: PinsAdamW and PinsSGD round stochastically"
            )


def _view_bytes(config: PruneConfig, zeros: int, parameters: Mapping[str, Tensor]) -> int:
    """What Pruner.masked_view keeps while it is open, at most; under strict masks there is nothing to hide."""
    return 0 if config.mask_policy == "strict" else zeros * max(p.element_size() for p in parameters.values())


def conflicts(
    config: PruneConfig, schedule: Schedule, frozen_base: bool = False, slots: Sequence[Slot] = ()
) -> list[str]:
    """Settings that work against each other.

    Args:
        config: what to prune and how.
        schedule: when.
        frozen_base: see Pruner.
        slots: the pruned tensors by their optimizers.
    """
    found = [] if frozen_base else list(_rounded_away(slots))
    if config.smoothed and schedule.final_start < config.delta_t:
        found.append(f"the final sparsity starts before the first window of {config.delta_t} steps has ended")
    ramp = range(schedule.initial_warmup + 1, schedule.final_start)
    if not any(schedule.mask_due(t) for t in ramp) and not callable(schedule.kind):
        found.append("no mask falls between warm-up and cool-down: the model jumps to its final sparsity")
    if schedule.final_start >= schedule.total and schedule.kind in ("cubic", "linear", "cosine", "one-shot"):
        found.append(
            f"a cool-down of {schedule.final_cooldown} steps has none at the final sparsity, to which finalize alone "
            "then prunes: it takes at least 2"
        )
    if config.needs_shadow:
        found.append(f"{config.criterion} under strict masks keeps one more state, so that pruned weights can return")
    if config.rule.reads_moments and config.mask_optimizer_state:
        found.append(
            f"{config.rule.name} scores by the optimizer's moments: a weight whose moments are cleared is gone"
        )
    if config.state_device and not moves_states(config, frozen_base):
        found.append(f"state_device={config.state_device!r} moves nothing: {config.criterion} keeps no statistics")
    if frozen_base and config.rule.name == "pins":
        found.append(
            "over a frozen base criterion pins is the same as platon, |p g|: no weight takes a step to look ahead to"
        )
    if config.rule.warning:
        found.append(f"{config.rule.name} {config.rule.warning}")
    return found
