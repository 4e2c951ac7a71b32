"""Docstrings and topics are found without importing anything, and prose is told from code."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from pins_ext.tasks.sources.prose import MAX_WORDS, MIN_WORDS, docstrings, paragraphs, passages, reference_topics

LIBRARY = {
    "dangerous.py": '"""Never import this."""\nraise SystemExit("imported")\n',
    "package/__init__.py": '"""The package."""\nclass A:\n  """A class."""\n  def f(self):\n    """Its method."""\n',
    "package/inner.py": 'async def g():\n    """A coroutine."""\n',
    "package/broken.py": "def (:\n",
    "package/__main__.py": '"""A command line."""\n',
    "package/tests/__init__.py": '"""A test."""\n',
    "pydoc_data/__init__.py": "",
    "pydoc_data/topics.py": "# made\ntopics = {'if': 'The if statement.',\n 'for': 'The for ' 'statement.'}\n",
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, source in LIBRARY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


@pytest.fixture(params=["folder", "zip"])
def path(request: pytest.FixtureRequest, library: Path) -> list[str]:
    if request.param == "folder":
        return [str(library)]
    archive = library / "library.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in LIBRARY:
            file.write(library / name, name)
    return [str(archive)]


def test_nothing_is_imported(path: list[str]) -> None:
    assert list(docstrings("dangerous", path)) == [("dangerous", ["Never import this."])]
    assert "dangerous" not in sys.modules


def test_a_package_is_read_with_its_modules_in_source_order(path: list[str]) -> None:
    found = list(docstrings("package", path))
    assert found == [("package", ["The package.", "A class.", "Its method."]), ("package.inner", ["A coroutine."])]


def test_a_missing_module_has_no_docstrings(path: list[str]) -> None:
    assert list(docstrings("missing", path)) == []


def test_extension_modules_have_no_docstrings() -> None:
    assert list(docstrings("_socket")) == []


def test_topics_are_parsed(path: list[str]) -> None:
    assert reference_topics(path) == {"if": "The if statement.", "for": "The for statement."}


def test_topics_of_an_installation_without_them(tmp_path: Path) -> None:
    assert reference_topics([str(tmp_path)]) == {}


def test_topics_equal_the_imported_ones() -> None:
    from pydoc_data.topics import topics

    assert reference_topics() == topics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return the *first* item of ``items``.", ["Return the first item of items."]),
        ("It\u2019s the caller's \u201cchoice\u201d \u2014 always.", ["It's the caller's choice - always."]),
        ("See :func:`close` for what it does to the file.", ["See close for what it does to the file."]),
        ("Call it with a 'Path' or 'str', as the\nreader() says.", ["Call it with a Path or str, as the reader says."]),
        ("  * one of the items,\n  * and another of them", ["one of the items, and another of them"]),
        (">>> f(1) and the rest of it is code\n2", []),
        ("open(file, mode='r', buffering=-1)", []),
        ("NAME\n====\nof the title is here to be read", []),
        ("stmt ::= the grammar of a statement", []),
        ("Changed in version 3.4: the argument is now a list of names.", []),
        ("Copyright of the authors is held by them all.", []),
        ("See https://example.org for the rest of the story.", []),
        (":param name: the name of the file to be read", []),
        ("x = 1; y = 2; z = {a: b for c in d}", []),
        ("Too short.", []),
    ],
)
def test_paragraphs(text: str, expected: list[str]) -> None:
    assert list(paragraphs(text)) == expected


def sentences(n: int, word: str = "word") -> str:
    names = ("abcdefghij"[i % 10] * (1 + i // 10) for i in range(n))
    return " ".join(f"This sentence about {word} {name} is the one to read." for name in names)


def test_passages_are_neither_short_nor_long() -> None:
    for text in passages([sentences(40)], set()):
        assert MIN_WORDS <= len(text.split()) <= MAX_WORDS


def test_short_texts_are_joined_and_a_rest_is_dropped() -> None:
    texts = [sentences(1, word) for word in ("one", "two", "three")]
    assert list(passages(texts, set())) == [" ".join(texts[:2])]


def test_no_sentence_occurs_twice() -> None:
    seen: set[str] = set()
    first = list(passages([sentences(12)], seen))
    assert first
    assert list(passages([sentences(12)], seen)) == []


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("of the queue module", "of the stdlib module"),
        ("of queue.Queue objects", "of stdlib.Queue objects"),
        ("of the _queue module", "of the stdlib module"),
        ("of queues and Queues", "of queues and Queues"),
    ],
)
def test_the_name_of_the_module_is_hidden(text: str, hidden: str) -> None:
    rest = " and this is a long rest that makes the sentence a passage of its own, because it has many words."
    assert list(passages([text + rest], set(), hide="queue")) == [hidden + rest]


def test_words_survive_json() -> None:
    """Topics hold characters outside ASCII; a passage is ordinary text."""
    (text,) = passages(["The value of π is a number and so is that of τ. " + sentences(3)], set())
    assert json.loads(json.dumps(text)) == text
