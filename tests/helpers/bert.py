"""A tiny BERT, sentences for it and a Trainer's arguments: shared by the tests of the integrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from pins_ext.integrations.callback import PinsCallback
from pins_ext.pruning.config import PruneConfig

STEPS = 14
CONFIG = PruneConfig(sparsity=0.75, delta_t=2, warmup=2, cooldown=4)


def model(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    """A tiny BERT of three classes, dropout included."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=32, num_labels=3, **changes))


WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def data(n: int = 44) -> list[dict[str, Tensor]]:
    """Sentences of several lengths whose first token tells their class."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(n):
        ids = torch.randint(3, 40, (4 + i % 3,), generator=generator)
        ids[0] = i % 3
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(i % 3)})
    return made


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad to the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    padded = {k: pad([row[k] for row in batch], batch_first=True) for k in ("input_ids", "attention_mask")}
    return padded | {"labels": torch.stack([row["labels"] for row in batch])}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Fourteen steps of two batches of four, a checkpoint every fourth; the Trainer prints nothing."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "logging_steps": 3,
        "save_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(str(folder), **(settings | changes))


def stock(net: Any, args: TrainingArguments, *callbacks: Any, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """A Trainer as its own documentation builds it."""
    return kind(
        model=net,
        args=args,
        train_dataset=data(),
        eval_dataset=data(9),
        data_collator=collate,
        callbacks=list(callbacks),
        **options,
    )


def weights(run: Trainer) -> dict[str, Tensor]:
    """Copies of the model's tensors by name."""
    assert run.model is not None
    return {name: t.clone() for name, t in run.model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def pins(run: Trainer) -> PinsCallback:
    """The Trainer's PinsCallback."""
    return next(c for c in run.callback_handler.callbacks if isinstance(c, PinsCallback))


def assert_at_target(callback: PinsCallback) -> None:
    """Exactly the zeros that were asked for."""
    final, pruner = callback.final, callback.pruner
    assert final is not None
    assert pruner is not None
    assert final["zeros"] == pruner.n_weights - round((1 - pruner.config.sparsity) * pruner.n_weights)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "logging_steps": 1}


class Looks(TrainerCallback):
    """Share of pruned weights that were zero in each evaluation's last forward pass, and right after it."""

    def __init__(self) -> None:
        self.during: list[float] = []
        self.after: list[bool] = []

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = kwargs["model"].pins
        self.during.append(found.pruner.stats()["zeros"] if found.pruner.masks.chosen else -1.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(kwargs["model"].pins.pruner.masks.in_view)
