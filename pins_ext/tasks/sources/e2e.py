"""The E2E data set (Novikova et al. 2017): restaurants as slots and values, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pins_ext.tasks.arguments import TaskArguments, TaskError
from pins_ext.tasks.families.data_to_text import DataToTextTask
from pins_ext.tasks.sources.files import read_table
from pins_ext.tasks.sources.hub import PARQUET, HubSet, read_hub
from pins_ext.tasks.splits import count_shared, find_files, sampled, source_of

if TYPE_CHECKING:
    from datasets import Dataset

E2E = HubSet("tuetschek/e2e_nlg", PARQUET)

_STEMS = (("trainset", "train"), ("devset", "dev", "validation"), ("testset_w_refs", "testset", "test"))

_SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".json")

_HUB_COLUMNS = ("meaning_representation", "human_reference")

_DEFAULT_LENGTH = 128


def load_e2e(arguments: TaskArguments, name: str) -> DataToTextTask:
    """Reads E2E from the hub, or from trainset, devset and testset_w_refs in --data-dir.

    Raises:
        TaskError: if a file is missing or malformed, or the hub can't be reached.
    """
    if arguments.data_dir is None:
        data = read_hub(name, E2E, ("train", "validation", "test"), "trainset.csv and devset.csv")
        splits = [_dataset(split[_HUB_COLUMNS[0]], split[_HUB_COLUMNS[1]]) for split in data.values()]
    else:
        paths = find_files(arguments.data_dir, name, _STEMS, _SUFFIXES)
        splits = [read_pairs(path) for path in paths if path is not None]
    shared = [count_shared(splits[0]["mr"], set(split["mr"])) for split in splits[1:]]
    notes = tuple(
        f"{count} meaning representations of {which} also occur in training"
        for count, which in zip(shared, ("validation", "test"), strict=False)
        if count
    )
    return DataToTextTask.of_splits(
        sampled(splits, arguments, draw),
        name=name,
        source=source_of(name, arguments),
        licence="CC BY-SA 4.0",
        max_length=arguments.max_length or _DEFAULT_LENGTH,
        notes=notes,
        num_beams=arguments.num_beams or 1,
        max_new_tokens=arguments.max_new_tokens or 80,
    )


def read_pairs(path: Path) -> Dataset:
    """Reads a table with a meaning representation and a reference per row.

    Raises:
        TaskError: naming the file and the line.
    """
    table = read_table(path)
    columns = next((pair for pair in (("mr", "ref"), _HUB_COLUMNS) if set(pair) <= set(table.columns)), None)
    if columns is None:
        raise TaskError(f"{path}: the columns mr and ref are missing; it has {', '.join(table.columns)}")
    if not table.rows:
        raise TaskError(f"{path} holds no examples")
    for line, row in table.rows:
        for column in columns:
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise TaskError(f"{path}:{line}: {column} must be a text, got {row.get(column)!r}")
    return _dataset(*([row[column] for _, row in table.rows] for column in columns))


def draw(split: Dataset, limit: int | None, seed: int) -> Dataset:
    """Returns at most `limit` meaning representations, each with all its references."""
    mrs: Mapping[str, None] = dict.fromkeys(split["mr"])
    if limit is None or limit >= len(mrs):
        return split
    names = list(mrs)
    drawn = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:limit]}
    return split.select([i for i, mr in enumerate(split["mr"]) if mr in drawn])


def _dataset(mrs: list[str], refs: list[str]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({"mr": list(mrs), "ref": list(refs)})
