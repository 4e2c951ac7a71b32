"""What the examples train on: passages of Python's own documentation, and a small BERT that has learned nothing yet."""

from __future__ import annotations

from typing import Any, NamedTuple

from pins_ext.extras import explained
from pins_ext.tasks.sources.areas import area_names, read_areas

with explained():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.trainers import WordLevelTrainer
    from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

_WORDS = 8000
_LENGTH = 32


class Passages(NamedTuple):
    """Passages with the area of the library they come from; `majority` is the accuracy of a constant answer.

    train and validation are lists of input_ids, attention_mask and labels; collate pads a batch; model has a class per
    area.
    """

    train: Any
    validation: Any
    collate: DataCollatorWithPadding
    model: BertForSequenceClassification
    majority: float


def load() -> Passages:
    """Read, count words, number the areas; the model's weights come from torch's random numbers."""
    splits = read_areas()
    counted = Tokenizer(WordLevel(unk_token="[UNK]"))
    counted.normalizer, counted.pre_tokenizer = Lowercase(), Whitespace()
    counted.train_from_iterator(splits[0].text, WordLevelTrainer(vocab_size=_WORDS, special_tokens=["[PAD]", "[UNK]"]))
    words = PreTrainedTokenizerFast(tokenizer_object=counted, pad_token="[PAD]", unk_token="[UNK]")
    areas = {name: i for i, name in enumerate(area_names())}

    def encoded(rows: Any) -> list[dict[str, Any]]:
        inputs = words(rows.text, truncation=True, max_length=_LENGTH)
        named = zip(inputs["input_ids"], inputs["attention_mask"], rows.labels, strict=True)
        return [{"input_ids": ids, "attention_mask": mask, "labels": areas[label]} for ids, mask, label in named]

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "num_labels": len(areas),
    }
    config = BertConfig(vocab_size=_WORDS, max_position_embeddings=_LENGTH, **sizes)
    train, validation = map(encoded, splits)
    labels = [row["labels"] for row in validation]
    majority = labels.count(max(areas.values(), key=[row["labels"] for row in train].count)) / len(labels)
    return Passages(train, validation, DataCollatorWithPadding(words), BertForSequenceClassification(config), majority)
