"""Examples as read, before labels become numbers: what every reader returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pins_ext.tasks.arguments import TaskError

RawLabel = str | int | float | bool


@dataclass(frozen=True)
class Rows:
    """Texts and labels of one split.

    Attributes:
        origin: the file or data set, for messages.
        text: first text of each example.
        pair: second text of each example; None for a task of single texts.
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
