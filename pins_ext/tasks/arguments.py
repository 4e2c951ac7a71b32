"""What to train on: the one configuration of the task, and the error that bad input ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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
            "help": "stdlib (the default: which area of Python's library does a passage come from; no download) or "
            "glue/cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli. Leave it out with --train-file."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with the files of a GLUE task (train.tsv, dev.tsv, ...), read instead of the hub."},
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "Training data of your own: .csv, .tsv (no quoting), .json or .jsonl, each also as .gz."},
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
        default=None, metadata={"help": "Train on at most so many examples, drawn evenly from the classes."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate and test on at most so many examples each, drawn evenly."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest input in tokens; longer ones are cut. Default: 48 for stdlib, 128 otherwise."},
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
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TaskError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.max_length is not None and self.max_length < 4:
            raise TaskError(f"--max-length must be at least 4 tokens, got {self.max_length}")
        if self.label_type not in ("auto", "class", "number"):
            raise TaskError(f"--label-type must be auto, class or number, got {self.label_type!r}")
