"""Plain data, as JSON takes it, and dataclasses that are read back from it field by field."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


class PlainError(ValueError):
    """Plain data is not what a dataclass asks for; the message names the place."""


def plain(value: Any) -> Any:
    """The value as strict JSON has it.

    A dataclass becomes an object; a field whose default is None is left out where it is None. NaN and infinity, for
    which JSON has no number, become None, and what JSON does not know becomes its text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {_key(field): plain(item) for field, item in named if item is not None or field.default is not None}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, NoneType)) else str(value)


def to_json(value: Any) -> str:
    """The value as strict, indented JSON; see `plain`."""
    return json.dumps(plain(value), indent=1, allow_nan=False)


def typed(cls: type[T], data: Any, where: str) -> T:
    """A dataclass from plain data: unknown names are passed over, missing ones take their default.

    A field's metadata may hold `key`, its name in plain data where that is another one.

    Args:
        cls: its fields may be texts, numbers, booleans, dataclasses, tuples and mappings of these, or None.
        data: as json.loads returns it.
        where: what the data is, for messages.

    Raises:
        PlainError: a value is of another kind, or one without a default is missing.
    """
    if not isinstance(data, dict):
        raise PlainError(f"{where} must be an object, not {data!r:.40}")
    hints = get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = _key(field)
        if key in data:
            values[field.name] = _value(hints[field.name], data[key], f"{where}: {key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PlainError(f"{where}: {key} is missing")
    return cls(**values)


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        (hint,) = (each for each in args if each is not NoneType)
        origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return typed(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list):
            raise PlainError(f"{where} must be a list, not {value!r:.40}")
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise PlainError(f"{where} must be an object, not {value!r:.40}")
        return {name: _value(args[1], item, f"{where}.{name}") for name, item in value.items()}
    # An integer is a number too, and so is a flag among numbers.
    kinds = (int, float) if hint is float else hint
    if not isinstance(value, kinds) or (hint is int and isinstance(value, bool)):
        raise PlainError(f"{where} must be {_WORDS[hint]}, not {value!r:.40}")
    return value
