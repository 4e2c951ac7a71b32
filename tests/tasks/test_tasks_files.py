"""Local files: every layout read, every fault named with its line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pins_ext.tasks import TaskError
from pins_ext.tasks.labels import Labels, infer_labels
from pins_ext.tasks.sources.files import read_rows, read_table

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str) -> Path:
        path = tmp_path / name
        data = content.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write_file


ROWS = [{"sentence": "one, two", "label": "a"}, {"sentence": 'he said "no"', "label": "b"}]

LAYOUTS = {
    "data.csv": 'sentence,label\n"one, two",a\n"he said ""no""",b\n',
    "crlf.csv": 'sentence,label\r\n"one, two",a\r\n"he said ""no""",b\r\n',
    "data.tsv": 'sentence\tlabel\none, two\ta\nhe said "no"\tb\n',
    "crlf.tsv": 'sentence\tlabel\r\none, two\ta\r\nhe said "no"\tb\r\n',
    "bom.tsv": '\ufeffsentence\tlabel\none, two\ta\nhe said "no"\tb\n',
    "blank.tsv": 'sentence\tlabel\none, two\ta\n\nhe said "no"\tb\n\n',
    "data.jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n",
    "lines.json": "\n".join(json.dumps(row) for row in ROWS),
    "list.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "under_data.json": json.dumps({"version": 1, "data": ROWS}),
    "pretty_data.json": json.dumps({"version": 1, "data": ROWS}, indent=1),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(write: Write, name: str, suffix: str) -> None:
    rows = read_rows(read_table(write(name + suffix, LAYOUTS[name])))
    assert rows.text == ["one, two", 'he said "no"']
    assert rows.labels == ["a", "b"]
    assert rows.pair is None


def test_one_json_line(write: Write) -> None:
    assert len(read_table(write("one.json", json.dumps(ROWS[0]))).rows) == 1


def test_an_unbalanced_quote_ends_nothing_in_tsv(write: Write) -> None:
    rows = read_rows(read_table(write("a.tsv", 'text\tlabel\n"open\t1\nclose"\t0\n')))
    assert rows.text == ['"open', 'close"']


def test_a_csv_field_may_span_lines_and_a_text_hold_a_carriage_return(write: Write) -> None:
    assert read_rows(read_table(write("a.csv", 'text,label\n"two\nlines",1\n'))).text == ["two\nlines"]
    assert read_rows(read_table(write("a.tsv", "text\tlabel\nodd\rtext\t1\n"))).text == ["odd\rtext"]


def test_lines_are_counted_as_an_editor_does(write: Write) -> None:
    table = read_table(write("a.tsv", "text\tlabel\n\nfirst\t1\n\nsecond\t0\n"))
    assert [line for line, _ in table.rows] == [3, 5]


@pytest.mark.parametrize(
    "columns",
    [
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "passage"),
        ("#1 String", "#2 String"),
        ("sentence",),
        ("text",),
    ],
)
@pytest.mark.parametrize("label", ["label", "score", "Quality", "is_duplicate"])
def test_columns_are_found_by_name(write: Write, columns: tuple[str, ...], label: str) -> None:
    header = ["idx", *reversed(columns), label]
    rows = read_rows(read_table(write("a.tsv", "\t".join(header) + "\n" + "\t".join(header) + "\n")))
    assert rows.text == [columns[0]]
    assert rows.pair == (None if len(columns) == 1 else [columns[1]])
    assert rows.labels == [label]


def test_columns_can_be_named(write: Write) -> None:
    table = read_table(write("a.csv", "label,text,left,right,kind\nx,x,l,r,k\n"))
    rows = read_rows(table, ["right", "left"], "kind")
    assert (rows.text, rows.pair, rows.labels) == (["r"], ["l"], ["k"])


