"""The diagnosis inside the Trainer: fixed batches of training data, and a callback that starts it."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pins_ext.files import random_state
from pins_ext.runs.prepare import Prepared
from pins_ext.studies.diagnosis.changes import Diagnosis
from pins_ext.studies.diagnosis.options import DiagnosisOptions


class DiagnoseCallback(TrainerCallback):
    """Starts a `Diagnosis` when training begins; it comes after the callback that prunes.

    Args:
        prepared: the run.
        options: how much is measured.
        console: for a line per mask.

    Attributes:
        examples: how many the loss is measured on.
        diagnosis: the running one, from the start of training on.

    Raises:
        ValueError: there is no training example.
    """

    def __init__(self, prepared: Prepared, options: DiagnosisOptions, console: Console) -> None:
        self.prepared, self.options, self.console = prepared, options, console
        self.diagnosis: Diagnosis | None = None
        self.batches, self.examples = _fixed_batches(prepared, options.loss_batches)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The pruner is attached by now."""
        trainer, pruner, options = self.prepared.trainer, self.prepared.pins.pruner, self.options
        assert pruner is not None

        def loss(batch: dict[str, Any]) -> Tensor:
            # compute_loss may take the labels out of the batch.
            value = trainer.compute_loss(pruner.model, dict(batch))
            assert isinstance(value, Tensor)
            return value

        self.diagnosis = Diagnosis(
            pruner,
            loss,
            [trainer._prepare_inputs(batch) for batch in self.batches],
            masks=options.masks,
            random_masks=options.random_masks,
            exchange_masks=options.exchange_masks,
            exchanges=options.exchanges,
            exchange_pairs=options.exchange_pairs,
            seed=args.seed,
            report=lambda line: self.console.print(line, soft_wrap=True),
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the pruner."""
        if self.diagnosis is not None:
            self.diagnosis.detach()


def _fixed_batches(prepared: Prepared, wanted: int) -> tuple[list[Any], int]:
    """Whole batches of training examples, drawn once; and how many examples they hold."""
    trainer, train = prepared.trainer, prepared.task.train
    size = min(trainer.args.eval_batch_size, len(train))
    if not size:
        raise ValueError("there are no training examples to measure the loss on")
    count = min(wanted, len(train) // size) * size
    generator = torch.Generator().manual_seed(trainer.args.seed)
    chosen = torch.randperm(len(train), generator=generator)[:count].tolist()
    with random_state.untouched():
        return list(trainer.get_eval_dataloader(train.select(chosen))), count
