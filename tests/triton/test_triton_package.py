"""triton_kernels as a package: its name, what importing it costs, that it says what ops.py and the C++ side say."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from operator_calls import CALLS
from operator_refusals import REFUSED, overlaps, refuse_overlap, refused

from pins_ext import ops, reference, triton_kernels

ROOT = Path(__file__).parents[2]
# Refused on the CPU for what is in a table. On a GPU reading it would wait for the device.
REFUSED_FOR_DATA = (
    "bracket",
    "threshold key",
    "groups of all",
    "groups that are too long",
    "groups that are cut",
    "place of too many weights",
    "places that overlap",
    "places out of order",
    "region without a bracket",
    "bracket wider than its bins",
    "bracket of no stage",
    "ties of no key",
)
REFUSED_BY_TRITON = [
    case for case, (op, *_) in REFUSED.items() if op in triton_kernels.LAUNCHERS and case not in REFUSED_FOR_DATA
]


def test_goes_by_no_other_name() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import triton_kernels"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "this package is pins_ext.triton_kernels, not triton_kernels" in run.stderr


def test_operators_load_without_triton() -> None:
    code = "import sys, pins_ext.ops; print('pins_ext.triton_kernels' in sys.modules, 'triton' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "False"]


@pytest.mark.parametrize("op", triton_kernels.LAUNCHERS)
def test_launchers_take_what_the_schema_says(op: str) -> None:
    module = import_module(f"pins_ext.triton_kernels.{triton_kernels.LAUNCHERS[op]}")
    parameters = inspect.signature(getattr(module, op.rstrip("_"))).parameters.values()
    schema = getattr(torch.ops.pins_ext, op).default._schema
    assert [p.name for p in parameters] == [a.name for a in schema.arguments]
    for parameter, argument in zip(parameters, schema.arguments, strict=True):
        assert (parameter.kind == parameter.KEYWORD_ONLY) == argument.kwarg_only
        assert (parameter.default is parameter.empty) == (not argument.has_default_value())


@pytest.mark.parametrize("op", triton_kernels.LAUNCHERS)
def test_registered_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pins_ext::{op}", "CUDA")


def test_constants_are_those_of_ops() -> None:
    from pins_ext.triton_kernels import count, importance, layout, select

    assert layout.CHUNK.value == ops.CHUNK
    assert count.BINS == ops.BINS
    assert importance.CRITERIA == ops.CRITERIA
    assert select.SCORES == ops.SCORES


def test_criterion_mirrors_the_header() -> None:
    """The same functions in the same order, but for what only writes parameters, and Triton's own."""
    header = (ROOT / "csrc" / "criterion.inl").read_text()
    source = (ROOT / "triton_kernels" / "criterion.py").read_text()
    there = list(dict.fromkeys(re.findall(r"^PINS_HD \w+ (\w+)\(", header, re.MULTILINE)))
    here = re.findall(r"^def (\w+)\(", source, re.MULTILINE)
    assert here.pop(here.index("negative_of"))
    there.remove("fp16_of")
    assert here == there
    numbers = re.search(
        r"kLevels = (\d+), kNanCode = (\d+);\nconstexpr int kSignedLevels = (\d+), .* = (-\d+);", header
    )
    assert numbers is not None
    names = ("LEVELS", "NAN_CODE", "SIGNED_LEVELS", "SIGNED_NAN_CODE")
    assert [re.search(rf"^{name} = tl.constexpr\((.*)\)", source, re.MULTILINE)[1] for name in names] == list(
        numbers.groups()
    )


def test_all_spellings_mean_the_same_groups() -> None:
    from pins_ext.triton_kernels import layout

    header = (ROOT / "csrc" / "layout.inl").read_text()
    assert f"kGroup = {reference.GROUP};" in header
    assert (layout.GROUP.value, layout.GROUP_BYTES.value) == (ops.GROUP, ops.GROUP + 2)
    shapes = [(), (1,), (70,), (5, 33), (4, 0), (0, 3), (6, 5, 3, 3), (64, 64, 3, 3), (3, 5, 31), (2, 40, 64)]
    assert [ops.coded_shape(shape) for shape in shapes] == [reference.coded_shape(shape) for shape in shapes]


@pytest.mark.parametrize("case", REFUSED_BY_TRITON)
def test_bad_arguments_are_refused_in_the_words_of_the_cpu(case: str) -> None:
    op, (args, kwargs), message = refused(case)
    with pytest.raises(RuntimeError, match=message):
        triton_kernels.launcher(op)(*args, **kwargs)


def test_a_table_of_pointers_must_fit() -> None:
    args, kwargs = CALLS["count_"]()
    with pytest.raises(RuntimeError, match=r"pointers must have shape \(2, 3\), got \(3, 3\)"):
        triton_kernels.launcher("count_")(*args, **kwargs, pointers=torch.zeros(3, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("op", "table", "output"), [case for case in overlaps() if case[0] in triton_kernels.LAUNCHERS]
)
def test_a_table_in_the_memory_of_an_output_is_refused(op: str, table: str, output: str) -> None:
    refuse_overlap(op, table, output, triton_kernels.launcher(op))


@pytest.mark.parametrize("op", ["accumulate_", "fold_"])
def test_an_output_that_autograd_records_is_refused(op: str) -> None:
    args, kwargs = CALLS[op]()
    args[0] = [x.requires_grad_() * 1 for x in args[0]]
    with pytest.raises(RuntimeError, match=r"\[0\] is the result of operations that autograd records"):
        triton_kernels.launcher(op)(*args, **kwargs)
