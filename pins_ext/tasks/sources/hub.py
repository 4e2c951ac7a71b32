"""Data sets on the hub, or in its local cache."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

from pins_ext.tasks.arguments import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

PARQUET = "refs/convert/parquet"
"""The branch in which the hub keeps a Parquet copy of a set whose own files are a script: `datasets` runs none."""


@dataclass(frozen=True)
class HubSet:
    """Where a data set lies.

    Attributes:
        repository: owner/name.
        revision: a commit, which keeps results comparable, or PARQUET.
        config: one of the repository's configurations.
    """

    repository: str
    revision: str
    config: str | None = None


_PATIENCE_SECONDS = 5.0
"""For the hub to answer at all; its libraries try again for half a minute where there is no network."""


@contextmanager
def within_reach() -> Iterator[None]:
    """Inside, the hub's libraries look into their cache alone where the hub can't be reached, in place of waiting."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(address: str) -> bool:
    """Whether something answers there; with a proxy in between it is the proxy that knows."""
    if getproxies():
        return True
    parts = urlsplit(address)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), _PATIENCE_SECONDS):
            return True
    except OSError:
        return False


def refuse_out_of_reach(task: str, source: HubSet, way_out: str) -> None:
    """Refuse a set that is neither in the cache nor to be fetched, in less time than it takes to load a library.

    Args:
        task: for messages.
        source: where the set lies.
        way_out: what --data-dir would have to hold.

    Raises:
        TaskError: the hub can't be reached, and there is no folder of the set in the cache.
    """
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    if (cache / source.repository.replace("/", "___")).is_dir():
        return
    if constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT):
        raise TaskError(_out_of_reach(task, "the hub does not answer", way_out))


def _out_of_reach(task: str, why: object, way_out: str) -> str:
    return (
        f"{task} is not cached here and cannot be fetched ({why}). With the files at hand, use "
        f"--data-dir FOLDER, which holds {way_out}"
    )


def read_hub(task: str, source: HubSet, splits: tuple[str, ...], way_out: str) -> dict[str, Dataset]:
    """Reads splits from the hub or its local cache, which may be read-only.

    Args:
        task: for messages.
        source: where the set lies.
        splits: by the names they have there.
        way_out: what --data-dir would have to hold.

    Raises:
        TaskError: if there is neither network nor a cached copy.
    """
    import datasets

    named = [source.repository] if source.config is None else [source.repository, source.config]
    files: dict[str, Mapping[str, str]] = {}
    if source.revision == PARQUET:
        files = {"data_files": {split: f"*/{split}/*.parquet" for split in splits}}
    try:
        with within_reach():
            data = dict(datasets.load_dataset(*named, revision=source.revision, **files))
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise TaskError(_out_of_reach(task, error, way_out)) from error
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
