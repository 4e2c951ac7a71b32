"""The console of a command: a terminal's own width, and a fixed one where output goes to a file."""

from __future__ import annotations

import sys

from rich.console import Console

LOG_WIDTH = 160
"""Columns of a log file, which has no terminal to ask; no table of ours is wider."""


def console(quiet: bool = False) -> Console:
    """A console that prints what it is given, without colours of its own for numbers and paths; quiet: nothing."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH, quiet=quiet)
