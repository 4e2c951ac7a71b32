"""Gradient clipping within the optimizer's pass, for a Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from pins_ext.optim import FusedOptimizer
from pins_ext.wrappers import unwrapped_optimizer


class ClipInPass:
    """A mixin for Trainers: with PinsAdamW or PinsSGD, `max_grad_norm` costs one read of the gradients and no write.

        class MyTrainer(ClipInPass, Trainer): ...

    The norm before clipping is logged as `grad_norm`, as without it. The Trainer itself clips for any other optimizer,
    and for a model with trainable parameters that the optimizer does not own.
    """

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        trainer: Any = self
        optimizer = unwrapped_optimizer(trainer.optimizer)
        if not isinstance(optimizer, FusedOptimizer):
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(p.grad is not None and id(p) not in owned for p in model.parameters()):
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        trainer.accelerator.unscale_gradients()
        return optimizer.clip_grad_norm_(trainer.args.max_grad_norm)
