"""How good a model is at a task's held-out examples, by the Trainer's own evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pins_ext.tasks import Task


def validated(task: Task, model: Any, batch_size: int, progress: Callable[[str, int], None]) -> dict[str, float]:
    """The loss and the task's metrics on its validation examples.

    Args:
        task: tokenised.
        model: with its head.
        batch_size: examples in a batch.
        progress: told ("validating", batches) so far.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_eval_batch_size=batch_size,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            eval_dataset=task.validation,
            processing_class=task.tokenizer,
            data_collator=task.collator,
            compute_metrics=partial(task.compute_metrics, split="validation", model=model),
            preprocess_logits_for_metrics=task.reduce_logits,
            callbacks=[_Steps(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in (*task.metrics, "loss") if f"eval_{name}" in found}


class _Steps(TrainerCallback):
    def __init__(self, progress: Callable[[str, int], None]) -> None:
        self._progress, self._done = progress, 0

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self._done += 1
        self._progress("validating", self._done)
