"""Local data files: csv, tsv (never quoted), json and json lines, plain or gzipped, with errors that name the line.

`datasets.load_dataset` is not used here: it copies every file into a cache, and of a bad row it says only
that parsing failed.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from pins_ext.tasks.arguments import TaskError
from pins_ext.tasks.sources.rows import RawLabel, Rows

_LONGEST_FIELD = 1 << 30
"""Characters of a field in a .csv file."""

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
    ("review",),
    ("question",),
)
"""Names looked for, in this order, when none are given."""

LABEL_COLUMNS = ("label", "labels", "gold_label", "class", "category", "score", "target", "is_duplicate", "Quality")


@dataclass(frozen=True)
class Table:
    """A file's rows.

    Attributes:
        path: of the file.
        columns: in the file's order.
        rows: (line number from 1, column -> value); values of csv and tsv are strings.
        skipped: incomplete rows left out.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, Any]]]
    skipped: int = 0


def read_table(path: str | Path, header: Sequence[str] | None = None, skip_incomplete: bool = False) -> Table:
    """Reads a .csv, .tsv, .json, .jsonl or .ndjson file, also with .gz at the end.

    Args:
        header: the columns of a csv or tsv file that has no header line.
        skip_incomplete: leave out rows of a wrong length, and count them, in place of refusing the file.
    Raises:
        TaskError: if the file is missing, empty, of another kind or malformed.
    """
    path = Path(path)
    kind = kind_of(path)
    if path.is_file() and kind not in ("csv", "tsv", "json", "jsonl", "ndjson"):
        raise TaskError(f"{path}: the name must end in .csv, .tsv, .json or .jsonl (or one of these and .gz)")
    with opened(path) as file:
        if kind in ("csv", "tsv"):
            records = _csv_records(file, path) if kind == "csv" else _tsv_records(file)
            return _delimited_table(path, records, header, skip_incomplete)
        return _json_table(path, file.read(), lines_only=kind != "json")


