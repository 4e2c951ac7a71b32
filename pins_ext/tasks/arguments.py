"""What to train on: the one configuration of the task, and the error that bad input ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

_AT_LEAST_ONE = (
    "max_train_samples",
    "max_eval_samples",
    "doc_stride",
    "n_best_size",
    "max_answer_length",
    "num_beams",
    "max_new_tokens",
)


class TaskError(ValueError):
    """Data or arguments that no task can be made of; the message says what to do."""


@dataclass(frozen=True)
class TaskArguments:
    """Which data to train and evaluate on. Every field is a command-line flag of the same name, with dashes.

    Raises:
        TaskError: if two arguments contradict each other or one is out of range.
    """

    task: str | None = field(
        default=None,
        metadata={
            "help": "stdlib (the default: which area of Python's library does a passage come from; no download), "
            "glue/cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, wnut17, conll2003, squad, squad_v2, wikitext2 or "
            "e2e. Leave it out with --train-file."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with the task's files (train.tsv, train.conll, ...), read instead of the hub."},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training data of your own, also as .gz: a table (.csv, .tsv without quoting, .json, .jsonl), "
            "tagged tokens (.conll), questions in SQuAD's layout (.json) or plain text (.txt)."
        },
    )
    validation_file: str | None = field(
        default=None,
        metadata={"help": "Validation data of your own. Without it, --eval-fraction of the training data is held out."},
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Labelled test data of your own, evaluated once at the end."}
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "The one or two text columns of your files. Default: found by name (sentence, text, ...)."},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "The label column of your files. Default: found by name (label, score, ...)."}
    )
    label_type: Literal["auto", "class", "number"] = field(
        default="auto",
        metadata={"help": "Are the labels of your files classes or numbers to predict? auto: decimals are numbers."},
    )
    eval_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of the training data held out for validation when there is no validation file."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on at most so many examples (wikitext2: blocks), classes drawn evenly."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate and test on at most so many examples each, drawn evenly."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest input in tokens. Default: 48 for stdlib, 384 for questions, 512 for text, else 128."
        },
    )
    doc_stride: int | None = field(
        default=None,
        metadata={"help": "Questions: tokens that neighbouring windows of a long context share. Default: 128."},
    )
    n_best_size: int | None = field(
        default=None, metadata={"help": "Questions: starts and ends considered per window. Default: 20."}
    )
    max_answer_length: int | None = field(
        default=None, metadata={"help": "Questions: longest answer in tokens. Default: 30."}
    )
    null_score_threshold: float | None = field(
        default=None,
        metadata={"help": "squad_v2: no answer, where its score is above the best span's by more. Default: 0."},
    )
    num_beams: int | None = field(
        default=None, metadata={"help": "Data-to-text: beams of the search; 1 is greedy. Default: 1."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Data-to-text: longest generated text in tokens. Default: 80."}
    )
    split_seed: int = field(
        default=0, metadata={"help": "Seed of what --eval-fraction and --max-*-samples draw; training has its own."}
    )

    def __post_init__(self) -> None:
        files = {"--validation-file": self.validation_file, "--test-file": self.test_file}
        columns = {"--text-columns": self.text_columns, "--label-column": self.label_column}
        if self.train_file is None:
            given = [flag for flag, value in (files | columns).items() if value is not None]
            if given:
                raise TaskError(f"{', '.join(given)} goes with --train-file, which is not given")
        elif self.task is not None or self.data_dir is not None:
            raise TaskError("--train-file is a task of its own: leave out --task and --data-dir")
        if self.data_dir is not None and self.task is None:
            raise TaskError("--data-dir needs the task whose files it holds, for example --task glue/rte")
        if self.text_columns is not None and not 1 <= len(self.text_columns) <= 2:
            raise TaskError(f"--text-columns takes one or two columns, got {len(self.text_columns)}")
        if not 0.0 < self.eval_fraction < 1.0:
            raise TaskError(f"--eval-fraction must lie between 0 and 1, got {self.eval_fraction}")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TaskError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.max_length is not None and self.max_length < 4:
            raise TaskError(f"--max-length must be at least 4 tokens, got {self.max_length}")
        if self.label_type not in ("auto", "class", "number"):
            raise TaskError(f"--label-type must be auto, class or number, got {self.label_type!r}")
