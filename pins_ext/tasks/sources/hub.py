"""Data sets on the hub, or in its local cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pins_ext.tasks.arguments import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

PARQUET = "refs/convert/parquet"
"""The branch in which the hub keeps a Parquet copy of a set whose own files are a script: `datasets` runs none."""


@dataclass(frozen=True)
class HubSet:
    """Where a data set lies.

    Attributes:
        repository: owner/name. revision: a commit, which keeps results comparable, or PARQUET.
        config: one of the repository's configurations.
    """

    repository: str
    revision: str
    config: str | None = None


def read_hub(task: str, source: HubSet, splits: tuple[str, ...], way_out: str) -> dict[str, Dataset]:
    """Reads splits from the hub or its local cache, which may be read-only.

    Args:
        task: for messages. way_out: what --data-dir would have to hold.
    Raises:
        TaskError: if there is neither network nor a cached copy.
    """
    import datasets

    named = [source.repository] if source.config is None else [source.repository, source.config]
    files: dict[str, Mapping[str, str]] = {}
    if source.revision == PARQUET:
        files = {"data_files": {split: f"*/{split}/*.parquet" for split in splits}}
    try:
        data = dict(datasets.load_dataset(*named, revision=source.revision, **files))
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise TaskError(
            f"{task} is not cached here and cannot be fetched ({error}). With the files at hand, use "
            f"--data-dir FOLDER, which holds {way_out}"
        ) from error
    except OSError as error:
        # A cache that cannot be locked for writing can still be read.
        data = _cached(source)
        if not data:
            raise TaskError(f"{task}: the datasets cache cannot be used: {error}") from error
    return {split: data[split] for split in splits}


def _cached(source: HubSet) -> dict[str, Dataset]:
    import datasets

    name = source.repository.rpartition("/")[2]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / source.repository.replace("/", "___")
    found = folder.glob(f"{source.config or '*'}/0.0.0/{source.revision}/{name}-*.arrow")
    return {path.stem.removeprefix(f"{name}-"): datasets.Dataset.from_file(str(path)) for path in found}
