"""A grid file: flags common to all runs, methods, what is varied, seeds and the method the others are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from pins_ext.runs.errors import UsageError
from pins_ext.runs.options import read_mapping

Flags = Mapping[str, Any]

_SUFFIX = ".yaml"
_KEYS = ("about", "base", "methods", "vary", "seeds", "reference")
_OWN = ("output-dir", "label", "compare", "resume", "overwrite", "seed", "config", "help", "help-all", "debug")


@dataclass(frozen=True)
class Grid:
    """What a grid file asks for. Flags are named as on the command line, with dashes and without the leading two.

    Attributes:
        name: the file's, without its suffix.
        about: what the grid answers.
        base: flags of every run.
        methods: name to the flags that make the method.
        vary: flag to the values it takes; every combination of them is run with every method.
        seeds: of training; a run per method, combination and seed.
        reference: the method that differences are taken to.
    """

    name: str
    about: str
    base: Flags
    methods: Mapping[str, Flags]
    vary: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    reference: str

    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the varied flags' values; one empty combination where nothing is varied."""
        return [dict(zip(self.vary, values, strict=True)) for values in product(*self.vary.values())]


def shipped() -> dict[str, Path]:
    """The grids that come with the package, by name."""
    folder = Path(str(files("pins_ext.studies") / "grids"))
    return {file.stem: file for file in sorted(folder.glob(f"*{_SUFFIX}"))}


def read_grid(name: str) -> Grid:
    """A grid of the package by its name, or one of the user's own by its file.

    Raises:
        UsageError: there is none, or it holds something else than a grid; the message says what.
    """
    known = shipped()
    file = known.get(name, Path(name))
    if name not in known and not file.is_file():
        raise UsageError(f"no grid {name}: neither a file, nor one of {', '.join(known)}")
    content = read_mapping(file, f"grid {file}", "base, methods, vary, seeds and reference")
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise UsageError(f"grid {file}: unknown entry {unknown[0]!r}; there are {', '.join(_KEYS)}")
    return _grid(content, file)


def _grid(content: Mapping[str, Any], file: Path) -> Grid:
    where = f"grid {file}"
    methods = _mapping(content, "methods", where)
    if not methods:
        raise UsageError(f"{where}: methods must name at least one method and its flags, as in  pins: {{}}")
    vary = {
        name: tuple(values) if isinstance(values, list) else ()
        for name, values in checked_flags(_mapping(content, "vary", where), f"{where}: vary").items()
    }
    for name, values in vary.items():
        if not values or len(set(map(str, values))) < len(values):
            raise UsageError(f"{where}: vary {name} must be a list of different values")
    reference = content.get("reference", next(iter(methods)))
    if reference not in methods:
        raise UsageError(f"{where}: reference {reference!r} is none of the methods {', '.join(map(str, methods))}")
    return Grid(
        name=file.stem,
        about=" ".join(str(content.get("about", "")).split()),
        base=checked_flags(_mapping(content, "base", where), f"{where}: base"),
        methods={
            _name(name, where): checked_flags(flags or {}, f"{where}: methods {name}")
            for name, flags in methods.items()
        },
        vary=vary,
        seeds=_seeds(content.get("seeds", [42]), where),
        reference=str(reference),
    )


def _mapping(content: Mapping[str, Any], key: str, where: str) -> Mapping[Any, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {key} must be a mapping, not {value!r}")
    return value


def checked_flags(flags: Any, where: str) -> dict[str, Any]:
    """Flags by their name with dashes; those that the grid sets itself are refused."""
    if not isinstance(flags, dict):
        raise UsageError(f"{where} must map flags to values, not {flags!r}")
    named = {str(name).replace("_", "-"): value for name, value in flags.items()}
    for name in named:
        if name in _OWN:
            raise UsageError(f"{where}: {name} can't be set here; ablate sets it for each run")
    return named


def _name(name: Any, where: str) -> str:
    """A method's name, which becomes a folder's."""
    text = str(name)
    if not text.replace("-", "").replace("_", "").replace(".", "").isalnum() or text.startswith("."):
        raise UsageError(f"{where}: method {text!r} names a folder: use letters, digits, dashes, dots")
    return text


def _seeds(seeds: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"{where}: seeds must be a list of different whole numbers, not {seeds!r}")
    return tuple(seeds)
