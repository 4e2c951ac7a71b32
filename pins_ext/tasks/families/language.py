"""Causal language modelling: predict each token of running text from those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pins_ext.tasks.arguments import TaskError
from pins_ext.tasks.families.causal import CausalTask
from pins_ext.tasks.labels import IGNORED
from pins_ext.tasks.metrics import perplexity
from pins_ext.tasks.splits import sample

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

_LINES_AT_ONCE = 2000


@dataclass(frozen=True, kw_only=True)
class LanguageTask(CausalTask):
    """A task of running text, cut into blocks of `max_length` tokens.

    Its splits have the column text, a line each with its end; after `tokenized` one row per block.

    Attributes:
        max_train_samples: train on at most so many blocks, drawn with `split_seed`.
        max_eval_samples: validate and test on at most so many each.
    """

    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    split_seed: int = 0
    metrics: tuple[str, ...] = ("perplexity",)

    greater_is_better = False
    points = 1.0

    def encode(self, examples: Dataset, tokenizer: PreTrainedTokenizerBase, split: str) -> Dataset:
        """Returns blocks of token ids, all lines joined; the last one is shorter. Every token is its own label."""
        from datasets import Dataset

        lines, parts = list(examples["text"]), []
        for begin in range(0, len(lines), _LINES_AT_ONCE):
            encoded = tokenizer(lines[begin : begin + _LINES_AT_ONCE], add_special_tokens=False)["input_ids"]
            parts.append(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded]))
        ids = np.concatenate(parts)
        blocks = [ids[begin : begin + self.max_length] for begin in range(0, len(ids), self.max_length)]
        # A single token has none before it.
        blocks = [block for block in blocks if len(block) > 1]
        if not blocks:
            raise TaskError(f"{self.name}: the {split} text has {len(ids)} tokens, too few to predict one from another")
        limit = self.max_train_samples if split == "train" else self.max_eval_samples
        return sample(Dataset.from_dict({"input_ids": blocks, "labels": blocks}), limit, self.split_seed)

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """Returns summed loss and number of predicted tokens, float64 [batch, 2], in place of a vocabulary's logits."""
        import torch
        import torch.nn.functional as F

        logits = logits[0] if isinstance(logits, tuple) else logits
        rows = []
        for row, truth in zip(logits[:, :-1], labels[:, 1:], strict=True):
            loss = F.cross_entropy(row.float(), truth, ignore_index=IGNORED, reduction="sum")
            rows.append(torch.stack([loss.double(), (truth != IGNORED).sum().double()]))
        return torch.stack(rows)

    def compute_metrics(
        self, prediction: EvalPrediction, split: str = "validation", model: PreTrainedModel | None = None
    ) -> dict[str, float]:
        """Computes exp of the mean loss over all predicted tokens."""
        loss, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
        return {"perplexity": perplexity(float(loss), int(tokens))}

    def baseline(self, split: str = "validation") -> dict[str, float]:
        """Returns the perplexity of training's token frequencies, each counted once more than it occurs."""
        size = len(self.fitted_tokenizer())
        if split not in self.splits():
            raise TaskError(f"task {self.name} has no {split} split; it has {', '.join(self.splits())}")
        counts = np.bincount(np.concatenate(self.train["input_ids"]), minlength=size) + 1
        losses = math.log(counts.sum()) - np.log(counts)
        ids = np.concatenate([block[1:] for block in self.splits()[split]["input_ids"]])
        return {"perplexity": perplexity(float(losses[ids].sum()), len(ids))}

    @property
    def baseline_name(self) -> str:
        return "token frequencies"

    def sizes(self) -> dict[str, int]:
        """Returns the number of blocks of each split, or of lines before there are blocks."""
        return {name: len(split) for name, split in self.splits().items()}

    def length_notes(self, train: Dataset) -> tuple[str, ...]:
        """Returns what the perplexity refers to."""
        return (
            f"examples are blocks of {self.max_length} tokens; perplexity is per token of this model's tokenizer, "
            "and the first token of a block is not predicted",
        )
