"""What every task is to the commands, whatever its family: splits, a kind of model, inputs, batches and scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from pins_ext.tasks.arguments import TaskError
from pins_ext.tasks.recipes import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self

SPLITS = ("train", "validation", "test")


def encoded(
    examples: Dataset,
    encode: Callable[[dict[str, list[Any]]], Mapping[str, list[Any]]],
    split: str,
    keep: Collection[str] = (),
) -> Dataset:
    """Returns what `encode` makes of batches of examples, held in memory, with the columns to keep beside it."""
    return examples.map(
        encode,
        batched=True,
        remove_columns=[name for name in examples.column_names if name not in keep],
        keep_in_memory=True,
        desc=f"tokenising {split} examples",
    )


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task of one family; each family is a subclass.

    Attributes:
        name: as in --task, or "files".
        train: examples as read; after `tokenized` the model's inputs and labels.
        validation: likewise.
        test: likewise.
        metrics: names, the main one first.
        source: where the data comes from.
        licence: its terms.
        max_length: longest input in tokens.
        notes: what a reader of the results should know.
        recipe: published or tried settings, if there are any.
        tokenizer: that of the inputs, once there is one.
        examples: the splits as read, once the others are tokenised; a score needs them where inputs are cut up.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset | None = None
    metrics: tuple[str, ...]
    source: str
    licence: str
    max_length: int
    notes: tuple[str, ...] = ()
    recipe: Recipe | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    examples: Mapping[str, Dataset] = field(default_factory=dict)

    auto_class: ClassVar[str]
    """The class of transformers that loads the model with its head."""

    greater_is_better: ClassVar[bool] = True
    """The direction of the main metric."""

    points: ClassVar[float] = 100.0
    """What one unit of the main metric is in points: a share counts from 0 to 1, and is spoken of in percent."""

    loss_over_step: ClassVar[bool] = False
    """Whether the model's own loss divides by the items of a whole optimizer step, not of its batch."""

    embedded_model: ClassVar[bool] = True
    """Whether the embedded encoder can learn this task."""

    tokenizer_kwargs: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What `from_pretrained` of the tokenizer needs."""

    fast_tokenizer_tells: ClassVar[str | None] = None
    """What only a fast tokenizer can say, where this family needs to hear it."""

    training_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Trainer arguments that fit this family better than the command's own defaults."""

    # ---- what a family says of itself --------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, examples: Dataset, tokenizer: PreTrainedTokenizerBase, split: str) -> Dataset:
        """Returns the model's inputs and labels, cut at `max_length`, not yet padded, held in memory."""

    @abstractmethod
    def compute_metrics(
        self, prediction: EvalPrediction, split: str = "validation", model: PreTrainedModel | None = None
    ) -> dict[str, float]:
        """Computes all metrics from a Trainer's predictions for a split.

        Args:
            model: the one that predicted, in evaluation mode; a family that generates needs it.
        """

    @abstractmethod
    def baseline(self, split: str = "validation") -> dict[str, float]:
        """Returns the metrics of a prediction that needs no model, made from the training split alone."""

    @property
    @abstractmethod
    def baseline_name(self) -> str:
        """What the baseline does, in two or three words."""

    def model_kwargs(self) -> dict[str, Any]:
        """Returns what `from_pretrained` of the model needs, so that its config knows the task."""
        return {}

    def numbered_as(self, names: Sequence[str]) -> Self:
        """Returns the task with its classes numbered and spelled as a model's, where these are the same classes.

        Args:
            names: of the model's classes, in their order.

        Raises:
            TaskError: a metric of the task is that of one class by its number.
        """
        return self

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuses a model that cannot do this task.

        Raises:
            TaskError: with what to do about it.
        """
        places = getattr(model.config, "max_position_embeddings", None)
        if places is not None and 0 < places < self.max_length:
            raise TaskError(
                f"the model has {places} positions, and inputs have up to {self.max_length} tokens: choose a smaller "
                "--max-length"
            )

    @property
    def collator(self) -> Any:
        """Makes a batch of inputs, padded to the longest."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.fitted_tokenizer())

    def reduce_logits(self, logits: Any, labels: Tensor) -> Any:
        """Returns what `compute_metrics` needs of a batch's outputs; only that is kept of an evaluation."""
        return logits

    @property
    def has_classes(self) -> bool:
        """Whether the model's outputs are distributions, whose entropy self-regularization can adapt to."""
        return True

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names by id, if there are any."""
        return ()

    def description(self) -> list[str]:
        """Returns lines about the family's own side of the data."""
        return []

    # ---- what is the same for all ------------------------------------------------------------------------------------

    @classmethod
    def of_splits(cls, splits: Sequence[Dataset], **values: Any) -> Self:
        """Returns a task of this family.

        Args:
            splits: train, validation and, if there is one, test.
            values: the other attributes.
        """
        train, validation, *test = splits
        return cls(train=train, validation=validation, test=test[0] if test else None, **values)

    @property
    def main_metric(self) -> str:
        """The metric that the field reports."""
        return self.metrics[0]

    def splits(self) -> dict[str, Dataset]:
        """Returns the splits there are, by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def as_read(self, split: str) -> Dataset:
        """Returns the examples of a split before they were tokenised.

        Raises:
            TaskError: if there is no such split.
        """
        splits = self.examples or self.splits()
        if split not in splits:
            raise TaskError(f"task {self.name} has no {split} split; it has {', '.join(splits)}")
        return splits[split]

    def sizes(self) -> dict[str, int]:
        """Returns the number of examples of each split."""
        return {name: len(self.as_read(name)) for name in self.splits()}

    def tokenized(self, tokenizer: PreTrainedTokenizerBase) -> Task:
        """Returns the task with the model's inputs in place of its examples.

        The result is held in memory: nothing is written to the `datasets` cache, which may be read-only.

        Raises:
            TaskError: if the tokenizer does not fit, or the task is tokenised already.
        """
        if self.tokenizer is not None:
            raise TaskError(f"task {self.name} is tokenised already")
        self.check_tokenizer(tokenizer)
        longest = tokenizer.model_max_length
        fitted = replace(self, max_length=min(self.max_length, longest))
        cut = (f"inputs have at most {longest} tokens, as the tokenizer says, not {self.max_length}",)
        inputs = {name: fitted.encode(split, tokenizer, name) for name, split in self.splits().items()}
        return replace(
            fitted,
            **inputs,
            notes=(*self.notes, *(cut if longest < self.max_length else ()), *fitted.length_notes(inputs["train"])),
            tokenizer=tokenizer,
            examples=self.splits(),
        )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses a tokenizer that cannot be used.

        Raises:
            TaskError: with what to do about it.
        """
        if self.fast_tokenizer_tells is not None and not tokenizer.is_fast:
            raise TaskError(
                f"the tokenizer {tokenizer.name_or_path} is not a fast one and can't say {self.fast_tokenizer_tells}: "
                "save its fast version (tokenizer.json) beside the model"
            )
        if tokenizer.pad_token is None:
            raise TaskError(
                f"the tokenizer {tokenizer.name_or_path} has no padding token; set tokenizer.pad_token (often the "
                "end-of-text token) and the model's config.pad_token_id, and save both beside the model"
            )

    def length_notes(self, train: Dataset) -> tuple[str, ...]:
        """Returns what a reader should know of the training inputs' lengths; nothing where all have room."""
        full = sum(len(ids) >= self.max_length for ids in train["input_ids"])
        if not full:
            return ()
        return (f"{full / len(train):.1%} of the training inputs reach the limit of {self.max_length} tokens",)

    def fitted_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer.

        Raises:
            TaskError: if the task is not tokenised yet.
        """
        if self.tokenizer is None:
            raise TaskError(f"task {self.name} has texts, not tokens yet: use tokenized(tokenizer)")
        return self.tokenizer

    def describe(self) -> str:
        """Returns counts, baseline, source, licence and the family's own lines as text."""
        counts = " · ".join(f"{name} {size:,}" for name, size in self.sizes().items())
        baseline = ", ".join(f"{name} {value:.3f}" for name, value in self.baseline().items())
        lines = [
            f"task      {self.name}",
            f"source    {self.source}",
            f"licence   {self.licence}",
            f"examples  {counts}",
            *self.description(),
            f"baseline  {baseline} on validation, {self.baseline_name}",
            f"metric    {self.main_metric}" + "".join(f", {name}" for name in self.metrics[1:]),
            f"length    at most {self.max_length} tokens",
            *(f"note      {note}" for note in self.notes),
        ]
        return "\n".join(lines)
