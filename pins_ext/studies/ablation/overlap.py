"""Do two methods keep the same weights? Counted in the saved models, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pins_ext.runs.errors import CommandError
from pins_ext.runs.record import RunRecord
from pins_ext.studies.ablation.cells import Row

_WEIGHTS = "model.safetensors"


@dataclass
class Overlap:
    """Weights that two pruned models keep.

    Attributes:
        weights: prunable ones.
        first: kept by the first.
        second: kept by the second.
        common: by both.
        by_tensor: common ones to expect if each kept as many of every tensor as it does, at random within the tensor.
    """

    weights: int = 0
    first: int = 0
    second: int = 0
    common: int = 0
    by_tensor: float = 0.0

    def add(self, weights: int, first: int, second: int, common: int) -> None:
        """Count one tensor in."""
        self.weights += weights
        self.first += first
        self.second += second
        self.common += common
        self.by_tensor += first * second / weights if weights else 0.0

    def shares(self) -> dict[str, float]:
        """Common weights as shares, and what they would be at random.

        Returns:
            in_common: of the weights that the first keeps. in_common_at_random: if both drew from all weights;
            in_common_at_random_per_tensor: if both drew within each tensor. jaccard, jaccard_at_random: common weights
            over those that either keeps.
        """
        drawn = self.first * self.second / self.weights
        return {
            "in_common": self.common / self.first,
            "in_common_at_random": drawn / self.first,
            "in_common_at_random_per_tensor": self.by_tensor / self.first,
            "jaccard": self.common / (self.first + self.second - self.common),
            "jaccard_at_random": drawn / (self.first + self.second - drawn),
        }


@dataclass(frozen=True)
class Pair:
    """Two methods under one combination of the varied flags, and their overlap per seed."""

    combination: Mapping[str, Any]
    first: str
    second: str
    overlaps: Mapping[int, Overlap]


def pairs_of(rows: Sequence[Row], records: Mapping[str, RunRecord]) -> Iterator[Pair]:
    """Every two methods that were pruned to the same sparsity, where both have finished.

    Args:
        records: of the finished cells, by the cell's name.

    Raises:
        CommandError: a saved model lacks a tensor that its record names.
    """
    for combination in _distinct(row.combination for row in rows):
        group = [row for row in rows if row.combination == combination]
        found: dict[tuple[str, str], dict[int, Overlap]] = {}
        for seed in group[0].cells:
            cells = {row.method: row.cells[seed] for row in group if row.cells[seed].name in records}
            pruned = {method: c for method, c in cells.items() if records[c.name].final.weights}
            # Two models can be compared where the same tensors were pruned to the same sparsity.
            kinds: dict[tuple[float, tuple[str, ...]], dict[str, Path]] = {}
            for method, cell in pruned.items():
                record = records[cell.name]
                kind = (record.config.pruning["sparsity"], tuple(record.final.tensors))
                kinds.setdefault(kind, {})[method] = cell.folder
            for (_, tensors), folders in kinds.items():
                for pair, overlap in overlaps(folders, tensors).items():
                    found.setdefault(pair, {})[seed] = overlap
        for (first, second), by_seed in found.items():
            yield Pair(combination, first, second, by_seed)


def overlaps(folders: Mapping[str, Path], tensors: Iterable[str]) -> dict[tuple[str, str], Overlap]:
    """The overlap of every two models.

    Args:
        folders: of the saved models, by method.
        tensors: names of the prunable ones.
    """
    from safetensors import safe_open

    counted = {pair: Overlap() for pair in combinations(folders, 2)}
    if not counted:
        return counted
    with ExitStack() as stack:
        files = {
            method: stack.enter_context(safe_open(folder / _WEIGHTS, framework="pt"))
            for method, folder in folders.items()
        }
        for name in tensors:
            kept = {method: _tensor(file, name, folders[method]) != 0 for method, file in files.items()}
            counts = {method: int(mask.sum()) for method, mask in kept.items()}
            for (first, second), overlap in counted.items():
                common = int((kept[first] & kept[second]).sum())
                overlap.add(kept[first].numel(), counts[first], counts[second], common)
    return counted


def non_zeros(folder: Path, tensors: Iterable[str]) -> int:
    """Weights of these tensors that are not zero in a saved model."""
    from safetensors import safe_open

    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        return sum(int(_tensor(file, name, folder).count_nonzero()) for name in tensors)


def _tensor(file: Any, name: str, folder: Path) -> Any:
    try:
        return file.get_tensor(name)
    except Exception as error:
        raise CommandError(f"{folder / _WEIGHTS} holds no tensor {name}: its masks can't be compared") from error


def _distinct(combinations_: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for combination in combinations_:
        if combination not in found:
            found.append(combination)
    return found
