"""Which of its layers' weights a module reads itself, instead of calling the layer: found in its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_TOLD = ("dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_cuda", "requires_grad")
"""What a weight without data can still be asked for."""


def weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the layers of which a module of this class reads `self.NAME.weight`, beyond its dtype and shape.

    Args:
        kind: its class; the classes that it is made of are looked at too, as far as their source is there.
    """
    return frozenset(name for each in kind.__mro__ if _is_own(each) for name in _names(each))


def _is_own(kind: type) -> bool:
    return issubclass(kind, nn.Module) and kind is not nn.Module and not kind.__module__.startswith("torch.")


def _names(kind: type) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return
    yield from _reads(tree)


def _reads(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef) and node.name == "__init__":
        return  # there weights are made, and tied
    for inner in ast.iter_child_nodes(node):
        match inner:
            case ast.Attribute(
                attr="weight", ctx=ast.Load(), value=ast.Attribute(attr=name, value=ast.Name(id="self"))
            ):
                if not _only_asks(node):
                    yield name
        yield from _reads(inner)


def _only_asks(node: ast.AST) -> bool:
    """Whether this asks what kind of tensor is in it."""
    if isinstance(node, ast.Attribute):
        return node.attr in _TOLD
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")
