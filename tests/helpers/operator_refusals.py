"""Bad arguments of the operators, and what they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import tensors
from operator_calls import CALLS, Arguments, lists, pruned_weight, tables
from torch import Tensor

from pins_ext import ops

PLACES, CHUNKS = tables()
MAX_INDEX = ops.MAX_INDEX


def replaced(row: int, column: int, value: int, table: Tensor = PLACES) -> Tensor:
    table = table.clone()
    table[row, column] = value
    return table


SPARSE = torch.ops.pins_ext.sparse_pack(pruned_weight())

# The operator, the position or keyword of an argument, what to put there, what the message says.
REFUSED: dict[str, tuple[str, int | str, Any, str]] = {
    "not contiguous": (
        "apply_mask_",
        0,
        [torch.ones(5), torch.ones(0), torch.ones(10, 70).t()],
        r"params\[2\] must be contiguous, got strides \(1, 70\)",
    ),
    "dtype": (
        "accumulate_",
        1,
        lists(1, torch.float64)[0],
        r"params\[0\] must be float32 or bfloat16 or float16, got float64",
    ),
    "state dtype": (
        "fold_",
        0,
        lists(1, torch.float16)[0],
        r"exp_avg_ipt\[0\] must be float32 or bfloat16( or uint8)?, got float16",
    ),
    "mixed dtypes": (
        "apply_mask_",
        0,
        [torch.ones(5), torch.ones(0), torch.ones(700, dtype=torch.bfloat16)],
        r"params\[2\] is bfloat16 but params\[0\] is float32",
    ),
    "dtypes of two lists": (
        "accumulate_",
        2,
        lists(1, torch.bfloat16)[0],
        r"grads must have the dtype of params \(float32\), got bfloat16",
    ),
    "moments": (
        "masked_adamw_",
        2,
        lists(1, torch.bfloat16)[0],
        r"exp_avg_sq must have the dtype of exp_avg \(float32\)",
    ),
    "length": ("fold_", 2, [torch.ones(5)], "ipt must have 3 tensors, one per row of places, got 1"),
    "size": ("pack_", 3, tensors([5, 0, 701], torch.float32), r"b\[2\] must have 700 elements, got 701"),
    "mask size": (
        "apply_mask_",
        1,
        [torch.zeros(n, dtype=torch.uint8) for n in (8, 0, 87)],
        r"masks\[2\] must have 88 bytes for 700 weights, got 87",
    ),
    "mask dtype": (
        "apply_mask_",
        1,
        [torch.zeros(n, dtype=torch.bool) for n in (8, 0, 88)],
        r"masks\[0\] must be uint8, got bool",
    ),
    "criterion": ("accumulate_", 8, "pin", "criterion must be one of pins, pins-signed, .*; got 'pin'"),
    "score": ("count_", 5, "sum", "score must be one of product, identity, deviation, magnitude, fisher; got 'sum'"),
    "factors missing": ("count_", 5, "fisher", "factors must be given for the score 'fisher'"),
    "factors too many": ("count_", "factors", torch.ones(3), "factors must be left out for the score 'product'"),
    "factors of moments": ("fold_moments_", 7, torch.ones(3), r"factors must have shape \(3, 3\), got \(3,\)"),
    "operand too many": ("count_", 5, "identity", "b must be empty for the score 'identity', got 3 tensors"),
    "operand missing": ("count_", 2, [], "b must have 3 tensors"),
    "params missing": ("accumulate_", 1, [], "params may be empty only for the criterion 'precomputed', got 'pins'"),
    "lr": ("accumulate_", 5, torch.ones(2), r"lr must have shape \(3,\), got \(2,\)"),
    "accepted": ("fold_", 5, torch.ones(2), "accepted must have one element, got 2"),
    "clip": ("accumulate_", "clip", torch.ones(1, dtype=torch.float64), "clip must be float32, got float64"),
    "rng": ("accumulate_", 7, torch.ones(2), "rng must be int64, got float32"),
    "hyper": ("masked_adamw_", 9, torch.ones(3, 7), r"hyper must have shape \(3, 8\), got \(3, 7\)"),
    "bias": (
        "masked_adamw_",
        9,
        torch.tensor([[1.0] * 8, [1.0] * 8, [1.0] * 6 + [0.0, 1.0]]),
        r"hyper\[2\] has 0 for sqrt\(1 - beta2\^t\), which is above 0 and at most 1",
    ),
    "momentum without buffer": ("masked_sgd_", 1, [], r"momentum_buffer is empty, but hyper\[0\] has momentum 1"),
    "counts": ("count_", 0, torch.zeros(7, dtype=torch.int64), r"counts must have shape \(65537,\), got \(7,\)"),
    "bracket": ("count_", 6, torch.tensor([0, 2**32 - 1, 15, 0, 0]), "does not fit 65536 bins"),
    "counts without bracket": ("fold_", "bracket", None, "bracket and counts come together or not at all"),
    "threshold shape": (
        "pack_",
        7,
        torch.zeros(2, 2, dtype=torch.int64),
        r"threshold must have shape \(1, 2\), got \(2, 2\)",
    ),
    "eligible scores": ("eligible_", 0, lists(1, torch.bfloat16)[0], r"scores\[0\] must be float32, got bfloat16"),
    "eligible sizes": ("eligible_", 0, tensors([5, 0, 701], torch.float32), r"scores\[2\] must have 700 elements"),
    "eligible nans": ("eligible_", 1, torch.zeros(2, dtype=torch.int64), r"nans must have shape \(3,\), got \(2,\)"),
    "groups": ("eligible_", 7, torch.ones(3, 2, dtype=torch.int64), r"groups must have shape \(3, 3\), got \(3, 2\)"),
    "groups of all": ("eligible_", 7, torch.tensor([[5, 5, 1], [2, 4, 1], [2, 4, 7]]), r"groups\[0\] keeps 5 of 5"),
    "groups that are too long": ("eligible_", 7, torch.tensor([[1, 5, 1], [2, 4, 1], [2, 50, 7]]), "of at most 32"),
    "groups that are cut": (
        "eligible_",
        7,
        torch.tensor([[1, 5, 1], [2, 4, 1], [2, 4, 50]]),
        r"groups\[2\] has weights 50 apart in groups of 4, which do not fill 700 weights",
    ),
    "threshold key": ("pack_", 7, torch.tensor([[2**32, 0]]), r"threshold\[0\] has key 4294967296"),
    "position": ("settle_around", 6, torch.tensor([3]), r"position must have shape \(\), got \(1,\)"),
    "position of nothing": (
        "settle_around",
        6,
        torch.tensor(705),
        "position must be the rank of one of 705 weights, got 705",
    ),
    "threshold of a bracket": (
        "pack_around_",
        2,
        torch.zeros(2, dtype=torch.int64),
        r"threshold must have shape \(1, 2\), got \(2,\)",
    ),
    "boundary: half a choice": ("boundary_adamw_", "stats", None, "around, stats and threshold come together"),
    "boundary: stats": (
        "boundary_adamw_",
        "stats",
        torch.zeros(3, 2, dtype=torch.int64),
        r"stats must have shape \(3, 3\), got \(3, 2\)",
    ),
    "boundary: counts of no fold": ("boundary_sgd_", "fold_rng", None, "counts need fold_rng"),
    "boundary: counts without bracket": ("boundary_sgd_", "bracket", None, "bracket and counts come together"),
    "boundary: no masks to choose": ("boundary_adamw_", 5, [], "masks must be given: they are chosen here"),
    "boundary: no window to fold": ("boundary_adamw_", 3, [], "ipt must be given: it is folded here"),
    "boundary: averages of another dtype": (
        "boundary_adamw_",
        7,
        lists(1, torch.bfloat16)[0],
        r"exp_avg_unc must have the dtype of exp_avg_ipt \(float32\), got bfloat16",
    ),
    "boundary: a rank outside": (
        "boundary_sgd_",
        "around",
        torch.tensor([3200000000, 3210000000, 10, 800, 0]),
        "bracket has rank 800, but only",
    ),
    "boundary: momentum without buffer": ("boundary_sgd_", 1, [], r"momentum_buffer is empty, but hyper\[0\]"),
    "streams of two sizes": ("stream_", 1, [torch.ones(699)], r"read\[0\] must have 700 elements, got 699"),
    "too many streams": ("stream_", 1, [torch.ones(700)] * 15, "may have 16 tensors in all, got 17"),
    "stats": ("pack_", 1, torch.zeros(3, 2, dtype=torch.int64), r"stats must have shape \(3, 3\), got \(3, 2\)"),
    "grouped: a weight of another dtype": (
        "grouped_pack",
        0,
        torch.ones(3, 3, dtype=torch.int8),
        "weight must be float32 or bfloat16 or float16, got int8",
    ),
    "grouped: a weight of three dimensions": (
        "grouped_pack",
        0,
        torch.ones(3, 3, 3),
        "weight must have two dimensions",
    ),
    "grouped: too many columns": ("grouped_pack", 0, torch.ones(1, 65537), "at most 65536 columns, got 65537"),
    "sparse: a weight of another dtype": (
        "sparse_pack",
        0,
        torch.ones(3, 3, dtype=torch.float64),
        "weight must be float32 or bfloat16 or int8, got float64",
    ),
    "sparse: a weight of three dimensions": ("sparse_pack", 0, torch.ones(3, 3, 3), "weight must have two dimensions"),
    "sparse: another number of inputs": ("sparse_linear", 0, torch.ones(7, 513), r"starts must have shape \(7, 2\)"),
    "sparse: another number of outputs": ("sparse_linear", 7, 600, r"starts must have shape \(9, 2\), got \(5, 2\)"),
    "sparse: a bias of another size": ("sparse_linear", 6, torch.ones(21), r"bias must have shape \(20,\)"),
    "sparse: values of another dtype": (
        "sparse_linear",
        1,
        torch.ones(5, dtype=torch.float16),
        "values must be float32 or bfloat16, got float16",
    ),
    "sparse: counts that reach too far": (
        "sparse_linear",
        4,
        torch.full_like(SPARSE[3], 256),
        r"counts contradict starts\[1\]",
    ),
    "sparse: negative counts": ("sparse_linear", 4, torch.full_like(SPARSE[3], -1), r"counts\[0\] is negative"),
    "sparse: starts past the end": (
        "sparse_linear",
        5,
        replaced(1, 0, 99, SPARSE[4]),
        r"starts\[1\] is no slice",
    ),
    "sparse: starts that go back": ("sparse_linear", 5, replaced(2, 0, 0, SPARSE[4]), r"starts\[2\] is no slice"),
    "sparse: starts that begin late": (
        "sparse_linear",
        5,
        replaced(0, 1, 1, SPARSE[4]),
        "starts must begin with 0",
    ),
    "sparse: sums of another size": (
        "sparse_linear_int8",
        7,
        torch.zeros(21, dtype=torch.int32),
        r"sums must have shape \(20,\), got \(21,\)",
    ),
    "sparse: more columns than int32 holds": (
        "sparse_linear_int8",
        0,
        torch.ones(1, 40000),
        "x must have at most 32768 columns, got 40000",
    ),
    "sample size": ("sample", 5, 0, "size must be at least 1, got 0"),
    "places columns": ("apply_mask_", 2, PLACES[:, :13].clone(), r"places must have shape \(3, 14\), got \(3, 13\)"),
    "place": ("apply_mask_", 2, replaced(2, 12, 1), r"places\[2\] puts 700 at 1 of 700 in dimension 3"),
    "place at a start past any size": (
        "apply_mask_",
        2,
        replaced(2, 12, MAX_INDEX),
        rf"places\[2\] puts 700 at {MAX_INDEX} of 700 in dimension 3",
    ),
    "place past the last global index": (
        "apply_mask_",
        2,
        replaced(2, 0, MAX_INDEX - 5),
        r"places\[2\] has sizes \(1, 1, 1, 700\) from global index 9223372036854775802 on, which does not fit 63 bits",
    ),
    "place of too many weights": (
        "fold_",
        3,
        replaced(2, 2, 2**62),
        r"places\[2\] has sizes \(1, 4611686018427387904, 1, 700\) .* does not fit 63 bits",
    ),
    "place before the first": ("apply_mask_", 2, replaced(0, 0, -1), r"places\[0\] starts at global index -1"),
    "places that overlap": (
        "count_",
        3,
        replaced(2, 0, 4),
        r"places\[2\] starts at global index 4, inside or before places\[1\], which ends at 5",
    ),
    "places out of order": ("tie_index", 2, PLACES.flip(0), r"places\[1\] starts at global index 5, inside or before"),
    "place of another size": ("apply_mask_", 2, replaced(2, 8, 699), r"params\[2\] must have 699 elements, got 700"),
    "starts that end nowhere": (
        "sparse_linear",
        5,
        replaced(-1, 1, -(2**63), SPARSE[4]),
        "starts end at step -9223372036854775808, which no matrix has",
    ),
    "region without a bracket": ("count_regions_", 6, torch.tensor([1, 3, 0]), r"regions\[1\] must be below 3, got 3"),
    "regions of other tensors": (
        "count_regions_",
        6,
        torch.tensor([1, 0]),
        r"regions must have shape \(3,\), got \(2,\)",
    ),
    "counts of other regions": (
        "count_regions_",
        0,
        torch.zeros(2, 65, dtype=torch.int64),
        r"counts must have shape \(3, 65\), got \(2, 65\)",
    ),
    "counts of no bins": ("count_regions_", 0, torch.zeros(3, 1, dtype=torch.int64), "one for each bin, got 1"),
    "bracket wider than its bins": (
        "count_regions_",
        7,
        torch.tensor([[0, 0, 0, 0, 2], [0, 2**32 - 1, 25, 0, 0], [0, 0, 0, 0, 2]]),
        r"brackets\[1\] \(0, 4294967295\) does not fit 64 bins of 2\^25",
    ),
    "bracket of no stage": (
        "count_regions_",
        7,
        torch.tensor([[0, 0, 0, 0, -1], [0, 0, 0, 0, 2], [0, 0, 0, 0, 2]]),
        r"brackets\[0\] has stage -1",
    ),
    "ties of no key": (
        "count_regions_",
        7,
        torch.tensor([[0, 9, 0, 2**32, 1], [0, 0, 0, 0, 2], [0, 0, 0, 0, 2]]),
        r"brackets\[0\] has key 4294967296, which is no 32-bit key",
    ),
    "chunk of no tensor": (
        "apply_mask_",
        3,
        replaced(1, 0, 3, CHUNKS),
        r"chunks\[1\] must be \(2, 0\), .* got \(3, 0\)",
    ),
    "chunk of an empty tensor": (
        "apply_mask_",
        3,
        replaced(1, 0, 1, CHUNKS),
        r"chunks\[1\] must be \(2, 0\), .* got \(1, 0\)",
    ),
    "chunk offset": ("apply_mask_", 3, replaced(1, 1, 64, CHUNKS), r"chunks\[1\] must be \(2, 0\), .* got \(2, 64\)"),
    "chunk twice": ("apply_mask_", 3, replaced(1, 0, 0, CHUNKS), r"chunks\[1\] must be \(2, 0\), .* got \(0, 0\)"),
    "chunk missing": ("apply_mask_", 3, CHUNKS[:1].clone(), r"chunks must go on with \(2, 0\), but have only 1 rows"),
    "chunk too many": ("apply_mask_", 3, CHUNKS[[0, 1, 1]], "chunks must end after 2 rows, got 3"),
    "places without data": (
        "apply_mask_",
        2,
        PLACES.to("meta"),
        "all tensors of a call must be on one device, got cpu, meta",
    ),
}


def refused(case: str) -> tuple[str, Arguments, str]:
    """The operator of a case of REFUSED, the good call with the bad argument in place, what the message says."""
    name, where, value, message = REFUSED[case]
    args, kwargs = CALLS[name]()
    if isinstance(where, int):
        args[where] = value
    else:
        kwargs[where] = value
    return name, (args, kwargs), message


def by_name(op: str, arguments: Arguments) -> dict[str, Any]:
    """The arguments of a call by their names in the schema; defaults left out."""
    args, kwargs = arguments
    schema = getattr(torch.ops.pins_ext, op).default._schema
    return dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs


def written(op: str) -> set[str]:
    """The arguments that an operator mutates."""
    return {
        a.name
        for a in getattr(torch.ops.pins_ext, op).default._schema.arguments
        if a.alias_info and a.alias_info.is_write
    }


def overlapping(table: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The same table and an output of the same shape, in one piece of memory."""
    memory = torch.zeros(max(table.nbytes, output.nbytes) // 8 + 1, dtype=torch.int64)
    views = (memory.view(x.dtype)[: x.numel()].view(x.shape) for x in (table, output))
    table_view, output_view = views
    table_view.copy_(table)
    return table_view, output_view


def overlaps() -> Iterator[tuple[str, str, str]]:
    """(operator, table or scalar, output) of every pair."""
    for op, call in CALLS.items():
        arguments, outputs = by_name(op, call()), written(op)
        tables = [name for name, x in arguments.items() if isinstance(x, Tensor) and name not in outputs]
        for table in tables:
            for output in sorted(outputs):
                if arguments.get(output) is not None:
                    yield op, table, output


def refuse_overlap(op: str, table: str, output: str, run: Callable[..., Any]) -> None:
    """Call an operator with a table that shares memory with an output."""
    arguments = by_name(op, CALLS[op]())
    one = arguments[output] if isinstance(arguments[output], Tensor) else arguments[output][-1]
    arguments[table], memory = overlapping(arguments[table], one)
    if isinstance(arguments[output], Tensor):
        arguments[output] = memory
    else:
        arguments[output][-1] = memory
    with pytest.raises(RuntimeError, match=rf"{output}(\[2\])? is written and shares memory with {table}"):
        run(**arguments)
