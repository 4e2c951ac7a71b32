"""Token classification: entities in sentences that are split into words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from pins_ext.tasks.labels import IGNORED, Labels
from pins_ext.tasks.metrics import evaluate_entities
from pins_ext.tasks.task import Task, encoded

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import (
        DataCollatorForTokenClassification,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
    from typing_extensions import Self

NO_ENTITY = "O"

WORDS = "words"
"""A column beside the inputs: the words whose tags a row's labels are, in order."""

_NOT_FINITE = -1


@dataclass(frozen=True, kw_only=True)
class TokenTask(Task):
    """A task of entities, tagged word by word in IOB (O, B-type, I-type).

    Its splits have the columns tokens (words) and tags (ids); after `tokenized` the model's inputs and labels.

    Attributes:
        tags: the tag set.
    """

    tags: Labels
    metrics: tuple[str, ...] = ("f1", "precision", "recall")

    auto_class = "AutoModelForTokenClassification"
    fast_tokenizer_tells = "which word a token belongs to"
    # Byte-level tokenizers mark the space before a word; words that come one by one have none.
    tokenizer_kwargs = MappingProxyType({"add_prefix_space": True})

    @property
    def label_names(self) -> tuple[str, ...]:
        """Tags by id."""
        return self.tags.names

    def model_kwargs(self) -> dict[str, Any]:
        """Returns the tags as the model's config keeps them."""
        return self.tags.model_kwargs()

    def numbered_as(self, names: Sequence[str]) -> Self:
        """Returns the task with its tags numbered as a model's, where these are the same tags."""
        found = self.tags.numbered_as(names)
        # Scores read the spelling of a tag.
        if found is None or {*names} != {*self.tags.names} or self.tags.names == tuple(names):
            return self
        tags, ids = found

        def renumber(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
            return {"tags": [[ids[i] for i in row] for row in batch["tags"]]}

        splits = {name: split.map(renumber, batched=True, keep_in_memory=True) for name, split in self.splits().items()}
        return replace(self, tags=tags, **splits)

    def encode(self, examples: Dataset, tokenizer: PreTrainedTokenizerBase, split: str) -> Dataset:
        """Returns token ids; the first token of each word carries the word's tag, all others are ignored."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            tokens = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=self.max_length)
            firsts = [first_tokens(tokens.word_ids(i)) for i in range(len(batch["tags"]))]
            labels = [
                [IGNORED if word is None else tags[word] for word in words]
                for words, tags in zip(firsts, batch["tags"], strict=True)
            ]
            return {**tokens, "labels": labels, WORDS: [[w for w in words if w is not None] for words in firsts]}

        return encoded(examples, encode, split)

    @property
    def collator(self) -> DataCollatorForTokenClassification:
        """Pads inputs and labels of each batch to its longest input."""
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(self.fitted_tokenizer())

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """Returns predicted tags int64 [batch, length]; negative where the logits are not finite."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        predicted: Tensor = logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), _NOT_FINITE)
        return predicted

    def compute_metrics(
        self, prediction: EvalPrediction, split: str = "validation", model: PreTrainedModel | None = None
    ) -> dict[str, float]:
        """Scores the entities of every sentence; words that were cut off count as outside of entities."""
        predicted, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if (predicted[labels != IGNORED] < 0).any():
            return dict.fromkeys(self.metrics, float("nan"))
        gold, found = [], []
        rows = zip(self.as_read(split)["tags"], self.splits()[split][WORDS], predicted, labels, strict=True)
        for tags, words, ids, row in rows:
            answer = [NO_ENTITY] * len(tags)
            for word, tag in zip(words, self._names(ids[row != IGNORED]), strict=True):
                answer[word] = tag
            gold.append(self._names(tags))
            found.append(answer)
        return evaluate_entities(gold, found)

    def baseline(self, split: str = "validation") -> dict[str, float]:
        """Returns the metrics of giving every word the tag that it most often has in training."""
        seen: defaultdict[str, Counter[int]] = defaultdict(Counter)
        train, examples = self.as_read("train"), self.as_read(split)
        for words, tags in zip(train["tokens"], train["tags"], strict=True):
            for word, tag in zip(words, tags, strict=True):
                seen[word][tag] += 1
        usual = {word: self.tags.names[counts.most_common(1)[0][0]] for word, counts in seen.items()}
        gold = [self._names(tags) for tags in examples["tags"]]
        return evaluate_entities(gold, [[usual.get(word, NO_ENTITY) for word in words] for words in examples["tokens"]])

    @property
    def baseline_name(self) -> str:
        return "each word's usual tag"

    def description(self) -> list[str]:
        """Returns the number of entities of each type in every split."""
        kinds = sorted({name[2:] for name in self.label_names if name != NO_ENTITY})
        width = max(map(len, kinds))
        counts = {name: self._entities(self.as_read(name)) for name in self.splits()}
        return [
            f"entity    {kind:<{width}}  " + " · ".join(f"{name} {count[kind]:,}" for name, count in counts.items())
            for kind in kinds
        ]

    def _entities(self, examples: Dataset) -> Counter[str]:
        names = (self._names(tags) for tags in examples["tags"])
        return Counter(tag[2:] for tags in names for tag in tags if tag.startswith("B-"))

    def _names(self, ids: Sequence[int]) -> list[str]:
        return [self.tags.names[i] for i in ids]


def first_tokens(word_ids: Sequence[int | None]) -> list[int | None]:
    """Returns the word of every token that is the first of its word, None for all other tokens.

    A word of which the tokenizer leaves nothing does not occur.
    """
    firsts, before = [], None
    for word in word_ids:
        firsts.append(word if word != before else None)
        before = word
    return firsts
