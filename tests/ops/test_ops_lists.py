"""Lists of tensors cross into an operator by reference, and are given back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from operator_calls import CALLS, Arguments
from torch import Tensor

from pins_ext import ops

pins = torch.ops.pins_ext


def of_lists(call: Arguments) -> Iterator[Tensor]:
    args, kwargs = call
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, list):
            yield from (x for x in arg if isinstance(x, Tensor))


LISTED = [name for name, call in CALLS.items() if any(True for _ in of_lists(call()))]


@pytest.mark.parametrize("name", LISTED)
def test_no_tensor_outlives_a_call(name: str) -> None:
    args, kwargs = CALLS[name]()
    seen = [weakref.ref(x) for x in of_lists((args, kwargs))]
    getattr(pins, name)(*args, **kwargs)
    del args, kwargs
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)


def test_no_tensor_outlives_a_refused_call() -> None:
    args, kwargs = CALLS["masked_adamw_"]()
    seen = [weakref.ref(x) for x in of_lists((args, kwargs))]
    assert seen
    args[-1 if isinstance(args[-1], str) else -2] = "no such criterion"
    with pytest.raises(RuntimeError, match="criterion must be one of"):
        pins.masked_adamw_(*args, **kwargs)
    del args, kwargs
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)


def test_threads_that_share_tensors_may_call_at_once() -> None:
    tensors = [torch.ones(3) for _ in range(200)]
    layout = ops.Layout.of(tensors)

    def norm(_: int) -> float:
        return float(ops.sum_of_squares(tensors, layout.places, layout.chunks))

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(norm, range(100))) == {600.0}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", LISTED)
def test_lazy_copies_are_made_of_what_is_written_alone(name: str, keep: bool) -> None:
    args, kwargs = CALLS[name]()
    written, read = [], []
    for i, argument in enumerate(getattr(pins, name).default._schema.arguments[: len(args)]):
        if isinstance(args[i], list) and all(isinstance(x, Tensor) for x in args[i]):
            copies = [torch._lazy_clone(x) for x in args[i]]
            (written if argument.alias_info and argument.alias_info.is_write else read).extend(copies)
            args[i] = [pins.keep_list(copies)] if keep and copies else copies
    getattr(pins, name)(*args, **kwargs)
    assert all(map(torch._C._is_cow_tensor, read))
    assert not any(x.numel() and torch._C._is_cow_tensor(x) for x in written)


def test_a_lazy_copy_is_made_before_it_is_written() -> None:
    original = torch.ones(100)
    copy, mask = torch._lazy_clone(original), ops.new_mask(original)
    layout = ops.Layout.of([original])
    ops.apply_mask_([copy], [mask.zero_()], layout.places, layout.chunks)
    assert torch.equal(copy, torch.zeros(100))
    assert torch.equal(original, torch.ones(100))
