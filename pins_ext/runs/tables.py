"""Tables as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(table: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A table in Markdown.

    Args:
        table: rows of text, the heading first.
        numbers: all columns but the first are aligned on the right.
    """
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV with a heading. Their columns may differ: a missing value is empty."""
    listed = list(rows)
    columns = list(dict.fromkeys(name for row in listed for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return buffer.getvalue()
