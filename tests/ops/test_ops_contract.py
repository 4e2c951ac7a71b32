"""Every operator passes torch.library.opcheck, and refuses bad arguments by name."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from operator_calls import CALLS
from operator_refusals import REFUSED, by_name, overlapping, overlaps, refuse_overlap, refused, written

pins = torch.ops.pins_ext


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    args, kwargs = CALLS[name]()
    torch.library.opcheck(getattr(pins, name).default, tuple(args), kwargs)


def test_every_operator_is_checked() -> None:
    registered = {
        s.name.removeprefix("pins_ext::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("pins_ext::")
    }
    # What stands for a kept list is another tensor in every call: see test_ops_kept.
    assert registered == {*CALLS, "cpu_capability", "keep_list", "forget_list"}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_by_name(case: str) -> None:
    name, (args, kwargs), message = refused(case)
    with pytest.raises(RuntimeError, match=message):
        getattr(pins, name)(*args, **kwargs)


COUNTED = ("stats", "threshold", "counts", "nans", "found", "candidates")


def counted() -> list[tuple[str, str, str]]:
    """(operator, what it counts in, list that it writes)."""
    found = []
    for op, call in CALLS.items():
        given, outputs = by_name(op, call()), written(op)
        lists = [name for name in sorted(outputs) if isinstance(given.get(name), list) and given[name]]
        found += [
            (op, name, one) for name in COUNTED if name in outputs and given.get(name) is not None for one in lists
        ]
    return found


@pytest.mark.parametrize(("op", "count", "output"), counted())
def test_counts_in_the_memory_of_a_written_list_are_refused(op: str, count: str, output: str) -> None:
    refuse_overlap(op, count, output, getattr(pins, op))


@pytest.mark.parametrize("op", ["boundary_adamw_", "boundary_sgd_", "pack_around_", "collect_"])
def test_counts_in_the_memory_of_others_are_refused(op: str) -> None:
    given = by_name(op, CALLS[op]())
    for one, other in combinations([name for name in COUNTED if name in given], 2):
        arguments = by_name(op, CALLS[op]())
        arguments[one], arguments[other] = overlapping(arguments[one], arguments[other])
        with pytest.raises(RuntimeError, match=f"{other} is written and shares memory with {one}"):
            getattr(pins, op)(**arguments)


# `select` finds that nothing competes, and reads nothing.
WITH_CHUNKS = [op for op, call in CALLS.items() if "chunks" in by_name(op, call()) and op != "select"]


@pytest.mark.parametrize("op", WITH_CHUNKS)
def test_chunks_of_no_tensors_are_refused(op: str) -> None:
    """On a GPU, too, where nobody looks at what they hold."""
    arguments = by_name(op, CALLS[op]())
    arguments |= {name: [] for name, x in arguments.items() if isinstance(x, list)}
    arguments["places"] = arguments["places"][:0]
    with pytest.raises(RuntimeError, match="chunks must have no rows where places has none, got 2"):
        getattr(pins, op)(**arguments)


@pytest.mark.parametrize(("op", "table", "output"), list(overlaps()))
def test_a_table_in_the_memory_of_an_output_is_refused(op: str, table: str, output: str) -> None:
    refuse_overlap(op, table, output, getattr(pins, op))


# Autograd records operations on floating point numbers alone.
FLOAT_LISTS = [
    (op, name)
    for op, call in CALLS.items()
    for name, x in by_name(op, call()).items()
    if name in written(op) and isinstance(x, list) and x[0].is_floating_point()
]


@pytest.mark.parametrize(("op", "output"), FLOAT_LISTS)
def test_an_output_that_autograd_records_is_refused(op: str, output: str) -> None:
    """The gradient of a weight masked behind autograd's back would be as if it were not masked."""
    arguments = by_name(op, CALLS[op]())
    leaves = [x.requires_grad_() for x in arguments[output]]
    arguments[output] = [leaf * 1 for leaf in leaves]
    with pytest.raises(RuntimeError, match=rf"{output}\[0\] is the result of operations that autograd records"):
        getattr(pins, op)(**arguments)
    with torch.no_grad():
        getattr(pins, op)(**arguments)
