"""Every operator has a typed, documented function of its name in pins_ext.ops."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from operator_calls import CALLS, Arguments, tensors_in

from pins_ext import ops
from pins_ext.ops import PackedWeight
from pins_ext.ops.grouped import GroupedWeight

OPERATORS = sorted(
    s.name.removeprefix("pins_ext::")
    for s in torch._C._jit_get_all_schemas()
    if s.name.startswith("pins_ext::") and not s.name.endswith("_list")  # called by ops.KeptLists alone
)


PACKED = (PackedWeight, GroupedWeight)
"""Named tuples of tensors that a function takes, or returns, in place of these tensors."""


def packs(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a function that stand for all tensors of a packed weight: name -> its class."""
    hints = typing.get_type_hints(function)
    return {name: hint for name, hint in hints.items() if name != "return" and hint in PACKED}


def parameters_of(function: Callable[..., Any]) -> list[tuple[str, bool, Any]]:
    """(name, whether it is keyword-only, default), with the fields of a packed weight in its place."""
    packed = packs(function)
    return [
        (name, p.kind is p.KEYWORD_ONLY, p.default)
        for p in inspect.signature(function).parameters.values()
        for name in (packed[p.name]._fields if p.name in packed else [p.name])
    ]


def arguments_of(op: str) -> list[tuple[str, bool, Any]]:
    """The same of an operator's schema."""
    return [
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else inspect.Parameter.empty)
        for a in getattr(torch.ops.pins_ext, op).default._schema.arguments
    ]


def as_called(op: str) -> tuple[Arguments, Arguments]:
    """The good call of an operator, and the same call of its function; both get tensors of their own."""
    (args, kwargs), (typed, typed_kwargs) = CALLS[op](), CALLS[op]()
    for kind in packs(getattr(ops, op)).values():
        at = [name for name, _, _ in arguments_of(op)].index(kind._fields[0])
        size = len(kind._fields)
        typed[at : at + size] = [kind(*typed[at : at + size])]
    return (args, kwargs), (typed, typed_kwargs)


@pytest.mark.parametrize("op", OPERATORS)
def test_the_parameters_are_those_of_the_schema(op: str) -> None:
    assert op in ops.__all__
    assert parameters_of(getattr(ops, op)) == arguments_of(op)


@pytest.mark.parametrize("op", OPERATORS)
def test_each_parameter_is_typed_and_documented(op: str) -> None:
    function = getattr(ops, op)
    documented = re.findall(r"^    (\w+): \S", inspect.getdoc(function) or "", re.MULTILINE)
    names = [*inspect.signature(function).parameters]
    assert [name for name in documented if name in names] == names
    hints = typing.get_type_hints(function)
    assert set(hints) == {*names, "return"}
    assert Any not in hints.values()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads collect candidates in any order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.usefixtures("one_thread")
def test_a_call_is_the_operators(op: str) -> None:
    """The same results and, of tensors written in place, the same contents."""
    (args, kwargs), (typed, typed_kwargs) = as_called(op)
    expected = getattr(torch.ops.pins_ext, op)(*args, **kwargs)
    result = getattr(ops, op)(*typed, **typed_kwargs)
    ours = tensors_in(result, *typed, *typed_kwargs.values())
    theirs = tensors_in(expected, *args, *kwargs.values())
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", OPERATORS)
def test_every_argument_reaches_the_operator(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that change nothing here, like a scale of 1 or the addresses of a GPU."""
    arguments = {name: object() for name, _, _ in arguments_of(op)}
    positional = [name for name, keyword_only, _ in arguments_of(op) if not keyword_only]
    received: dict[str, object] = {}

    def receive(*args: object, **kwargs: object) -> tuple[object, ...]:
        received.update(dict(zip(positional, args, strict=False)) | kwargs)
        return tuple(range(len(getattr(typing.get_type_hints(function)["return"], "_fields", range(5)))))

    monkeypatch.setattr(torch.ops.pins_ext, op, receive)
    function = getattr(ops, op)
    packed = {name: kind(*(arguments[f] for f in kind._fields)) for name, kind in packs(function).items()}
    function(**{name: arguments.get(name) for name in inspect.signature(function).parameters} | packed)
    assert received == arguments


def test_the_capability_is_named() -> None:
    assert ops.cpu_capability() == torch.ops.pins_ext.cpu_capability()
