"""Sequence classification and regression: one answer for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pins_ext.tasks.arguments import TaskError
from pins_ext.tasks.labels import Labels, class_shares
from pins_ext.tasks.metrics import evaluate
from pins_ext.tasks.task import Task, encoded

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class SequenceTask(Task):
    """A sequence classification or regression task.

    Its splits have the columns text, (text_pair) and labels: class ids, or floats for a regression.

    Attributes:
        labels: the classes.
    """

    labels: Labels

    auto_class = "AutoModelForSequenceClassification"

    @property
    def is_regression(self) -> bool:
        return self.labels.is_regression

    @property
    def has_classes(self) -> bool:
        """Whether the outputs are distributions over classes."""
        return not self.is_regression

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names by id; empty for a regression."""
        return self.labels.names

    @property
    def num_labels(self) -> int:
        """Outputs of the model: one per class, or one for a regression."""
        return max(1, len(self.labels.names))

    def model_kwargs(self) -> dict[str, Any]:
        """Returns what `from_pretrained` of a sequence classifier needs, so that its config keeps the label names."""
        if self.is_regression:
            return {"num_labels": self.num_labels, "problem_type": "regression"}
        return {"problem_type": "single_label_classification", **self.labels.model_kwargs()}

    def numbered_as(self, names: Sequence[str]) -> Self:
        """Returns the task with its classes numbered and spelled as a model's, where these are the same classes."""
        found = self.labels.numbered_as(names)
        if found is None or self.labels.names == tuple(names):
            return self
        labels, ids = found
        moved = any(old != new for old, new in ids.items())
        told = ", ".join(names)
        if moved and "f1" in self.metrics:
            raise TaskError(
                f"the model numbers its classes {told}, and {self.name} {', '.join(self.label_names)}, whose f1 is "
                "that of the second: number the model's alike (id2label in its config.json, and its head's rows)"
            )

        def renumber(batch: dict[str, list[int]]) -> dict[str, list[int]]:
            return {"labels": [ids[i] for i in batch["labels"]]}

        splits = {name: split.map(renumber, batched=True, keep_in_memory=True) for name, split in self.splits().items()}
        notes = (*self.notes, *([f"classes are numbered as the model has them: {told}"] if moved else []))
        return replace(self, labels=labels, notes=notes, **splits)

    def encode(self, examples: Dataset, tokenizer: PreTrainedTokenizerBase, split: str) -> Dataset:
        """Returns token ids in place of texts."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return dict(tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=self.max_length))

        return encoded(examples, encode, split, keep=("labels",))

    def compute_metrics(
        self, prediction: EvalPrediction, split: str = "validation", model: PreTrainedModel | None = None
    ) -> dict[str, float]:
        """Computes all metrics from a Trainer's predictions: logits, or a tuple that begins with them."""
        outputs = prediction.predictions
        outputs = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        return evaluate(self.metrics, outputs, np.asarray(prediction.label_ids), self.is_regression)

    def baseline(self, split: str = "validation") -> dict[str, float]:
        """Returns the metrics of always answering with training's most frequent class, or its mean.

        Args:
            split: train, validation or test.
        """
        train, labels = (np.asarray(self.as_read(name)["labels"][:]) for name in ("train", split))
        if self.is_regression:
            outputs = np.full(len(labels), train.mean())
        else:
            outputs = np.zeros((len(labels), self.num_labels))
            outputs[:, np.bincount(train, minlength=self.num_labels).argmax()] = 1.0
        return evaluate(self.metrics, outputs, labels, self.is_regression)

    @property
    def baseline_name(self) -> str:
        return "training mean" if self.is_regression else "majority class"

    def description(self) -> list[str]:
        """Returns the range of the values, or each class's share of every split."""
        columns = {name: split["labels"][:] for name, split in self.splits().items()}
        if self.is_regression:
            ranges = " · ".join(f"{name} {min(values):g} to {max(values):g}" for name, values in columns.items())
            return [f"values    {ranges}"]
        shares = {name: class_shares(ids, self.num_labels) for name, ids in columns.items()}
        width = max(len(name) for name in self.label_names)
        return [
            f"class {i:<3} {label:<{width}}  " + " · ".join(f"{name} {share[i]:.3f}" for name, share in shares.items())
            for i, label in enumerate(self.label_names)
        ]
