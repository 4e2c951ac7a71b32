"""What a step costs, and what of it is pruning."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pins_ext.optim import FusedOptimizer, PinsAdamW
from pins_ext.wrappers import unwrapped_optimizer

_SAMPLE_WEIGHTS = 1 << 26
_REPEATS = 5


@dataclass
class StepTimer(TrainerCallback):
    """Wall time of training steps and, in them, of `optimizer.step()`, pruning included; evaluation and saving apart.

    Host time: on a GPU a step may still be running when its time is taken.

    Attributes:
        steps: how many were timed.
        seconds, optimizer_seconds: their sums.
    """

    steps: int = 0
    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    _begin: float = 0.0
    _before_optimizer: float = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forward and backward begin."""
        self._begin = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are there and clipped."""
        self._before_optimizer = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weights are updated and masked."""
        self.optimizer_seconds += time.perf_counter() - self._before_optimizer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step is over."""
        self.seconds += time.perf_counter() - self._begin
        self.steps += 1


def plain_step_seconds(optimizer: torch.optim.Optimizer, model: nn.Module) -> float | None:
    """What a fused optimizer's step costs without pruning: the median of a few steps on copies of the model's weights.

    Importance and masks ride along in its pass over memory, so pruning has no time of its own there; the difference to
    this is its cost. Larger models are sampled and scaled.

    Returns:
        Seconds; None for an optimizer that is followed by hooks, where pruning is timed by itself, on a GPU, whose
        steps are not timed to their end, and for released gradients, whose steps are part of backward.
    """
    optimizer = unwrapped_optimizer(optimizer)
    everything = [p for p in model.parameters() if p.requires_grad]
    if not isinstance(optimizer, FusedOptimizer) or optimizer.release or any(p.is_cuda for p in everything):
        return None
    sample: list[nn.Parameter] = []
    for p in everything:
        if sum(q.numel() for q in sample) < _SAMPLE_WEIGHTS:
            sample.append(nn.Parameter(p.detach().clone()))
            sample[-1].grad = torch.zeros_like(p)
    options = {name: value for name, value in optimizer.param_groups[0].items() if name in optimizer.defaults}
    if isinstance(optimizer, PinsAdamW):
        options["moment_dtype"] = optimizer.moment_dtype
    plain = type(optimizer)(sample, **options)
    seconds = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        plain.step()
        seconds.append(time.perf_counter() - begin)
    scale = sum(p.numel() for p in everything) / sum(p.numel() for p in sample)
    return statistics.median(seconds[1:]) * scale


def pruning_seconds(outside: float, optimizer: float, plain: float | None) -> float:
    """What pruning costs per step.

    Args:
        outside: seconds in pruning that are measured by themselves.
        optimizer: seconds of `optimizer.step()`.
        plain: what that would cost without pruning, see `plain_step_seconds`; None where nothing is hidden in it.
    """
    return outside if plain is None else max(outside, optimizer - plain)
