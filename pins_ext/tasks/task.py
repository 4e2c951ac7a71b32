"""A task: its examples, labels and metrics, ready for a Trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pins_ext.tasks.arguments import TaskError
from pins_ext.tasks.labels import Labels, class_shares
from pins_ext.tasks.metrics import evaluate
from pins_ext.tasks.recipes import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """A sequence classification or regression task.

    Attributes:
        name: as in --task, or "files".
        train, validation, test: columns text, (text_pair) and labels; after `tokenized` the model's inputs and labels.
            labels are class ids, or floats for a regression.
        labels: the classes.
        metrics: names, the main one first.
        source, licence: where the text comes from, and its terms.
        max_length: longest input in tokens.
        notes: what a reader of the results should know.
        recipe: published or tried settings, if there are any.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset | None
    labels: Labels
    metrics: tuple[str, ...]
    source: str
    licence: str
    max_length: int
    notes: tuple[str, ...] = ()
    recipe: Recipe | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def is_regression(self) -> bool:
        return self.labels.is_regression

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names by id; empty for a regression."""
        return self.labels.names

    @property
    def num_labels(self) -> int:
        """Outputs of the model: one per class, or one for a regression."""
        return max(1, len(self.labels.names))

    @property
    def main_metric(self) -> str:
        """The metric that the field reports; larger is better."""
        return self.metrics[0]

    def model_kwargs(self) -> dict[str, Any]:
        """Returns what `from_pretrained` of a sequence classifier needs, so that its config keeps the label names."""
        kwargs: dict[str, Any] = {
            "num_labels": self.num_labels,
            "problem_type": "regression" if self.is_regression else "single_label_classification",
        }
        if not self.is_regression:
            kwargs["id2label"] = dict(enumerate(self.label_names))
            kwargs["label2id"] = {name: i for i, name in enumerate(self.label_names)}
        return kwargs

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Computes all metrics from a Trainer's predictions: logits, or a tuple that begins with them."""
        outputs = prediction.predictions
        outputs = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        return evaluate(self.metrics, outputs, np.asarray(prediction.label_ids), self.is_regression)

    def baseline(self, split: str = "validation") -> dict[str, float]:
        """Returns the metrics of always answering with training's most frequent class, or its mean.

        Args:
            split: train, validation or test.
        """
        splits = self.splits()
        if split not in splits:
            raise TaskError(f"task {self.name} has no {split} split; it has {', '.join(splits)}")
        train, labels = np.asarray(self.train["labels"][:]), np.asarray(splits[split]["labels"][:])
        if self.is_regression:
            outputs = np.full(len(labels), train.mean())
        else:
            outputs = np.zeros((len(labels), self.num_labels))
            outputs[:, np.bincount(train, minlength=self.num_labels).argmax()] = 1.0
        return evaluate(self.metrics, outputs, labels, self.is_regression)

    def tokenized(self, tokenizer: PreTrainedTokenizerBase) -> Task:
        """Returns the task with token ids in place of texts, cut at `max_length`, not yet padded.

        The result is held in memory: nothing is written to the `datasets` cache, which may be read-only.

        Raises:
            TaskError: if the tokenizer cannot pad, or the task is tokenised already.
        """
        if self.tokenizer is not None:
            raise TaskError(f"task {self.name} is tokenised already")
        if tokenizer.pad_token is None:
            raise TaskError(
                f"the tokenizer {tokenizer.name_or_path} has no padding token; set tokenizer.pad_token (often the "
                "end-of-text token) and the model's config.pad_token_id, and save both beside the model"
            )
        length = min(self.max_length, tokenizer.model_max_length)

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return dict(tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=length))

        def encode_split(split: Dataset, name: str) -> Dataset:
            texts = [column for column in split.column_names if column != "labels"]
            return split.map(
                encode, batched=True, remove_columns=texts, keep_in_memory=True, desc=f"tokenising {name} examples"
            )

        train = encode_split(self.train, "training")
        cut = float(np.mean([len(ids) >= length for ids in train["input_ids"]]))
        return replace(
            self,
            train=train,
            validation=encode_split(self.validation, "validation"),
            test=None if self.test is None else encode_split(self.test, "test"),
            max_length=length,
            notes=(*self.notes, f"{cut:.1%} of the training inputs reach the limit of {length} tokens"),
            tokenizer=tokenizer,
        )

    @property
    def collator(self) -> DataCollatorWithPadding:
        """Pads each batch to its longest input."""
        from transformers import DataCollatorWithPadding

        if self.tokenizer is None:
            raise TaskError(f"task {self.name} has texts, not tokens yet: use tokenized(tokenizer)")
        return DataCollatorWithPadding(self.tokenizer)

    def splits(self) -> dict[str, Dataset]:
        """Returns the splits there are, by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def describe(self) -> str:
        """Returns counts, class balance, baseline, source and licence as lines of text."""
        counts = " · ".join(f"{name} {len(split):,}" for name, split in self.splits().items())
        baseline = ", ".join(f"{name} {value:.3f}" for name, value in self.baseline().items())
        constant = "the training mean" if self.is_regression else "the most frequent class"
        lines = [
            f"task      {self.name}",
            f"source    {self.source}",
            f"licence   {self.licence}",
            f"examples  {counts}",
            *self._label_lines(),
            f"baseline  {baseline} on validation, always answering {constant}",
            f"metric    {self.main_metric}" + "".join(f", {name}" for name in self.metrics[1:]),
            f"length    at most {self.max_length} tokens",
            *(f"note      {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _label_lines(self) -> list[str]:
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
