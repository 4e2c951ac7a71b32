"""The sentence and sentence-pair tasks of GLUE (Wang et al. 2019), from the hub or from a folder in the layouts of its
distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pins_ext.tasks.labels import Labels
from pins_ext.tasks.sources.files import read_rows, read_table
from pins_ext.tasks.sources.hub import HubSet, read_hub
from pins_ext.tasks.sources.rows import Rows
from pins_ext.tasks.splits import find_files

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = "nyu-mll/glue"

HUB_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
"""Parquet files only: `datasets` runs no loading scripts any more, and a fixed revision keeps results comparable."""

LICENCE = "the terms of the set's own authors; GLUE adds none"

_SUFFIXES = (".tsv", ".tsv.gz", ".csv", ".csv.gz", ".jsonl", ".json")


@dataclass(frozen=True)
class GlueTask:
    """One task: where its texts and labels stand, and what the field reports of it.

    Attributes:
        texts: columns of the texts on the hub and, where `local_texts` is not given, in the files.
        label: the column of the label, likewise with `local_label`.
        names: classes by id, as on the hub; empty for a regression.
        metrics: the first is the main one.
        splits: of the hub that hold labels: train, validation, test; the file names follow in `files`.
        header: the columns of files without a header line.
        skip_incomplete: the distribution itself has broken rows.
    """

    texts: tuple[str, ...]
    names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    label: str = "label"
    local_texts: tuple[str, ...] | None = None
    local_label: str | None = None
    hub_splits: tuple[str, ...] = ("train", "validation")
    files: tuple[tuple[str, ...], ...] = (("train",), ("dev", "validation"))
    header: tuple[str, ...] | None = None
    skip_incomplete: bool = False


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        texts=("sentence",),
        names=("unacceptable", "acceptable"),
        metrics=("matthews_correlation", "accuracy"),
        header=("source", "label", "original_mark", "sentence"),
    ),
    "sst2": GlueTask(texts=("sentence",), names=("negative", "positive")),
    "mrpc": GlueTask(
        texts=_PAIR,
        names=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        local_texts=("#1 String", "#2 String"),
        local_label="Quality",
        files=(("train", "msr_paraphrase_train"), ("dev", "validation"), ("msr_paraphrase_test",)),
    ),
    "stsb": GlueTask(texts=_PAIR, names=(), metrics=("pearson_spearman", "pearson", "spearman"), local_label="score"),
    "qqp": GlueTask(
        texts=("question1", "question2"),
        names=("not_duplicate", "duplicate"),
        metrics=("f1", "accuracy"),
        local_label="is_duplicate",
        skip_incomplete=True,
    ),
    "mnli": GlueTask(
        texts=("premise", "hypothesis"),
        names=("entailment", "neutral", "contradiction"),
        local_texts=_PAIR,
        local_label="gold_label",
        hub_splits=("train", "validation_matched", "validation_mismatched"),
        files=(("train",), ("dev_matched", "validation_matched"), ("dev_mismatched", "validation_mismatched")),
    ),
    "qnli": GlueTask(texts=("question", "sentence"), names=_ENTAILMENT),
    "rte": GlueTask(texts=_PAIR, names=_ENTAILMENT),
    "wnli": GlueTask(texts=_PAIR, names=("not_entailment", "entailment")),
}


def glue_labels(name: str) -> Labels:
    """Returns the classes of a task; files may write a class by its name or its id."""
    names = GLUE[name].names
    return Labels(names, {str(i): label for i, label in enumerate(names)})


def read_glue_folder(name: str, folder: str | Path) -> list[Rows]:
    """Reads the train, validation and, where the task has a labelled one, test split from local files.

    Raises:
        TaskError: if a file or column is missing; a missing test file is not an error.
    """
    task = GLUE[name]
    files = find_files(folder, f"glue/{name}", task.files, _SUFFIXES)
    return [_read_glue_file(task, path) for path in files if path is not None]


def _read_glue_file(task: GlueTask, path: Path) -> Rows:
    table = read_table(path, task.header if ".tsv" in path.name else None, task.skip_incomplete)
    # Files exported from the hub carry its column names, those of the distribution their own.
    local = task.local_texts or task.texts
    texts = local if all(column in table.columns for column in local) else task.texts
    label = task.local_label if task.local_label in table.columns else task.label
    return read_rows(table, texts, label)


def glue_set(name: str) -> HubSet:
    """Returns where the hub has a task."""
    return HubSet(HUB_NAME, HUB_REVISION, name)


def files_needed(name: str) -> str:
    """Returns what a folder of a task's files has to hold, in words."""
    return " and ".join(f"{stems[0]}.tsv" for stems in GLUE[name].files[:2])


def read_glue_hub(name: str) -> list[Rows]:
    """Reads the labelled splits of a task from the hub or its local cache, which may be read-only.

    Raises:
        TaskError: if there is neither network nor a cached copy.
    """
    task = GLUE[name]
    data = read_hub(f"glue/{name}", glue_set(name), task.hub_splits, files_needed(name))
    return [_hub_rows(f"glue/{name} {split}", task, data[split]) for split in task.hub_splits]


def _hub_rows(origin: str, task: GlueTask, data: Dataset) -> Rows:
    columns = [list(data[column]) for column in task.texts]
    return Rows(
        origin=origin,
        text=columns[0],
        pair=columns[1] if len(columns) == 2 else None,
        labels=list(data[task.label]),
        lines=list(range(1, len(data) + 1)),
    )
