"""The directive `{commands}`: every command of `pins-ext` with its help, which the program prints while Sphinx runs."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from pins_ext.cli.main import COMMANDS, main


class Commands(SphinxDirective):
    """A section for each command; what it prints for --help (and --help-all, where there is one) is its text."""

    def run(self) -> list[nodes.Node]:
        return [node for name, (_, about) in COMMANDS.items() for node in self._section(name, about)]

    def _section(self, name: str, about: str) -> list[nodes.Node]:
        lines = [f"## {name}", "", f"{about[0].upper()}{about[1:]}.", "", *_fence(_printed(name, "--help"))]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _fence(text: str) -> list[str]:
    return ["```text", *text.rstrip().splitlines(), "```", ""]


def _printed(*argv: str) -> str:
    """What a command line prints.

    Raises:
        RuntimeError: it fails.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
    if code:
        raise RuntimeError(f"pins-ext {' '.join(argv)} ended with {code}")
    return printed.getvalue()


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