def read_rows(
    table: Table,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> Rows:
    """Picks the texts and labels of a table; columns that are not named are found by name.

    Raises:
        TaskError: if a column is missing or a row lacks a text or a label.
    """
    texts = tuple(text_columns) if text_columns is not None else _find_text_columns(table)
    label = label_column if label_column is not None else _find_label_column(table)
    missing = [column for column in (*texts, label) if column not in table.columns]
    if missing:
        raise TaskError(f"{table.path} has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    for line, row in table.rows:
        for column in texts:
            if not isinstance(row.get(column), str):
                raise TaskError(f"{table.path}:{line}: {column} must be a text, got {row.get(column)!r}")
        if not isinstance(row.get(label), RawLabel) or not str(row[label]).strip():
            raise TaskError(f"{table.path}:{line}: {label} must be a text or a number, got {row.get(label)!r}")
    return Rows(
        origin=str(table.path),
        text=[row[texts[0]] for _, row in table.rows],
        pair=[row[texts[1]] for _, row in table.rows] if len(texts) == 2 else None,
        labels=[row[label] for _, row in table.rows],
        lines=[line for line, _ in table.rows],
        skipped=table.skipped,
    )


def kind_of(path: str | Path) -> str:
    """Returns what follows the last dot of a file's name, in small letters and without .gz."""
    return Path(path).name.lower().removesuffix(".gz").rpartition(".")[2]


@contextmanager
def opened(path: str | Path) -> Iterator[TextIO]:
    """Opens a UTF-8 text file, also with .gz at the end; a lone carriage return does not end a line.

    Raises:
        TaskError: if the file is missing, damaged or not text.
    """
    path = Path(path)
    if not path.is_file():
        raise TaskError(f"{path} is {'a folder, not a file' if path.is_dir() else 'missing'}")
    try:
        zipped = path.name.lower().endswith(".gz")
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            yield cast(TextIO, file)
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (EOFError, OSError, zlib.error) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error


def _tsv_records(file: TextIO) -> Iterator[tuple[int, list[str]]]:
    for line, text in enumerate(file, start=1):
        if text.strip():
            yield line, text.rstrip("\r\n").split("\t")


def _csv_records(file: TextIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, strict=True)
    # Of the module: 128 KiB unless told, and a document may be longer. It is cut to --max-length like any other.
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        for record in reader:
            if record:
                yield reader.line_num, record
    except csv.Error as error:
        raise TaskError(f"{path}:{reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _delimited_table(
    path: Path, records: Iterator[tuple[int, list[str]]], header: Sequence[str] | None, skip_incomplete: bool
) -> Table:
    columns = tuple(next(records, (0, []))[1] if header is None else header)
    if not columns:
        raise TaskError(f"{path} is empty")
    if len(columns) == 1 and ".csv" in path.suffixes and (other := next((c for c in ";\t|" if c in columns[0]), None)):
        raise TaskError(f"{path}: its columns are separated by {other!r}: a .csv needs commas, a .tsv tabs")
    if len(set(columns)) < len(columns):
        raise TaskError(f"{path}: a column name occurs twice in the first line: {', '.join(columns)}")
    rows, skipped = [], 0
    for line, record in records:
        if len(record) == len(columns):
            rows.append((line, dict(zip(columns, record, strict=True))))
        elif skip_incomplete:
            skipped += 1
        else:
            raise TaskError(f"{path}:{line}: {len(record)} fields instead of {len(columns)} ({', '.join(columns)})")
    return Table(path, columns, rows, skipped)


def _json_table(path: Path, text: str, lines_only: bool) -> Table:
    if not text.strip():
        raise TaskError(f"{path} is empty")
    rows = _json_lines(path, text) if lines_only or not _is_document(text) else _json_document(path, text)
    columns: dict[str, None] = {}
    for line, row in rows:
        if not isinstance(row, dict):
            raise TaskError(f"{path}:{line}: expected an object with the columns as keys, got {str(row)[:40]!r}")
        columns.update(dict.fromkeys(row))
    return Table(path, tuple(columns), rows)


def _is_document(text: str) -> bool:
    """Tells one JSON value from many lines of them: only the latter has a complete value on its first line."""
    first, _, rest = text.strip().partition("\n")
    try:
        value = json.loads(first)
    except (json.JSONDecodeError, RecursionError):
        return True
    return not rest.strip() and not (isinstance(value, dict) and "data" not in value)


def _json_lines(path: Path, text: str) -> list[tuple[int, Any]]:
    rows = []
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            rows.append((line, _json(content, path, line)))
    return rows


def _json(text: str, path: Path, line: int | None = None) -> Any:
    """One value; a message names its line, or that where a document is at fault."""
    try:
        value = json.loads(text)
        # A lone half of a character beyond 16 bits can be written in JSON, and is no text.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise TaskError(f"{path}:{line or error.lineno}: not JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        place = f"{path}:{line}" if line else str(path)
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise TaskError(f"{place}: cannot be read: {reason}") from error
    return value


def _json_document(path: Path, text: str) -> list[tuple[int, Any]]:
    document = _json(text, path)
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise TaskError(f'{path}: expected a list of objects, or an object with such a list under "data"')
    return list(enumerate(rows, start=1))


def _find_text_columns(table: Table) -> tuple[str, ...]:
    for names in TEXT_COLUMNS:
        if all(name in table.columns for name in names):
            return names
    raise TaskError(
        f"{table.path}: no text column known by name among {', '.join(table.columns)}, which the "
        "first line names; use --text-columns, and put such a line there if it is missing"
    )


def _find_label_column(table: Table) -> str:
    for name in LABEL_COLUMNS:
        if name in table.columns:
            return name
    raise TaskError(f"{table.path}: no label column known by name among {', '.join(table.columns)}; use --label-column")
