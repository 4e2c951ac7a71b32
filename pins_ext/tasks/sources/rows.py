"""Examples as read, before labels become numbers: what every reader returns, and how a share of them is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pins_ext.tasks.arguments import TaskError

RawLabel = str | int | float | bool


@dataclass(frozen=True)
class Rows:
    """Texts and labels of one split.

    Attributes:
        origin: the file or data set, for messages.
        text, pair: first and second text per example; pair is None for a task of single texts.
        labels: as written in the source.
        lines: where each example stands in its source, from 1.
        skipped: incomplete rows left out.
    """

    origin: str
    text: list[str]
    pair: list[str] | None
    labels: list[RawLabel]
    lines: list[int]
    skipped: int = 0

    def __post_init__(self) -> None:
        if not self.text:
            raise TaskError(f"{self.origin} holds no examples")

    def __len__(self) -> int:
        return len(self.text)

    def take(self, indices: Sequence[int]) -> Rows:
        """Returns the examples at these indices, in this order."""
        return Rows(
            self.origin,
            [self.text[i] for i in indices],
            None if self.pair is None else [self.pair[i] for i in indices],
            [self.labels[i] for i in indices],
            [self.lines[i] for i in indices],
            self.skipped,
        )

    def examples(self) -> set[tuple[str, str]]:
        """Returns the distinct inputs, for telling whether two splits share some."""
        return set(zip(self.text, self.pair or [""] * len(self), strict=True))


def draw_evenly(labels: Sequence[RawLabel], size: int, seed: int) -> list[int]:
    """Returns `size` indices in ascending order that keep the shares of the labels; the same for the same seed.

    Args:
        labels: one per example, of one type. size: 1 <= size <= len(labels).
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_label = shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]
    positions = (np.arange(size) + 0.5) * (len(labels) / size)
    return sorted(int(i) for i in by_label[positions.astype(np.int64)])
