"""Self-regularization in `Trainer.compute_loss`, for those who write a Trainer of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pins_ext.extras import explained

with explained():
    from transformers import Trainer

    from pins_ext.integrations.callback import PinsCallback


class SelfRegularizedLoss(Trainer):
    """A base for Trainers whose `compute_loss` is self-regularized; the same losses as without it, to the last bit.

        class MyTrainer(SelfRegularizedLoss): ...                         # or (SelfRegularizedLoss, PinsTrainer)
        MyTrainer(..., callbacks=[PinsCallback(config, self_regularizer=regularizer)])

    PinsCallback by itself attaches the regularizer to the model's outputs, which needs no subclass. Here the outputs
    stay as they are, and a `compute_loss` that overrides this one may add to what `super().compute_loss` returns.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's.

        Raises:
            ValueError: label smoothing or a loss function, which this loss would silently leave out.
        """
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "SelfRegularizedLoss computes the loss: switch label_smoothing_factor and compute_loss_func off"
            )
        for callback in self._regularizing():
            callback.regularizes_forward = False
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The joint loss while training, the task's loss in evaluations.

        Args:
            num_items_in_batch: rows that count in all batches of the optimizer step, on all ranks: the loss is then a
                sum divided by it, so that accumulated gradients are those of one large batch.
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        for callback in self._regularizing() if model.training else ():
            assert callback.self_regularizer is not None
            items = num_items_in_batch if self.model_accepts_loss_kwargs else None
            loss = callback.self_regularizer(outputs, inputs, items)
            if items is not None and self.args.average_tokens_across_devices:
                # The ranks' gradients are averaged, but items were counted over all of them.
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _regularizing(self) -> list[PinsCallback]:
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, PinsCallback)]
        return [c for c in callbacks if c.self_regularizer is not None]
