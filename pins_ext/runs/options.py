"""Command-line flags made from dataclasses: one field, one flag, its metadata the help. No transformers import here.

A field's metadata may hold `help`, `choices` and `metavar`. Dashes in a flag's name may also be typed as underscores.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from pins_ext.runs.errors import UsageError

_MOST_VALUES = 10_000
"""In a file of flags or a grid: a few aliases to aliases would otherwise keep a machine busy for minutes."""

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
            skip: fields without a flag.
            parse: how to read a field whose type doesn't say it.
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


TYPED_ONLY = ("config", "resume", "resume_from_checkpoint", "overwrite", "debug", "help", "help_all")
"""Flags about one call of a command, by name: a file of flags, which describes a run, can't set them."""


def file_tokens(file: Path, without: Collection[str] = ()) -> list[str]:
    """A YAML or JSON file of flags as they would be typed.

    Args:
        file: of flags to values.
        without: flags to pass over, by name: commands that take fewer of them than train share its files.

    Raises:
        UsageError: unreadable, not a mapping of flags to values, or a flag that is only for typing.
    """
    flags = read_mapping(file, f"--config {file}", "flags to values, as in  sparsity: 0.8")
    named = {str(name).replace("-", "_"): value for name, value in flags.items()}
    if len(named) < len(flags):
        raise UsageError(f"--config {file}: a flag stands there with - and with _ in its name: keep one of them")
    for name, value in named.items():
        flag = "--" + name.replace("_", "-")
        if name in TYPED_ONLY:
            raise UsageError(f"--config {file}: {flag[2:]} can't be set in a file; type {flag} with the command")
        for each in value if isinstance(value, list) else [value]:
            if _looks_like_a_flag(each):
                raise UsageError(f"--config {file}: {flag[2:]} can't be {each!r}: that reads as another flag")
    return tokens({name: value for name, value in named.items() if name not in without})


def _looks_like_a_flag(value: Any) -> bool:
    """Whether a value, typed after its flag, would be taken for a flag of its own."""
    if not isinstance(value, str) or not value.startswith("-"):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def read_mapping(file: Path, name: str, content: str) -> dict[str, Any]:
    """A YAML or JSON file that holds one mapping.

    Args:
        name: what to call the file in errors.
        content: what it must map.

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
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice([key for key, _ in pairs], name)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON: {error}") from error


def _refuse_twice(keys: Sequence[Any], name: str) -> None:
    """Of a key that is there twice a reader would take the last one without a word."""
    if again := next((key for key in keys if keys.count(key) > 1), None):
        raise UsageError(f"{name} has {again} twice: keep one of them")


def _from_yaml(text: str, name: str) -> Any:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values_in(node, {}) > _MOST_VALUES:
            raise UsageError(f"{name} stands for more than {_MOST_VALUES:,} values: write out fewer aliases (*)")
        if isinstance(node, yaml.MappingNode):
            _refuse_twice([key.value for key, _ in node.value], name)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _values_in(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node stands for, each alias written out; infinitely many where it holds itself.

    Args:
        node: of yaml's own tree, in which an alias is the same object again.
        known: what was counted so far, by the node's id.
    """
    if isinstance(node.value, str):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values_in(part, known) for part in parts)
    return known[id(node)]


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


def file_to_write(flag: str, text: str, *endings: str) -> Path:
    """A file that can be written, asked before the work that fills it.

    Args:
        flag: what it was given with, for messages.
        text: its path.
        endings: one of these its name must have: it says what is written.

    Raises:
        UsageError: another ending, a folder, or one that is not there or can't be written to.
    """
    file = Path(text)
    if file.is_dir():
        raise UsageError(f"{flag} {file} is a folder: name a file to write")
    if file.suffix not in endings:
        raise UsageError(f"{flag} {file}: the name must end in {' or '.join(endings)}, which is what is written")
    if not file.parent.is_dir():
        raise UsageError(f"{flag} {file}: there is no folder {file.parent}; make it, or choose another")
    if not os.access(file.parent, os.W_OK):
        raise UsageError(f"{flag} {file} can't be written: you may not write in {file.parent}")
    return file


def patterns(text: str) -> str | dict[str, str]:
    """A pattern, or name=pattern pairs with commas between, or the same as JSON."""
    if text.startswith("{"):
        return {name: str(pattern) for name, pattern in _json(text).items()}
    if "=" not in text:
        return text
    pairs = (part.rpartition("=") for part in text.split(","))
    return {name: pattern for name, _, pattern in pairs}


def share(text: str) -> float:
    """A share of 1; one that was meant in percent gets a hint."""
    percent = _number(text.strip().removesuffix("%"))
    if "%" in text or 2 <= percent <= 100:
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
