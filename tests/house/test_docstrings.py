"""Public docstrings as editors and Sphinx read them: each argument on a line of its own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("pins_ext", "triton_kernels", "bench", "docs/_ext", "tests/helpers")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SECTION = re.compile(r"^(Args|Attributes|Raises):\n((?:    .*\n|\n)*)", re.MULTILINE)


def names_of(node: ast.AST) -> set[str]:
    """Parameters of a function; fields and attributes of a class, and the parameters of its constructor."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        return {argument.arg for argument in given if argument is not None}
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            names.add(child.target.id)
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id == "self":
            names.add(child.attr)
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            names |= names_of(child)
    return names


def shared_lines(source: str) -> Iterator[str]:
    """Entries of a docstring that hold a second argument or a second error."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        known = "|".join(map(re.escape, sorted(names_of(node)))) or "-"
        for section, text in SECTION.findall((ast.get_docstring(node) or "") + "\n"):
            second = r"\. \w+(Error|Exception|Warning): " if section == "Raises" else rf"\. ({known})(, ({known}))*: "
            for entry in re.split(r"\n    (?! )", "\n" + text):
                if re.search(second, " ".join(entry.split())):
                    yield f"{node.name}: {' '.join(entry.split())}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_argument_has_a_line_of_its_own(path: Path) -> None:
    assert list(shared_lines(path.read_text())) == []


def test_what_shares_a_line_is_found() -> None:
    source = 'def f(a, b):\n    """Sum.\n\n    Args:\n        a: one\n            term. b: another.\n    """\n'
    assert list(shared_lines(source)) == ["f: a: one term. b: another."]
