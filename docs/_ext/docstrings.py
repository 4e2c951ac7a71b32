"""Docstrings are plain text with Google's sections: what reStructuredText would read as markup is escaped here.

Indented blocks of the description become literal; a dataclass whose fields carry help as metadata gets it as its Args.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Note|Example):$")
_CODE = re.compile(r"(`[^`]*`)")
_MARKUP = re.compile(r"[|*\\]|(?<=\w)_(?!\w)")


def _escaped(line: str) -> str:
    """A line whose bars, stars, backslashes and final underscores mean themselves, except between backticks."""
    parts = _CODE.split(line)
    return "".join(part if i % 2 else _MARKUP.sub(r"\\\g<0>", part) for i, part in enumerate(parts))


def _converted(lines: list[str]) -> Iterator[str]:
    in_section = literal = False
    before = ""
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            in_section, literal = bool(_SECTION.match(line)), False
        elif indented and not (before or in_section or literal):
            literal = True
            yield from ("::", "")
        yield line if literal else _escaped(line)
        before = line


def _fields(cls: Any) -> Iterator[str]:
    fields = [field for field in dataclasses.fields(cls) if "help" in field.metadata]
    if fields:
        yield from ("", "Args:")
    for field in fields:
        choices = field.metadata.get("choices")
        yield _escaped(f"    {field.name}: {field.metadata['help']}" + (f" ({' | '.join(choices)})" if choices else ""))


def _before_napoleon(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    converted = [*_converted(lines)]
    if what == "class" and dataclasses.is_dataclass(obj) and inspect.isclass(obj):
        converted += _fields(obj)
    lines[:] = converted


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    return {"parallel_read_safe": True}
