"""Runs the Python blocks of every page: those of one page share their names, as a reader would type them in order.

A block after the comment `% skip: next` is a fragment and does not run.
"""

from __future__ import annotations

from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

# Blocks are programs, not dialogues: what they claim, they assert. The format's reader has a test of its own.
_pages = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md", "**/*.md"], excludes=["sparse_format.md"]
)

pytest_collect_file = _pages.pytest()
