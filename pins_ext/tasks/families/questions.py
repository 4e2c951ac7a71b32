"""Extractive question answering: the answer is a span of the context, or there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pins_ext.tasks.arguments import TaskError
from pins_ext.tasks.metrics import evaluate_answers
from pins_ext.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

_LONGEST_QUESTION = 64
"""Tokens of a question that are kept (Devlin et al. 2019)."""

_STRIDE = 128

_NOWHERE = (-1, -1)


@dataclass(frozen=True, kw_only=True)
class QuestionTask(Task):
    """A task of questions about a context; long contexts are cut into windows that overlap.

    Its splits have the columns question, context, answers and starts; after `tokenized` one row per window.

    Attributes:
        doc_stride: tokens that neighbouring windows share; None is 128, or half a window where that is less.
        n_best_size: starts and ends considered per window.
        max_answer_length: in tokens.
        null_score_threshold: no answer is given where its score is above the best span's by more; None: never.
    """

    doc_stride: int | None = None
    n_best_size: int = 20
    max_answer_length: int = 30
    null_score_threshold: float | None = None
    metrics: tuple[str, ...] = ("f1", "exact_match")

    auto_class = "AutoModelForQuestionAnswering"
    fast_tokenizer_tells = "where a token is in its text"
    # SQuAD's own scores count from 0 to 100.
    points = 1.0

    def encode(self, examples: Dataset, tokenizer: PreTrainedTokenizerBase, split: str) -> Dataset:
        """Returns windows with the positions of the first right answer, or of the first token where it has none.

        For evaluation a row also knows the index of its example, and the characters of every context token.
        """
        questions = self._cut(list(examples["question"]), tokenizer)
        stride = self._stride(questions, tokenizer)

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            windows = tokenizer(
                [questions[i] for i in indices],
                batch["context"],
                truncation="only_second",
                max_length=self.max_length,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            owners = windows.pop("overflow_to_sample_mapping")
            offsets = [
                [span if part == 1 else _NOWHERE for span, part in zip(spans, windows.sequence_ids(i), strict=True)]
                for i, spans in enumerate(windows.pop("offset_mapping"))
            ]
            spans = [
                span_of(offsets[i], batch["answers"][owner], batch["starts"][owner]) for i, owner in enumerate(owners)
            ]
            columns = {**windows, "start_positions": [s for s, _ in spans], "end_positions": [e for _, e in spans]}
            if split != "train":
                columns |= {"example": [indices[owner] for owner in owners], "offsets": offsets}
            return columns

        return examples.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=examples.column_names,
            keep_in_memory=True,
            desc=f"tokenising {split} questions",
        )

    def _cut(self, questions: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Questions without leading space, at most a third of an input long."""
        questions = [question.lstrip() for question in questions]
        limit = min(_LONGEST_QUESTION, self.max_length // 3)
        spans = tokenizer(
            questions, add_special_tokens=False, truncation=True, max_length=limit, return_offsets_mapping=True
        )["offset_mapping"]
        return [text[: offsets[-1][1]] if offsets else text for text, offsets in zip(questions, spans, strict=True)]

    def _stride(self, questions: list[str], tokenizer: PreTrainedTokenizerBase) -> int:
        longest = max(len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"])
        room = self.max_length - longest - tokenizer.num_special_tokens_to_add(pair=True)
        if self.doc_stride is None:
            return min(_STRIDE, room // 2)
        if self.doc_stride >= room:
            raise TaskError(
                f"--doc-stride {self.doc_stride} leaves windows no way to move: beside the longest question there is "
                f"room for {room} tokens of context; choose a smaller one, or a larger --max-length"
            )
        return self.doc_stride

    def compute_metrics(
        self, prediction: EvalPrediction, split: str = "validation", model: PreTrainedModel | None = None
    ) -> dict[str, float]:
        """Scores the best span over all windows of each question, or no answer, against all right answers."""
        starts, ends = (np.asarray(logits) for logits in prediction.predictions[:2])
        if not (np.isfinite(starts).all() and np.isfinite(ends).all()):
            return dict.fromkeys(self.metrics, float("nan"))
        examples, windows = self.as_read(split), self.splits()[split]
        found = self._answers(list(examples["context"]), windows, starts, ends)
        return evaluate_answers(found, _gold(examples))

    def _answers(
        self, contexts: list[str], windows: Dataset, starts: NDArray[np.floating], ends: NDArray[np.floating]
    ) -> dict[str, str]:
        best = [(-np.inf, "")] * len(contexts)
        no_answer = np.full(len(contexts), np.inf)
        for example, offsets, start, end in zip(windows["example"], windows["offsets"], starts, ends, strict=True):
            no_answer[example] = min(no_answer[example], start[0] + end[0])
            span = best_span(start, end, np.asarray(offsets), self.n_best_size, self.max_answer_length)
            if span is not None and span[0] > best[example][0]:
                best[example] = (span[0], contexts[example][span[1] : span[2]])
        threshold = np.inf if self.null_score_threshold is None else self.null_score_threshold
        return {
            str(i): "" if none - score > threshold else text
            for i, ((score, text), none) in enumerate(zip(best, no_answer, strict=True))
        }

    def baseline(self, split: str = "validation") -> dict[str, float]:
        """Returns the metrics of never answering: 0 where every question has an answer."""
        gold = _gold(self.as_read(split))
        return evaluate_answers(dict.fromkeys(gold, ""), gold)

    @property
    def baseline_name(self) -> str:
        return "never answering"

    def length_notes(self, train: Dataset) -> tuple[str, ...]:
        """Returns into how many windows the training questions were cut."""
        return (
            f"{len(self.train):,} training questions make {len(train):,} windows of up to {self.max_length} tokens",
        )

    def description(self) -> list[str]:
        """Returns the share of questions without an answer in every split."""
        shares = {name: float(np.mean([not a for a in self.as_read(name)["answers"]])) for name in self.splits()}
        return ["unanswerable  " + " · ".join(f"{name} {share:.3f}" for name, share in shares.items())]


def span_of(offsets: Sequence[Sequence[int]], answers: Sequence[str], starts: Sequence[int]) -> tuple[int, int]:
    """Returns the first and last token of the first answer; (0, 0) if there is none or it is not whole in the window.

    Args:
        offsets: characters of every token, end exclusive; negative outside of the context.
    """
    if not answers:
        return 0, 0
    begin, end = starts[0], starts[0] + len(answers[0])
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > begin and last > first]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def best_span(
    start: NDArray[np.floating],
    end: NDArray[np.floating],
    offsets: NDArray[np.integer],
    n_best: int,
    max_length: int,
) -> tuple[float, int, int] | None:
    """Returns score and characters of the likeliest span of a window, among its n best starts and ends; None: there is
    no possible one.

    Args:
        start: logits [at least length]; what follows the window is padding.
        end: likewise.
        offsets: int [length, 2], negative outside of the context.
        max_length: of a span, in tokens.
    """
    context = np.flatnonzero(offsets[:, 0] >= 0)
    first, last = (context[np.argsort(-scores[context], kind="stable")[:n_best]] for scores in (start, end))
    lengths = last[None, :] - first[:, None] + 1
    scores = np.where((lengths >= 1) & (lengths <= max_length), start[first][:, None] + end[last][None, :], -np.inf)
    if not scores.size or np.isneginf(scores.max()):
        return None
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[i, j]), int(offsets[first[i], 0]), int(offsets[last[j], 1])


def _gold(examples: Dataset) -> dict[str, Sequence[str]]:
    return {str(i): answers for i, answers in enumerate(examples["answers"])}
