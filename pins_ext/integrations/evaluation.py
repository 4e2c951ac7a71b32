"""Evaluations of a Trainer that knows nothing of pruning: they see the masked model, and have one score."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainingArguments

from pins_ext.pruning.pruner import Pruner

if TYPE_CHECKING:
    from pins_ext.regularization.teacher import Teacher


class EvaluationView:
    """Opens `Pruner.masked_view` at the first forward pass in eval mode without gradients; `close` ends it.

    A Trainer has no event before an evaluation. A forward pass in training mode closes the view, too.

    Args:
        pruner: whose model is watched.
        teacher: whose answers are no evaluations, even where the model itself gives them.
    """

    def __init__(self, pruner: Pruner, teacher: Teacher | None = None) -> None:
        self.pruner = pruner
        self._stack = ExitStack()

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before_forward(module: nn.Module, args: Any) -> None:
            # A copy of the model, as a teacher is, has this hook, too.
            if module is not pruner.model or (teacher is not None and teacher.answers):
                return
            if module.training:
                self.close()
            elif not torch.is_grad_enabled() and not pruner.masks.in_view:
                self._stack.enter_context(pruner.masked_view())

        # A function, not a method: a deep copy of the model keeps it and copies nothing of the pruner.
        # The first one: FSDP's gathers weights, which must be the masked ones.
        self._handle = pruner.model.register_forward_pre_hook(before_forward, prepend=True)

    def close(self) -> None:
        """Put the weights back."""
        self._stack.close()

    def detach(self) -> None:
        """Close, and watch the model no more."""
        self.close()
        self._handle.remove()


def score_of(args: TrainingArguments, metrics: Mapping[str, float], metric: tuple[str, bool] | None) -> float | None:
    """The evaluation's score, higher is better: the best model's metric, else `metric`, else accuracy or -loss."""
    if args.metric_for_best_model:
        name, greater = args.metric_for_best_model, bool(args.greater_is_better)
    elif metric is not None:
        name, greater = metric
    else:
        name, greater = ("eval_accuracy", True) if "eval_accuracy" in metrics else ("eval_loss", False)
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        return None
    return metrics[name] if greater else -metrics[name]
