"""English prose that every Python installation carries, as passages: the language reference in `pydoc_data.topics` and
the docstrings of the standard library.

Modules are found and parsed, never imported, so nothing of theirs runs; a zipped library works as well as a folder.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder

MIN_WORDS = 20
"""A shorter passage often tells no area of the library from another ("Return a copy.")."""

MAX_WORDS = 45
"""About 60 word pieces; sentences that would make a passage longer begin the next one."""

_PROSE_SHARE = 0.8
"""A paragraph with a smaller share of plain words is code or a table; seen by reading what falls on either side."""

_NOT_PROSE = re.compile(r">>>|::=|\bdef \w+\(|https?://|[Cc]opyright|^\s*[:@]\w+|={3}|-{3}|\+--|\\x", re.MULTILINE)
_VERSION_NOTE = re.compile(r"(?:Changed|Added|New|Deprecated)\b.{0,40}\bversion\b|(?:Deprecated|Removed) since")
_PLAIN_WORD = re.compile(r"[(\[]?[A-Za-z][a-z]*(?:['-][A-Za-z]+)*[)\]]?[.,:;!?]*")
_FUNCTION_WORD = re.compile(r"\b(?:the|an?|is|are|to|of|in|if|this|that|for|be|as|by|it|or|and)\b", re.IGNORECASE)
_MARKUP = re.compile(r":[a-z:]+:(?=`)|[`*\"]|(?<!\w)'|'(?!\w)|\(\)")
_BULLET = re.compile(r"\s*(?:[-*+•]|\(?\d{1,2}[.)])\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+")
_TYPOGRAPHY = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2026": "..."}
)
"""Curly quotes, dashes, the ellipsis: only the reference is set with them; left in, they would give it away."""


def standard_library() -> list[str]:
    """Returns where the running interpreter keeps its own library: its folder, and a zip file if it has one."""
    archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    return [sysconfig.get_path("stdlib"), *(entry for entry in sys.path if entry.endswith(archive))]


def reference_topics(path: list[str] | None = None) -> dict[str, str]:
    """Returns the language reference as `help()` knows it: topic -> text; empty where it is not installed.

    Args:
        path: folders or zip files to search in place of the standard library's.
    """
    package = _find("pydoc_data", standard_library() if path is None else path)
    folders = package.submodule_search_locations if package is not None else None
    topics = _find("pydoc_data.topics", list(folders)) if folders else None
    tree = _parse(topics) if topics is not None else None
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            return dict(ast.literal_eval(node.value))
    return {}


def docstrings(module: str, path: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yields (dotted name, docstrings in source order) of a module and, for a package, of every module in it.

    Args:
        module: top-level name; one that is missing or has no Python source yields nothing.
        path: folders or zip files to search in place of the standard library's.
    """
    spec = _find(module, standard_library() if path is None else path)
    return iter(()) if spec is None else _spec_docstrings(spec)


def _find(module: str, folders: list[str]) -> ModuleSpec | None:
    try:
        return PathFinder.find_spec(module, folders)
    except (ImportError, SyntaxError):
        # A zip file's finder compiles the module, though it does not run it.
        return None


def _spec_docstrings(spec: ModuleSpec) -> Iterator[tuple[str, list[str]]]:
    tree = _parse(spec)
    if tree is not None:
        yield spec.name, list(_tree_docstrings(tree))
    folders = list(spec.submodule_search_locations or ())
    for name in sorted(entry.name for entry in pkgutil.iter_modules(folders)):
        # What a package is about is not told by its tests or its command line.
        if name not in ("test", "tests", "__main__"):
            child = _find(f"{spec.name}.{name}", folders)
            if child is not None:
                yield from _spec_docstrings(child)


def _parse(spec: ModuleSpec) -> ast.Module | None:
    """Returns a module's syntax tree; None for extension modules and for byte code without source."""
    get_source = getattr(spec.loader, "get_source", None)
    try:
        source = get_source(spec.name) if get_source is not None else None
        return ast.parse(source) if source else None
    except (ImportError, OSError, SyntaxError, UnicodeDecodeError):
        return None


def _tree_docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        # Expressions, most of a tree, define nothing.
        if not isinstance(child, ast.expr):
            yield from _tree_docstrings(child)


def paragraphs(text: str) -> Iterator[str]:
    """Yields the prose of a docstring or topic, a paragraph at a time, on one line and without markup.

    Left out: code, doctests, grammar, tables, headings, signatures, fields, notes on versions and copyright.
    """
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text.translate(_TYPOGRAPHY))):
        if _NOT_PROSE.search(block) or _VERSION_NOTE.search(block):
            continue
        lines = [line[match.end() :] if (match := _BULLET.match(line)) else line for line in block.splitlines()]
        prose = " ".join(_MARKUP.sub("", " ".join(lines)).split())
        if _is_prose(prose):
            yield prose


def _is_prose(text: str) -> bool:
    words = text.split()
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    return len(words) >= 5 and plain >= _PROSE_SHARE * len(words) and _FUNCTION_WORD.search(text) is not None


def passages(texts: Iterable[str], seen: set[str], hide: str | None = None) -> Iterator[str]:
    """Yields passages of MIN_WORDS to about MAX_WORDS words made of neighbouring sentences.

    Args:
        texts: docstrings or topics of one source, in order.
        seen: sentences met so far in any source, by their letters; what occurs again is left out. Updated.
        hide: a module's name, replaced by "stdlib" wherever a text says it.
    """
    name = re.compile(rf"\b_*{re.escape(hide)}(?![A-Za-z0-9])") if hide else None
    words: list[str] = []
    for paragraph in (paragraph for text in texts for paragraph in paragraphs(text)):
        for sentence in _SENTENCE_END.split(name.sub("stdlib", paragraph) if name else paragraph):
            letters = re.sub(r"[^a-z]+", " ", sentence.lower()).strip()
            if letters in seen:
                continue
            seen.add(letters)
            more = sentence.split()
            if len(words) >= MIN_WORDS and len(words) + len(more) > MAX_WORDS:
                yield " ".join(words)
                words = []
            words += more
        if len(words) >= MIN_WORDS:
            yield " ".join(words)
            words = []
