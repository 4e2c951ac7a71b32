"""The names under which PinsCallback adds to a Trainer's logs and history: all of them begin alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "pins/"

RUN = PREFIX + "run"
"""An entry of the history with this key says which run it belongs to."""

NEW_MASK = PREFIX + "new_mask"
"""An entry of the history with this key was made right after a new mask; its value is the pruner's step."""

AT_TARGET = PREFIX + "at_target"
"""Whether the weights that a checkpoint would hold are as sparse as the finished model."""

EVALUATED_ZEROS = f"eval_{PREFIX}zeros"
"""Share of the prunable weights that was zero in the model that was evaluated."""

_OF_A_MASK = ("threshold", "churn")
_EARLIER = {
    "pins_run": RUN,
    "at_target": AT_TARGET,
    "eval_sparsity": EVALUATED_ZEROS,
    # It was the share of zeros; the mask's had this name in entries of masks.
    "sparsity": PREFIX + "zeros",
    "mask_sparsity": PREFIX + "sparsity",
    **{
        name: PREFIX + name
        for name in (
            *("target_sparsity", "nan", "threshold", "churn", "pruning_ms", "pruning_share"),
            *("task_loss", "divergence", "teacher_weight"),
        )
    },
}


def named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, as they are logged."""
    return {PREFIX + name: value for name, value in values.items()}


def plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What this callback logged in an entry, by name without the prefix."""
    return {name.removeprefix(PREFIX): value for name, value in entry.items() if name.startswith(PREFIX)}


def of_training(stats: Mapping[str, Any]) -> dict[str, Any]:
    """What is logged of a pruner's statistics beside a training loss."""
    names = ("sparsity", "zeros", "target_sparsity", "nan", *(_OF_A_MASK if stats["threshold"] is not None else ()))
    return named({name: stats[name] for name in names})


def of_a_mask(stats: Mapping[str, Any], target_sparsity: float, step: int) -> dict[str, Any]:
    """An entry for a new mask.

    Args:
        stats: of the pruner, right after it.
        target_sparsity: what the schedule asked for.
        step: of the pruner, at which it was chosen.
    """
    values = {name: stats[name] for name in ("sparsity", *_OF_A_MASK)}
    return {NEW_MASK: step, **named({**values, "target_sparsity": target_sparsity})}


def as_named_now(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A history as this version writes it; checkpoints of an earlier one have names without the prefix."""
    if not any("pins_run" in entry for entry in history):
        return [dict(entry) for entry in history]
    found = []
    for entry in history:
        masked = {NEW_MASK: entry["step"] - 1} if "mask_sparsity" in entry else {}
        found.append({_EARLIER.get(name, name): value for name, value in entry.items()} | masked)
    return found
