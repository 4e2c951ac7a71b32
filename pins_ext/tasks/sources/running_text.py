"""Running text: wikitext2 from the hub or a folder, and text files of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pins_ext.tasks.arguments import TaskArguments, TaskError
from pins_ext.tasks.families.language import LanguageTask
from pins_ext.tasks.sources.files import opened
from pins_ext.tasks.sources.hub import HubSet, read_hub
from pins_ext.tasks.splits import find_files, source_of

if TYPE_CHECKING:
    from datasets import Dataset

WIKITEXT2 = HubSet("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-2-raw-v1")
"""Parquet files at a fixed commit; the raw version, without <unk>."""

_STEMS = (("wiki.train", "train"), ("wiki.valid", "valid", "validation", "dev"), ("wiki.test", "test"))

_SUFFIXES = (".txt", ".txt.gz", ".tokens", ".raw")

_DEFAULT_LENGTH = 512


def load_wikitext(arguments: TaskArguments, name: str) -> LanguageTask:
    """Reads WikiText-2 from the hub, or from train, valid and test in --data-dir.

    Raises:
        TaskError: if a file is missing, or the hub can't be reached.
    """
    if arguments.data_dir is None:
        data = read_hub(name, WIKITEXT2, ("train", "validation", "test"), "train.txt and valid.txt")
        splits = [split.select_columns("text") for split in data.values()]
    else:
        paths = find_files(arguments.data_dir, name, _STEMS, _SUFFIXES)
        splits = [_dataset(read_lines(path)) for path in paths if path is not None]
    return _assemble(name, arguments, splits, "CC BY-SA (Wikipedia)")


def load_text_files(arguments: TaskArguments, name: str) -> LanguageTask:
    """Reads text files of the user's own; without a validation file the last lines are held out.

    Raises:
        TaskError: naming the file.
    """
    paths = [arguments.train_file, arguments.validation_file, arguments.test_file]
    train, validation, test = (None if path is None else read_lines(path) for path in paths)
    assert train is not None
    notes: tuple[str, ...] = ()
    if validation is None:
        kept = round(len(train) * (1 - arguments.eval_fraction))
        if not 0 < kept < len(train):
            raise TaskError(f"{paths[0]}: {len(train)} lines can't be parted; use --validation-file")
        train, validation = train[:kept], train[kept:]
        # Neighbouring lines are about the same: lines drawn here and there would be known from those around them.
        notes = (f"validation is the last {arguments.eval_fraction:g} of the training file's lines",)
    splits = [_dataset(lines) for lines in (train, validation, test) if lines is not None]
    return _assemble(name, arguments, splits, "that of your files", notes)


def read_lines(path: str | Path) -> list[str]:
    """Reads the lines of a text file, each with its end.

    Raises:
        TaskError: if the file is missing, damaged or empty.
    """
    with opened(path) as file:
        lines = list(file)
    if not any(line.strip() for line in lines):
        raise TaskError(f"{path} is empty")
    return lines


def _assemble(
    name: str,
    arguments: TaskArguments,
    splits: list[Dataset],
    licence: str,
    notes: tuple[str, ...] = (),
) -> LanguageTask:
    return LanguageTask.of_splits(
        splits,
        name=name,
        source=source_of(name, arguments),
        licence=licence,
        max_length=arguments.max_length or _DEFAULT_LENGTH,
        notes=notes,
        max_train_samples=arguments.max_train_samples,
        max_eval_samples=arguments.max_eval_samples,
        split_seed=arguments.split_seed,
    )


def _dataset(lines: list[str]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({"text": lines})
