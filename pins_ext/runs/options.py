"""Command-line flags made from dataclasses: one field, one flag, its metadata the help. No transformers import here.

A field's metadata may hold `help`, `choices` and `metavar`. Dashes in a flag's name may also be typed as underscores.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from pins_ext.runs.errors import UsageError

_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of exiting, and remembers only what was given.

    Attributes:
        without: names of fields and flags that other commands take and this one doesn't.
    """

    def __init__(self, without: Iterable[str] = (), **kwargs: Any) -> None:
        self.without = frozenset(without)
        super().__init__(
            allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=Formatter, add_help=False, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(message)

    def retell(self, texts: Mapping[str, str]) -> None:
        """Other help for flags that mean something of their own here, by name."""
        for action in self._actions:
            action.help = texts.get(action.dest, action.help)

    def add_fields(
        self,
        title: str,
        cls: type,
        skip: Iterable[str] = (),
        parse: Mapping[str, Callable[[str], Any]] = MappingProxyType({}),
    ) -> None:
        """A titled group with a flag for every field of a dataclass.

        Args:
            skip: fields without a flag. parse: how to read a field whose type doesn't say it.
        """
        group = self.add_argument_group(title)
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.init and field.name not in (*skip, *self.without):
                _add(group, field, hints[field.name], parse.get(field.name))


class Formatter(argparse.HelpFormatter):
    """Help in two columns with room to breathe; line breaks in descriptions and epilogues stay."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.strip("\n").splitlines(keepends=True))


def normalised(argv: Sequence[str]) -> list[str]:
    """Flags with dashes for underscores; values are left alone."""
    tokens = []
    for token in argv:
        name, equals, value = token.partition("=")
        tokens.append(name.replace("_", "-") + equals + value if token.startswith("--") else token)
    return tokens


def unknown(flag: str, known: Iterable[str]) -> UsageError:
    """The error for a flag that nobody knows, with the nearest that exists."""
    if not flag.startswith("-"):
        return UsageError(f"unexpected argument {flag!r}")
    near = difflib.get_close_matches(flag.partition("=")[0], list(known), n=1)
    return UsageError(f"unknown flag {flag.partition('=')[0]}" + (f"; did you mean {near[0]}?" if near else ""))


def refuse_foreign(parser: Parser, tokens: Iterable[str]) -> None:
    """Raise UsageError for a flag of another command: this one would have to ignore it."""
    for token in tokens:
        flag = token.partition("=")[0]
        if flag.startswith("--") and flag[2:].replace("-", "_") in parser.without:
            command = parser.prog.split()[-1]
            raise UsageError(f"{flag} is a flag of train that {command} does not take: leave it out")


def file_tokens(file: Path, without: Collection[str] = ()) -> list[str]:
    """A YAML or JSON file of flags as they would be typed.

    Args:
        without: flags to pass over, by name: commands that take fewer of them than train share its files.

    Raises:
        UsageError: unreadable, or not a mapping of flags to values.
    """
    flags = read_mapping(file, f"--config {file}", "flags to values, as in  sparsity: 0.8")
    return tokens({name: value for name, value in flags.items() if str(name).replace("-", "_") not in without})


def read_mapping(file: Path, name: str, content: str) -> dict[str, Any]:
    """A YAML or JSON file that holds one mapping.

    Args:
        name: what to call the file in errors. content: what it must map.

    Raises:
        UsageError: unreadable, or something else than a mapping.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    mapping = _from_json(text, name) if file.suffix == ".json" else _from_yaml(text, name)
    if not isinstance(mapping, dict):
        raise UsageError(f"{name} must map {content}")
    return mapping


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON: {error}") from error


def _from_yaml(text: str, name: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not YAML: {' '.join(str(error).split())}") from error


def tokens(flags: Mapping[str, Any]) -> list[str]:
    """Flags and their values as they would be typed."""
    return [token for name, value in flags.items() for token in _typed(str(name), value)]


def _typed(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag, str(value).lower()]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    return [flag, str(value)]


def _add(group: Any, field: dataclasses.Field[Any], hint: Any, parse: Callable[[str], Any] | None) -> None:
    flag = "--" + field.name.replace("_", "-")
    default = field.default if field.default is not dataclasses.MISSING else None
    options: dict[str, Any] = {"help": _help(field, default), "dest": field.name}
    choices = get_args(hint) if get_origin(hint) is Literal else field.metadata.get("choices")
    options["metavar"] = field.metadata.get("metavar") or ("|".join(choices) if choices else None)
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if choices:
        options["choices"] = choices
    elif bool in kinds:
        options |= {"type": parse or truth, "nargs": "?", "const": True, "metavar": options["metavar"] or "BOOL"}
    elif parse is not None:
        options["type"] = parse
        options["metavar"] = options["metavar"] or ("X" if kinds == [float] else "VALUE")
    elif any(get_origin(kind) in (list, tuple) for kind in (hint, *kinds)):
        options |= {"nargs": "+", "metavar": options["metavar"] or "NAME"}
    else:
        options["type"] = next((kind for kind in (str, int, float) if kind in kinds), str)
        options["metavar"] = options["metavar"] or {str: "TEXT", int: "N", float: "X"}[options["type"]]
    group.add_argument(flag, **options)
    if bool in kinds and default is True:
        group.add_argument(f"--no-{flag[2:]}", dest=field.name, action="store_false", help=argparse.SUPPRESS)


def _help(field: dataclasses.Field[Any], default: Any) -> str:
    text = field.metadata.get("help", "").replace("%", "%%")
    shown = default not in (None, "", (), [], False)
    return f"{text} [{default}]" if shown else text


def truth(text: str) -> bool:
    """true or false, in the usual spellings."""
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"true or false expected, got {text!r}")


def steps_or_share(text: str) -> int | float:
    """An integer number of steps, or a share of training."""
    try:
        return int(text)
    except ValueError:
        return _number(text)


def groups(text: str) -> str | dict[str, list[str]]:
    """A word, or groups of name patterns, as JSON or like this: attention=*attention*,rest=*intermediate*;*output*."""
    if text.startswith("{"):
        return dict(_json(text))
    if "=" not in text:
        return text
    pairs = (part.partition("=") for part in text.split(","))
    return {name: patterns.split(";") for name, _, patterns in pairs}


def densities(text: str) -> float | dict[str, float]:
    """A number, or pattern=number pairs with commas between, or the same as JSON."""
    if text.startswith("{"):
        return {pattern: float(value) for pattern, value in _json(text).items()}
    if "=" not in text:
        return _number(text)
    pairs = (part.rpartition("=") for part in text.split(","))
    return {pattern: _number(value) for pattern, _, value in pairs}


def share(text: str) -> float:
    """A share of 1; one that was meant in percent gets a hint."""
    percent = _number(text.strip().removesuffix("%"))
    if "%" in text or 1 < percent <= 100:
        raise argparse.ArgumentTypeError(f"a share of 1 expected, got {text!r}: did you mean {percent / 100:g}?")
    return percent


def word_or_number(text: str) -> str | float:
    """A number where the text is one."""
    try:
        return float(text)
    except ValueError:
        return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a number expected, got {text!r}") from error


def _json(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"JSON object expected, got {text!r}") from error
