"""The parts of a self-regularized loss, averaged between two logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pins_ext.regularization.self_regularizer import Losses


class LossMeans:
    """Sums of task_loss, divergence and teacher_weight where the losses are, each over the steps that had it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, losses: Losses) -> None:
        """Count one step in."""
        parts = {"task_loss": losses.task, "divergence": losses.divergence, "teacher_weight": losses.weight}
        for name, value in parts.items():
            if value is not None:
                total, steps = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + value, steps + 1

    def take(self) -> dict[str, float]:
        """The means of each part since the last call; one synchronisation."""
        means = {name: total / steps for name, (total, steps) in self._sums.items()}
        self._sums = {}
        return dict(zip(means, torch.stack([*means.values()]).tolist(), strict=True))
