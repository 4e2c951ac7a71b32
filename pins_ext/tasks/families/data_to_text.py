"""Data-to-text: put a meaning representation into words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pins_ext.tasks.arguments import TaskError
from pins_ext.tasks.families.causal import CausalTask
from pins_ext.tasks.labels import IGNORED
from pins_ext.tasks.metrics import evaluate_texts
from pins_ext.tasks.task import encoded

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

_SEPARATOR = "\n"
"""Between the meaning representation and its text."""

_GENERATED_AT_ONCE = 32

_VALUE = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True, kw_only=True)
class DataToTextTask(CausalTask):
    """A task of pairs: a meaning representation, slot[value] by slot[value], and a text that says the same.

    Its splits have the columns mr and ref, a row per reference. The loss is the reference's alone; a score is that of
    one generated text per meaning representation, against all its references.

    Attributes:
        num_beams: of the search; 1 is greedy.
        max_new_tokens: longest generated text.
    """

    num_beams: int = 1
    max_new_tokens: int = 80
    metrics: tuple[str, ...] = ("bleu",)

    # sacrebleu counts from 0 to 100.
    points = 1.0

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses a tokenizer that cannot end a text."""
        if tokenizer.eos_token is None:
            raise TaskError(
                f"the tokenizer {tokenizer.name_or_path} has no end-of-text token, so no generated text would ever "
                "end; set tokenizer.eos_token and save it beside the model"
            )
        super().check_tokenizer(tokenizer)

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuses a model that looks ahead, or is too short to generate."""
        super().check_model(model)
        places = getattr(model.config, "max_position_embeddings", None)
        if places is not None and self.max_new_tokens >= places:
            raise TaskError(
                f"--max-new-tokens {self.max_new_tokens} leaves nothing of the model's {places} positions to the input"
            )

    def encode(self, examples: Dataset, tokenizer: PreTrainedTokenizerBase, split: str) -> Dataset:
        """Returns meaning representation, reference and end of text as ids; only the latter two have labels."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            prompts = _prompts(batch["mr"], tokenizer)
            texts = tokenizer(batch["ref"], add_special_tokens=False)["input_ids"]
            rows = [
                (prompt + text + [tokenizer.eos_token_id], [IGNORED] * len(prompt) + text + [tokenizer.eos_token_id])
                for prompt, text in zip(prompts, texts, strict=True)
            ]
            return {
                "input_ids": [ids[: self.max_length] for ids, _ in rows],
                "labels": [labels[: self.max_length] for _, labels in rows],
            }

        return encoded(examples, encode, split)

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """Returns nothing of a batch's logits, int64 [batch, 1]: the score is that of generated texts."""
        return labels.new_zeros(len(labels), 1)

    def compute_metrics(
        self, prediction: EvalPrediction, split: str = "validation", model: PreTrainedModel | None = None
    ) -> dict[str, float]:
        """Generates a text for every meaning representation of the split, and scores all of them."""
        if model is None:
            raise ValueError("a data-to-text score needs the model, which generates the texts")
        references = self.references(split)
        return evaluate_texts(self.generate(model, list(references)), list(references.values()))

    def references(self, split: str) -> Mapping[str, list[str]]:
        """Returns meaning representation -> all its references, in the order of the split."""
        found: dict[str, list[str]] = {}
        examples = self.as_read(split)
        for mr, text in zip(examples["mr"], examples["ref"], strict=True):
            found.setdefault(mr, []).append(text)
        return found

    def generate(self, model: PreTrainedModel, mrs: Sequence[str]) -> list[str]:
        """Returns a text for every meaning representation, by greedy or beam search."""
        tokenizer = self.fitted_tokenizer()
        places = getattr(model.config, "max_position_embeddings", None)
        room = None if places is None else places - self.max_new_tokens
        prompts = [ids if room is None else ids[-room:] for ids in _prompts(mrs, tokenizer)]
        texts = [""] * len(mrs)
        # Prompts of like length together need least padding.
        order = np.argsort([len(ids) for ids in prompts], kind="stable")
        for begin in range(0, len(order), _GENERATED_AT_ONCE):
            chosen = order[begin : begin + _GENERATED_AT_ONCE]
            # What is generated must follow its prompt, so padding stands before it.
            batch = tokenizer.pad(
                {"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            ids = cast(Any, model).generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                num_beams=self.num_beams,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            found = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, found, strict=True):
                texts[i] = text.strip()
        return texts

    def baseline(self, split: str = "validation") -> dict[str, float]:
        """Returns the score of the meaning representations' values, one after the other."""
        references = self.references(split)
        return evaluate_texts([" ".join(_VALUE.findall(mr)) for mr in references], list(references.values()))

    @property
    def baseline_name(self) -> str:
        return "the values alone"

    def description(self) -> list[str]:
        """Returns the number of meaning representations in every split."""
        return ["inputs    " + " · ".join(f"{name} {len(self.references(name)):,}" for name in self.splits())]


def _prompts(mrs: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the meaning representations, as they stand before their texts."""
    ids: list[list[int]] = tokenizer([mr + _SEPARATOR for mr in mrs], add_special_tokens=False)["input_ids"]
    return ids
