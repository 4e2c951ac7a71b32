"""The cells of a grid: one training run each, with its flags, its folder and what is there of it already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pins_ext.files.atomic import checkpoints
from pins_ext.runs import command_line
from pins_ext.runs.errors import UsageError
from pins_ext.runs.folder import RunFolder
from pins_ext.runs.options import Parser, tokens
from pins_ext.runs.record import RunRecord, read_record
from pins_ext.runs.request import Request
from pins_ext.studies.ablation.grid import Flags, Grid


@dataclass(frozen=True)
class Cell:
    """One training run of a grid.

    Attributes:
        method: one of the grid's.
        seed: one of the grid's.
        axes: the varied flags that this method doesn't set itself, with their values here.
        flags: of `pins-ext train`, as they would be typed, without the folder.
        folder: of its result.
        request: what those flags ask for.
    """

    method: str
    seed: int
    axes: Mapping[str, Any]
    flags: tuple[str, ...]
    folder: Path
    request: Request

    @property
    def name(self) -> str:
        """Method, varied values and seed, as the folder's path within the grid's."""
        return _name(self.method, self.axes, self.seed)

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def record(self) -> RunRecord | None:
        """The record of the finished run; None if there is none, or one with other settings."""
        place = RunFolder(self.folder)
        if not place.finished:
            return None
        record = read_record(self.folder)
        return record if self._differences(record.flags) == [] else None

    @property
    def interrupted(self) -> bool:
        """Whether there is a checkpoint of this very run to go on from."""
        place = RunFolder(self.folder)
        return bool(checkpoints(place.work)) and self._differences(place.remembered()) == []

    def conflict(self) -> str | None:
        """Why this cell would lose another run's work, if it would."""
        place = RunFolder(self.folder)
        if place.finished:
            return _conflict(self.folder, self._differences(read_record(self.folder).flags))
        if checkpoints(place.work):
            return _conflict(place.work, self._differences(place.remembered()))
        return None

    def _differences(self, flags: Sequence[str]) -> list[str]:
        """Settings that other flags ask for, beside those asked for here."""
        if not flags:
            return ["flags not recorded"]
        try:
            there = command_line.parse(_train_parser(), flags).settings()
        except UsageError as error:
            return [str(error)]
        here = self.request.settings()
        names = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
        return [f"{name} {there.get(name)} -> {here.get(name)}" for name in names]


@dataclass(frozen=True)
class Row:
    """A row of the table: a method under one combination of the varied flags, its cells by seed."""

    method: str
    combination: Mapping[str, Any]
    cells: Mapping[int, Cell]


def with_typed(grid: Grid, typed: Flags, seeds: Sequence[int] | None) -> Grid:
    """The grid with flags typed for all runs: they replace its base and what it varies, not what a method sets itself.

    Raises:
        UsageError: a flag that would change nothing.
    """
    for name in typed:
        if all(name in flags for flags in grid.methods.values()):
            raise UsageError(f"--{name}: every method of {grid.name} sets it itself")
    vary = {name: values for name, values in grid.vary.items() if name not in typed}
    return replace(grid, base={**grid.base, **typed}, vary=vary, seeds=tuple(seeds or grid.seeds))


def rows_of(grid: Grid, root: Path) -> list[Row]:
    """The rows of the grid's table. A run that serves several rows, as dense does every sparsity, is one cell.

    Raises:
        UsageError: a run's flags are refused; the message names the run.
    """
    parser = _train_parser()
    known: dict[str, Cell] = {}
    rows = []
    for combination in grid.combinations():
        for method, own in grid.methods.items():
            axes = {name: value for name, value in combination.items() if name not in own}
            cells = {}
            for seed in grid.seeds:
                cell = _cell(grid, method, axes, seed, root, parser)
                cells[seed] = known.setdefault(json.dumps(cell.request.settings(), sort_keys=True), cell)
            rows.append(Row(method, combination, cells))
    return rows


def chosen(rows: Sequence[Row], patterns: Sequence[str]) -> list[Cell]:
    """Every cell once, seed by seed so that early results compare all methods; those that fit a pattern, if any.

    Raises:
        UsageError: a pattern that fits no cell.
    """
    seeds = list(dict.fromkeys(seed for row in rows for seed in row.cells))
    cells = list(
        {row.cells[seed].name: row.cells[seed] for seed in seeds for row in rows if seed in row.cells}.values()
    )
    for pattern in patterns:
        if not any(fnmatch(cell.name, pattern) for cell in cells):
            raise UsageError(f"--only {pattern} fits no cell; the first is {cells[0].name}")
    return [cell for cell in cells if not patterns or any(fnmatch(cell.name, pattern) for pattern in patterns)]


def text(value: Any) -> str:
    """A flag's value for names and tables: numbers as short as they can be."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)


def _cell(grid: Grid, method: str, axes: Flags, seed: int, root: Path, parser: Parser) -> Cell:
    name = _name(method, axes, seed)
    merged = _placed({**grid.base, **axes, **grid.methods[method]})
    # Without a task and a model, train would compare three runs of its own.
    flags = tokens({**merged, "seed": seed, "compare": False, "label": name})
    try:
        request = command_line.parse(parser, [*flags, "--output-dir", str(root / name)])
        request.training_arguments(root)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    return Cell(method, seed, dict(axes), tuple(flags), root / name, request)


def _placed(flags: Flags) -> dict[str, Any]:
    """{task} in --data-dir is the task's name without glue/, so that one flag serves a grid of several tasks."""
    folder = flags.get("data-dir")
    if not isinstance(folder, str) or "{task}" not in folder:
        return dict(flags)
    return {**flags, "data-dir": folder.replace("{task}", str(flags.get("task")).removeprefix("glue/"))}


def _name(method: str, axes: Flags, seed: int) -> str:
    varied = [f"{name}={text(value).replace('/', '-')}" for name, value in axes.items()]
    return "/".join([method, *([",".join(varied)] if varied else []), f"seed={seed}"])


def _train_parser() -> Parser:
    return command_line.parser("pins-ext train", "", "")


def _conflict(folder: Path, differences: Sequence[str]) -> str | None:
    if not differences:
        return None
    return (
        f"{folder} holds a run with other settings ({', '.join(differences[:3])}): "
        f"choose another --output-dir, or replace it with --overwrite"
    )
