"""Kept lists: one tensor stands for many, and an operator does and refuses what it would of the list itself."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from operator_calls import CALLS, Arguments, tensors_in
from operator_refusals import REFUSED, refused
from torch import Tensor

from pins_ext import ops
from pins_ext._C import same_items

pins = torch.ops.pins_ext


def is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, Tensor) and x.is_cpu for x in value)


def kept(call: Arguments) -> Arguments:
    args, kwargs = call
    return [[pins.keep_list(x)] if is_list(x) else x for x in args], kwargs


OF_LISTS = [name for name, call in CALLS.items() if any(map(is_list, call()[0]))]


@pytest.mark.parametrize("name", OF_LISTS)
def test_a_kept_list_is_as_good_as_the_list(name: str) -> None:
    torch.set_num_threads(1)  # several collect candidates in any order
    (args, kwargs), (others, other_kwargs) = CALLS[name](), CALLS[name]()
    expected = getattr(pins, name)(*args, **kwargs)
    crossing, _ = kept((others, {}))
    result = getattr(pins, name)(*crossing, **other_kwargs)
    ours = tensors_in(result, others, list(other_kwargs.values()))
    theirs = tensors_in(expected, args, list(kwargs.values()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_of_a_list_is_refused_of_a_kept_one(case: str) -> None:
    name, call, message = refused(case)
    args, kwargs = kept(call)
    with pytest.raises(RuntimeError, match=message):
        getattr(pins, name)(*args, **kwargs)


def masking(*params: Tensor) -> tuple[Callable[[Any], None], Tensor]:
    """apply_mask_ with masks of zeros to these parameters, and what stands for them."""
    layout, masks = ops.Layout.of(params), [ops.new_mask(p).zero_() for p in params]
    return lambda tensors: ops.apply_mask_(tensors, masks, layout.places, layout.chunks), pins.keep_list(list(params))


def test_a_kept_tensor_may_be_given_other_memory() -> None:
    p, q = torch.ones(700), torch.ones(5)
    mask, stands = masking(p, q)
    before, other, third = p.data, torch.ones(700), torch.ones(900)
    p.data = other
    mask([stands])
    assert before.all()
    assert not other.any()
    q.set_(third.untyped_storage(), 10, (5,))
    mask([stands])
    assert third.nonzero().flatten().tolist() == [*range(10), *range(15, 900)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.resize_(800), r"params\[1\] must have 700 elements, got 800"),
        (lambda p: p.set_(torch.ones(10, 70).t()), r"params\[1\] must be contiguous, got strides \(1, 70\)"),
        (lambda p: setattr(p, "data", torch.ones(700).double()), r"params\[1\] is float64|must be float32"),
    ],
    ids=["size", "strides", "dtype"],
)
def test_a_kept_tensor_is_looked_at_in_every_call(change: Callable[[Tensor], object], message: str) -> None:
    p = torch.ones(700)
    mask, stands = masking(torch.ones(5), p)
    mask([stands])
    change(p)
    with pytest.raises(RuntimeError, match=message):
        mask([stands])


def test_a_lazy_copy_in_a_kept_list_is_made_before_it_is_written() -> None:
    originals = [torch.ones(100) for _ in range(600)]
    copies = [torch._lazy_clone(x) for x in originals]
    mask, stands = masking(*copies)
    mask([stands])
    assert not any(x.any() for x in copies)
    assert all(x.all() for x in originals)


def test_views_of_one_lazy_copy_in_a_kept_list_share_what_is_made() -> None:
    original = torch.ones(4000, 3)
    copy = torch._lazy_clone(original)
    mask, stands = masking(*copy)
    mask([stands])
    assert not copy.any()
    assert original.all()


def test_only_what_was_returned_stands_for_a_list() -> None:
    mask, stands = masking(torch.ones(5))
    for other in (stands.clone(), torch.zeros(1, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"params\[0\] must be float32 or bfloat16 or float16, got int64"):
            mask([other])
    with pytest.raises(RuntimeError, match="params must have 1 tensors"):
        mask([stands, stands])
    pins.forget_list(stands)
    pins.forget_list(stands)
    with pytest.raises(RuntimeError, match="got int64"):
        mask([stands])


def test_a_kept_list_can_be_kept_again() -> None:
    p = torch.ones(5)
    mask, stands = masking(p)
    again = pins.keep_list([stands])
    pins.forget_list(stands)
    mask([again])
    assert not p.any()


def test_threads_may_call_with_a_kept_list_while_others_come_and_go() -> None:
    tensors = [torch.ones(3) for _ in range(1000)]
    layout, stands = ops.Layout.of(tensors), pins.keep_list(tensors)

    def norm(_: int) -> float:
        own = pins.keep_list(tensors[:500])
        total = float(ops.sum_of_squares([stands], layout.places, layout.chunks))
        pins.forget_list(own)
        return total

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(norm, range(100))) == {3000.0}


def stands(crossing: Any) -> bool:
    return [x.dtype for x in crossing] == [torch.int64]


def many(n: int = ops.MANY) -> list[Tensor]:
    return [torch.ones(2) for _ in range(n)]


def test_a_list_is_kept_when_it_comes_again() -> None:
    lists, first, second = ops.KeptLists(), many(), many()
    assert lists.of("use", first, second) == (first, second)
    one, other = lists.of("use", first, second)
    assert stands(one)
    assert stands(other)
    assert lists.of("use", tuple(first), second) == (one, other)
    assert lists.of("another", first) == (first,)
    changed = [*first[:-1], torch.ones(2)]
    assert lists.of("use", changed, second) == (changed, other)
    assert lists.of("use", first[1:], second) == (first[1:], other)
    assert lists.of("use", [], second) == ([], other)
    assert lists.of("use", first, second) == (first, other)


def test_lists_are_compared_by_what_they_hold_and_not_by_values() -> None:
    equal, other = torch.ones(()), torch.ones(())
    assert same_items([], [])
    assert same_items([equal, other], [equal, other])
    assert not same_items([equal, other], [other, equal])
    assert not same_items([equal], [equal, other])
    references = sys.getrefcount(equal)
    for _ in range(3):
        same_items([equal], [equal])
    assert sys.getrefcount(equal) == references
    for wrong in ((equal,), None):
        with pytest.raises(TypeError, match="takes two lists"):
            same_items([equal], wrong)
    with pytest.raises(TypeError):
        same_items([equal])


@pytest.mark.parametrize(
    "tensors",
    [
        many(ops.MANY - 1),
        [torch.ones(2, device="meta") for _ in range(ops.MANY)],
        [*many(), torch.ones(2, device="meta")],
        [*many(), torch.ones(2).as_subclass(type("Own", (Tensor,), {}))],
    ],
    ids=["few", "another device", "two devices", "a subclass"],
)
def test_other_lists_cross_as_they_are(tensors: list[Tensor]) -> None:
    lists = ops.KeptLists()
    for _ in range(3):
        (crossing,) = lists.of("use", tensors)
        assert list(map(id, crossing)) == list(map(id, tensors))


@pytest.mark.parametrize("end", ["object", "list"])
def test_tensors_live_as_long_as_they_are_kept(end: str) -> None:
    lists: ops.KeptLists | None = ops.KeptLists()
    tensors = many()
    seen = [weakref.ref(x) for x in tensors]
    for _ in range(2):
        lists.of("use", tensors)
    del tensors
    gc.collect()
    assert all(ref() is not None for ref in seen)
    if end == "object":
        lists = None
    else:
        lists.of("use", many())
    gc.collect()
    assert not any(ref() is not None for ref in seen)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda lists: pickle.loads(pickle.dumps(lists))])
def test_a_copy_begins_anew(again: Callable[[ops.KeptLists], ops.KeptLists]) -> None:
    lists, tensors = ops.KeptLists(), many()
    for _ in range(2):
        lists.of("use", tensors)
    assert again(lists).of("use", tensors) == (tensors,)
