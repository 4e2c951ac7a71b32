"""Splits as files in a folder, as shares of one set of examples, and as samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pins_ext.tasks.arguments import TaskArguments, TaskError

if TYPE_CHECKING:
    from datasets import Dataset


def find_files(
    folder: str | Path, task: str, stems: Sequence[Sequence[str]], suffixes: Sequence[str], required: int = 2
) -> list[Path | None]:
    """Finds the file of each split in a folder: the first that is there among stems times suffixes.

    Args:
        folder: to look in.
        task: for messages.
        stems: per split, in the order train, validation, test.
        suffixes: each with its dot.
        required: so many must be there.

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


def hold_out(
    n_examples: int, arguments: TaskArguments, origin: str, labels: Sequence[Any] | None = None
) -> tuple[list[int], list[int], str]:
    """Draws --eval-fraction of the examples for validation.

    Args:
        n_examples: of the training file.
        arguments: the share, and the seed it is drawn with.
        origin: the file, for messages.
        labels: one per example, whose shares are kept; None draws from all alike.

    Returns:
        The indices of the others and of those, ascending; and a note that says how they were drawn.

    Raises:
        TaskError: if there are fewer than two examples.
    """
    if n_examples < 2:
        raise TaskError(f"{origin}: one example cannot be both trained and validated on; use --validation-file")
    share, seed = arguments.eval_fraction, arguments.split_seed
    size = min(max(1, round(n_examples * share)), n_examples - 1)
    if labels is not None:
        held = draw_evenly(labels, size, seed)
    else:
        held = sorted(np.random.default_rng(seed).permutation(n_examples)[:size].tolist())
    rest = sorted(set(range(n_examples)) - set(held))
    return rest, held, f"validation is {share:g} of the training file, drawn with seed {seed}"


def draw_evenly(labels: Sequence[Any], size: int, seed: int) -> list[int]:
    """Returns `size` indices in ascending order that keep the shares of the labels; the same for the same seed.

    Args:
        labels: one per example, of one type.
        size: at least 1, at most the number of labels.
        seed: of what is drawn.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_label = shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]
    positions = (np.arange(size) + 0.5) * (len(labels) / size)
    return sorted(int(i) for i in by_label[positions.astype(np.int64)])


def limits(arguments: TaskArguments) -> tuple[int | None, ...]:
    """Returns how many examples train, validation and test may have at most."""
    return arguments.max_train_samples, arguments.max_eval_samples, arguments.max_eval_samples


def sampled(
    splits: Sequence[Dataset],
    arguments: TaskArguments,
    draw: Callable[[Dataset, int | None, int], Dataset] | None = None,
) -> list[Dataset]:
    """Returns the splits with at most as many examples as the arguments allow.

    Args:
        splits: train, validation and, if there is one, test.
        arguments: the limits, and the seed of what is drawn.
        draw: from validation and test, in place of `sample`.
    """
    seed = arguments.split_seed
    draws = (sample, draw or sample, draw or sample)
    return [of(split, limit, seed) for of, split, limit in zip(draws, splits, limits(arguments), strict=False)]


def source_of(name: str, arguments: TaskArguments) -> str:
    """Returns where a task's data comes from: the hub, a folder, or files of the user's own."""
    own = (arguments.train_file, arguments.validation_file, arguments.test_file)
    if arguments.train_file is not None:
        return ", ".join(path for path in own if path is not None)
    return f"{name}, " + ("from the hub" if arguments.data_dir is None else f"files in {arguments.data_dir}")


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
