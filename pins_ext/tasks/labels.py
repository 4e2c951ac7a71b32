"""Labels as numbers: class ids with their names, or the values of a regression."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pins_ext.tasks.arguments import TaskError
from pins_ext.tasks.sources.rows import RawLabel, Rows

IGNORED = -100
"""The label of a position that has none, as transformers' losses take it."""

_INTEGER = re.compile(r"[+-]?\d+")

_FEW_NUMBERS = 10
"""As many different integers are classes, a rating or a digit, without a word."""


@dataclass(frozen=True)
class Labels:
    """The label set of a task.

    Attributes:
        names: of the classes, by id; empty for a regression.
        aliases: other spellings of a class -> its name.
    """

    names: tuple[str, ...]
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def is_regression(self) -> bool:
        return not self.names

    @property
    def note(self) -> str | None:
        """What a reader should know where integers were taken for classes."""
        if len(self.names) <= _FEW_NUMBERS or not all(map(_INTEGER.fullmatch, self.names)):
            return None
        return f"{len(self.names)} different integers were taken for classes; to predict numbers: --label-type number"

    def model_kwargs(self) -> dict[str, Any]:
        """Returns the classes as the config of a transformers model keeps them."""
        ids = dict(enumerate(self.names))
        return {"num_labels": len(ids), "id2label": ids, "label2id": {name: i for i, name in ids.items()}}

    def numbered_as(self, names: Sequence[str]) -> tuple[Labels, dict[int, int]] | None:
        """Returns the same classes as a model numbers and spells them, and the new id of each; None: it has others."""
        here, there = ([name.casefold() for name in each] for each in (self.names, names))
        if self.is_regression or sorted(here) != sorted(there) or len({*here}) < len(here):
            return None
        ids = {i: there.index(name) for i, name in enumerate(here)}
        spelled = {name: names[ids[i]] for i, name in enumerate(self.names)}
        aliases = {alias: spelled[name] for alias, name in self.aliases.items()}
        return Labels(tuple(names), aliases | {old: new for old, new in spelled.items() if old != new}), ids

    def encode(self, rows: Rows) -> list[int] | list[float]:
        """Returns class ids or finite values, one per example.

        Raises:
            TaskError: naming the line of a label that is not a number or not a known class.
        """
        if self.is_regression:
            return [self._number(label, rows, i) for i, label in enumerate(rows.labels)]
        ids = {name: i for i, name in enumerate(self.names)}
        keys = [self.aliases.get(key, key) for key in map(_class_key, rows.labels)]
        unknown = sorted({key for key in keys if key not in ids})
        if unknown:
            line = rows.lines[keys.index(unknown[0])]
            known = ", ".join(self.names)
            raise TaskError(f"{rows.origin}:{line}: unknown label {', '.join(unknown[:5])}; training has {known}")
        return [ids[key] for key in keys]

    @staticmethod
    def _number(label: RawLabel, rows: Rows, index: int) -> float:
        value = _as_number(label)
        if value is None or not math.isfinite(value):
            raise TaskError(f"{rows.origin}:{rows.lines[index]}: the label must be a finite number, got {label!r}")
        return value


def infer_labels(rows: Rows, label_type: Literal["auto", "class", "number"]) -> Labels:
    """Reads the label set off the training examples. `auto`: all numbers and some with decimals are a regression.

    Classes are numbered in the order of their numbers if all are integers, and of the alphabet otherwise.

    Raises:
        TaskError: if there is only one class, or hardly an example per class.
    """
    if label_type == "number" or (label_type == "auto" and _are_decimals(rows.labels)):
        return Labels(())
    keys = sorted({_class_key(label) for label in rows.labels})
    if all(_INTEGER.fullmatch(key) for key in keys):
        keys.sort(key=int)
    if len(keys) < 2:
        raise TaskError(f"{rows.origin}: every label is {keys[0]!r}; a classifier needs two classes or more")
    if len(keys) > max(2, len(rows) // 2):
        raise TaskError(
            f"{rows.origin}: {len(keys)} different labels in {len(rows)} examples; "
            "for numbers to predict use --label-type number, for another column --label-column"
        )
    return Labels(tuple(keys))


def _class_key(label: RawLabel) -> str:
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()


def _as_number(label: RawLabel) -> float | None:
    try:
        return None if isinstance(label, bool) else float(label)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def _are_decimals(labels: Iterable[RawLabel]) -> bool:
    labels = list(labels)
    if any(_as_number(label) is None for label in labels):
        return False
    return any(isinstance(label, float) or not _INTEGER.fullmatch(str(label).strip()) for label in labels)


def class_shares(ids: Sequence[int], n_classes: int) -> list[float]:
    """Returns each class's share of the examples."""
    return [ids.count(i) / len(ids) for i in range(n_classes)]