def test_incomplete_rows_can_be_left_out(write: Write) -> None:
    table = read_table(write("a.tsv", "text\tlabel\na\t1\nb\nc\t0\n"), skip_incomplete=True)
    assert (len(table.rows), table.skipped) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.tsv", "\n\n", "is empty"),
        ("a.json", " \n", "is empty"),
        ("a.tsv", "text\tlabel\n", "holds no examples"),
        ("a.json", "[]", "has no column|no text column"),
        ("a.xlsx", "text", r"must end in \.csv"),
        ("a.tsv", "text\tlabel\nfine\t1\nshort\n", r"a\.tsv:3: 1 fields instead of 2 \(text, label\)"),
        ("a.csv", "text,label\nfine,1\na,b,c\n", r"a\.csv:3: 3 fields instead of 2"),
        ("a.csv", 'text,label\n"open,1\n', r"a\.csv:2: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", "occurs twice"),
        ("a.csv", "text;label\na;b\n", r"a\.csv: its columns are separated by ';': a \.csv needs commas, a \.tsv tabs"),
        (
            "a.csv",
            "body,label\na,b\n",
            "no text column known by name among body, label, which the first line names; use",
        ),
        ("a.csv", "text,mark\na,b\n", "no label column known by name among text, mark; use --label-column"),
        ("a.csv", "text,label\na,\n", r"a\.csv:2: label must be a text or a number, got ''"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"a\.jsonl:2: label must be .* got None"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', r"a\.jsonl:1: text must be a text, got 5"),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', r"a\.jsonl:1: label must be"),
        ("a.jsonl", '{"text": "a \\ud800", "label": 1}\n', r"a\.jsonl:1: cannot be read: .*surrogates not allowed"),
        ("a.jsonl", '{"text": "a", "label": 1}\n' + "[" * 100_000, r"a\.jsonl:2: cannot be read: nested too deeply"),
        ("a.json", "[" * 100_000, r"a\.json: cannot be read: nested too deeply"),
        ("a.jsonl", "[1]\n[2]\n", r"a\.jsonl:1: expected an object with the columns as keys"),
        ("a.json", '{\n"rows": []}', "expected a list of objects"),
        ("a.json", "[\n{,\n]", r"a\.json:2: not JSON"),
    ],
)
def test_faults(write: Write, name: str, content: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        read_rows(read_table(write(name, content)))


def test_a_field_longer_than_the_csv_module_allows(write: Write) -> None:
    before = csv.field_size_limit()
    table = read_table(write("a.csv", "text,label\n" + "word " * 100_000 + ",1\n"))
    assert len(read_rows(table).text[0]) >= 499_999
    assert csv.field_size_limit() == before


def test_a_number_beyond_all_floats_is_named_by_its_line(write: Write) -> None:
    rows = read_rows(
        read_table(write("a.jsonl", '{"text": "a", "label": 1.5}\n{"text": "b", "label": 1' + "0" * 400 + "}\n"))
    )
    with pytest.raises(TaskError, match=r"a\.jsonl:2: the label must be a finite number"):
        infer_labels(rows, "number").encode(rows)


def test_many_integers_are_classes_with_a_hint(write: Write) -> None:
    def labels(n: int) -> Labels:
        content = "text,label\n" + "".join(f"a,{i % n}\n" for i in range(40))
        return infer_labels(read_rows(read_table(write("a.csv", content))), "auto")

    assert labels(10).note is None
    assert labels(11).note == "11 different integers were taken for classes; to predict numbers: --label-type number"


def test_a_named_column_that_is_missing(write: Write) -> None:
    table = read_table(write("a.csv", "text,label\na,1\n"))
    with pytest.raises(TaskError, match="no column body, kind; it has text, label"):
        read_rows(table, ["body"], "kind")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="is missing"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(TaskError, match="is a folder"):
        read_table(tmp_path)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(TaskError, match="is not UTF-8 text"):
        read_table(path)


ARCHIVE = gzip.compress(b"text,label\n" + bytes(range(32, 127)) * 20)


@pytest.mark.parametrize(
    "damaged", [ARCHIVE[:-9], b"not an archive", ARCHIVE[:20] + bytes(40)], ids=["cut", "foreign", "zeros"]
)
def test_a_damaged_archive(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(damaged)
    with pytest.raises(TaskError, match="cannot be read"):
        read_table(path)
