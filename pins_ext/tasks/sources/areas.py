"""The embedded task: which of seven areas of Python's library does a passage of prose come from?

The areas follow the sections of the library's own index. Modules that belong to several of them (logging, typing) or
to a small one (turtle, argparse) are left out. So are a passage's markup and code and the name of its own package: what
remains has to be read. Every source, a module or a topic of the language reference, lies wholly in training or wholly
in validation, and no sentence occurs twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pins_ext.tasks.arguments import TaskError
from pins_ext.tasks.sources.prose import docstrings, passages, reference_topics
from pins_ext.tasks.sources.rows import Rows

Modules = list[tuple[str, list[str]]]
"""Dotted names of a package's modules with their docstrings."""

MAX_TRAIN = 440
"""Passages per area: a short training sees none twice, and classes, the smallest of about 270, are nearly balanced."""

MAX_VALIDATION = 100
"""Passages per area; evaluating all of them takes seconds on two cores."""

_MIN_SHARE = 0.5
"""An installation with a smaller share of the usual passages has been stripped, and its task would mean little."""


@dataclass(frozen=True)
class Area:
    """Module names of an area; a package stands for all its modules, except those named on the other side."""

    train: str
    validation: str


LANGUAGE = "language"
"""The area whose sources are topics of the reference: all but those below and those about another area."""

LANGUAGE_VALIDATION = (
    "async comparisons context-managers exceptions execmodel import naming "
    "sequence-types typesseq typesseq-mutable with"
)
LANGUAGE_LEFT_OUT = "debugger formatstrings string-methods"

AREAS: Mapping[str, Area] = {
    "text and data": Area(
        train="codecs copyreg csv difflib email gettext html locale mailbox mimetypes pickle pickletools "
        "plistlib pprint quopri re string stringprep tomllib xml",
        validation="base64 configparser email._policybase email.message email.policy json textwrap "
        "xml.dom.expatbuilder xml.dom.minidom",
    ),
    "files and system": Area(
        train="_pyio bz2 dbm filecmp fileinput fnmatch genericpath getpass glob io linecache lzma netrc ntpath os "
        "pathlib platform posixpath shelve site stat tarfile tempfile",
        validation="gzip shutil zipfile",
    ),
    "network": Area(
        train="ftplib http imaplib ipaddress poplib socket ssl webbrowser wsgiref xmlrpc",
        validation="smtplib socketserver urllib",
    ),
    "concurrency": Area(
        train="_threading_local asyncio concurrent contextvars sched selectors signal subprocess threading",
        validation="asyncio.streams asyncio.tasks multiprocessing queue",
    ),
    "numbers and time": Area(
        train="_pydatetime _pydecimal _strptime bisect colorsys datetime decimal fractions heapq numbers random "
        "secrets zoneinfo",
        validation="calendar statistics",
    ),
    "development": Area(
        train="ast bdb cProfile code codeop compileall dis doctest inspect modulefinder profile pstats py_compile "
        "pyclbr symtable tabnanny timeit tokenize trace tracemalloc unittest warnings",
        validation="pdb pydoc traceback unittest.mock",
    ),
}


def area_names() -> tuple[str, ...]:
    """Returns the seven classes, by id."""
    return (LANGUAGE, *AREAS)


def read_areas(path: list[str] | None = None) -> tuple[Rows, Rows]:
    """Makes the training and validation passages; the same for the same Python version.

    Args:
        path: folders or zip files to read in place of the running interpreter's library.
    Raises:
        TaskError: if the installation has no sources or no language reference.
    """
    topics = reference_topics(path)
    packages = {name.partition(".")[0] for area in AREAS.values() for name in f"{area.train} {area.validation}".split()}
    library = {package: list(docstrings(package, path)) for package in sorted(packages)}
    seen: set[str] = set()
    splits = {side: _passages_by_area(side, topics, library, seen) for side in ("validation", "train")}
    expected = len(area_names()) * _MIN_SHARE
    for side, size in (("train", MAX_TRAIN), ("validation", MAX_VALIDATION)):
        found = {name: len(texts) for name, texts in splits[side].items()}
        if sum(found.values()) < expected * size or not all(found.values()):
            raise TaskError(
                f"this Python installation lacks the text of the stdlib task ({side} passages found: {found}): "
                "its library has no sources or no pydoc_data. Use --task glue/... or --train-file"
            )
    return _rows(splits["train"], MAX_TRAIN), _rows(splits["validation"], MAX_VALIDATION)


def _passages_by_area(
    side: str, topics: Mapping[str, str], library: Mapping[str, Modules], seen: set[str]
) -> dict[str, list[str]]:
    """Returns area -> passages of one side, in the order of the sources' names."""
    held, left_out = LANGUAGE_VALIDATION.split(), LANGUAGE_LEFT_OUT.split()
    names = [name for name in sorted(topics) if name not in left_out and (name in held) == (side == "validation")]
    found = {LANGUAGE: [passage for name in names for passage in passages([topics[name]], seen)]}
    for name, area in AREAS.items():
        mine, other = (area.train, area.validation) if side == "train" else (area.validation, area.train)
        found[name] = list(_module_passages(mine.split(), other.split(), library, seen))
    return found


def _module_passages(
    mine: list[str], other: list[str], library: Mapping[str, Modules], seen: set[str]
) -> Iterator[str]:
    """Yields the passages of the modules that `mine` names; one that both lists cover belongs to the longer name."""
    for package in sorted({name.partition(".")[0] for name in mine}):
        for module, texts in library[package]:
            if _longest_prefix(module, mine) > _longest_prefix(module, other):
                # The pure Python version of a module is called _pydecimal, and speaks of decimal.
                yield from passages(texts, seen, hide=package.removeprefix("_py").strip("_"))


def _longest_prefix(module: str, names: list[str]) -> int:
    return max((len(name) for name in names if f"{module}.".startswith(f"{name}.")), default=-1)


def _rows(by_area: Mapping[str, list[str]], limit: int) -> Rows:
    """Thins every area evenly to `limit` passages, so that all its sources stay in."""
    text, labels = [], []
    for name, texts in by_area.items():
        size = min(limit, len(texts))
        text += [texts[i * len(texts) // size] for i in range(size)]
        labels += [name] * size
    return Rows("the standard library", text, None, list(labels), list(range(1, len(text) + 1)))
