"""Splits as files in a folder, as shares of one set of examples, and as samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pins_ext.tasks.arguments import TaskError

if TYPE_CHECKING:
    from datasets import Dataset


def find_files(
    folder: str | Path, task: str, stems: Sequence[Sequence[str]], suffixes: Sequence[str], required: int = 2
) -> list[Path | None]:
    """Finds the file of each split in a folder: the first that is there among stems times suffixes.

    Args:
        task: for messages. stems: per split, in the order train, validation, test. required: so many must be there.
    Raises:
        TaskError: if the folder or a required file is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TaskError(f"--data-dir {folder} is not a folder")
    found: list[Path | None] = []
    for i, names in enumerate(stems):
        candidates = (folder / (stem + suffix) for stem in names for suffix in suffixes)
        path = next((path for path in candidates if path.is_file()), None)
        if path is None and i < required:
            kinds = ", ".join(dict.fromkeys(suffix.split(".")[1] for suffix in suffixes[1:]))
            or_others = f" (or {kinds})" if kinds else ""
            raise TaskError(f"{folder} has no {names[0]}{suffixes[0]}{or_others} for {task}; it has {listing(folder)}")
        found.append(path)
    return found


def listing(folder: Path) -> str:
    """Returns the names of a folder's first files, for messages."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "no files"


def hold_out(n_examples: int, fraction: float, seed: int, origin: str) -> tuple[list[int], list[int]]:
    """Draws a share of the examples for validation; returns the indices of the others and of those, ascending.

    Raises:
        TaskError: if there are fewer than two examples.
    """
    if n_examples < 2:
        raise TaskError(f"{origin}: one example cannot be both trained and validated on; use --validation-file")
    size = min(max(1, round(n_examples * fraction)), n_examples - 1)
    order = np.random.default_rng(seed).permutation(n_examples)
    return sorted(order[size:].tolist()), sorted(order[:size].tolist())


def sample(examples: Dataset, limit: int | None, seed: int) -> Dataset:
    """Returns at most `limit` examples, in their order; the same for the same seed."""
    if limit is None or limit >= len(examples):
        return examples
    drawn = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return examples.select(sorted(drawn.tolist()))


def count_shared(train: Iterable[str], other: Iterable[str]) -> int:
    """Returns how many of the others also occur in training."""
    seen = set(train)
    return sum(each in seen for each in other)
