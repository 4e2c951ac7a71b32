"""What the site must not forget: every public name, every criterion, every page in a list of contents."""

from __future__ import annotations

import re
from pathlib import Path

import pins_ext
from pins_ext.criteria import CRITERIA

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))


def test_every_public_name_is_in_the_reference() -> None:
    names = [name for name in pins_ext.__all__ if not name.startswith("__")]
    assert len(names) > 5
    assert [name for name in names if not re.search(rf":: (?:pins_ext\.)?{name}\b", REFERENCE)] == []


def test_every_criterion_is_in_the_table() -> None:
    table = (DOCS / "concepts" / "importance.md").read_text()
    assert [name for name in CRITERIA if f"| `{name}`" not in table] == []


def test_every_diagram_is_shown_and_described() -> None:
    pages = "\n".join(page.read_text() for page in (DOCS / "concepts").glob("*.md"))
    for diagram in (DOCS / "diagrams").glob("*.svg"):
        assert f"diagrams/{diagram.name}" in pages
        text = diagram.read_text()
        assert text.count("<title ") == text.count("<desc ") == text.count('role="img"') == 1
