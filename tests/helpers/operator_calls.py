"""A good call of every operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import masks_of, rng_of, tensors
from torch import Tensor

from pins_ext import ops

SIZES = [5, 0, 700]

Arguments = tuple[list[Any], dict[str, Any]]


def lists(count: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    return [[t.abs() for t in tensors(SIZES, dtype, seed=s)] for s in range(count)]


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors among these values and in lists of them, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
    return found


def tables() -> tuple[Tensor, Tensor]:
    layout = ops.Layout.of(tensors(SIZES, torch.float32))
    return layout.places, layout.chunks


def counting() -> dict[str, Tensor]:
    return {"bracket": torch.tensor([0, 2**32 - 1, 16, 0, 0]), "counts": torch.zeros(1 + ops.BINS, dtype=torch.int64)}


def accumulate() -> Arguments:
    ipt, params, grads = lists(3)
    scalars = {"grad_scale": torch.ones(1), "clip": torch.ones(1), "found_inf": torch.zeros(1)}
    return [ipt, params, grads, *tables(), torch.ones(3), torch.ones(1), rng_of(0), "pins"], scalars


def fold() -> Arguments:
    return [*lists(3, torch.bfloat16), *tables(), torch.ones(1), rng_of(0), 0.85, 0.95], counting()


def fold_moments() -> Arguments:
    averages, moments = lists(2, torch.bfloat16), lists(3)
    return [*averages, *moments, *tables(), torch.ones(3, 3), torch.ones(1), rng_of(0), 0.85, 0.95], counting()


def sample() -> Arguments:
    return [*lists(2), *tables(), "product", 16], {}


def count() -> Arguments:
    return [counting()["counts"], *lists(2), *tables(), "product", counting()["bracket"]], {}


def count_regions() -> Arguments:
    brackets = torch.tensor([[0, 2**32 - 1, 26, 0, 0], [0, 704, 4, 3_200_000_000, 1], [0, 0, 0, 0, 2]])
    counts = torch.zeros(3, 65, dtype=torch.int64)
    return [counts, *lists(2), *tables(), "product", torch.tensor([1, 2, 0]), brackets], {}


def collect() -> Arguments:
    found, candidates = torch.zeros(1, dtype=torch.int64), torch.zeros(2, 50, dtype=torch.int64)
    return [found, candidates, *lists(2), *tables(), "product", counting()["bracket"]], {}


def tie_index() -> Arguments:
    return [*lists(2), *tables(), "product", torch.tensor([5, 5, 0, 1, 1])], {}


def bracket_of() -> Arguments:
    return [torch.arange(500), torch.tensor(300), 700], {}


def narrow() -> Arguments:
    counted = counting()
    counted["counts"][[0, 7, 9]] = 100
    return [counted["bracket"], counted["counts"], torch.tensor(150)], {}


def settle() -> Arguments:
    candidates = torch.full((2, 8), ops.MAX_INDEX)
    candidates[:, :3] = torch.tensor([[7, 5, 7], [20, 10, 30]])
    return [torch.tensor([0, 9, 0, 2, 0]), candidates, torch.tensor([3])], {}


def settle_around() -> Arguments:
    return [*lists(2), *tables(), "product", torch.tensor([3200000000, 3210000000, 10, 0, 0]), torch.tensor(300)], {}


def cutoff() -> Arguments:
    return [torch.tensor([7, 7, 0, 0, 1]), torch.tensor([30]), torch.tensor(300), 700, True], {}


def select() -> Arguments:
    return [*lists(2), *tables(), "product", torch.tensor(300)], {}


def pack() -> Arguments:
    a, b = lists(2)
    stats = torch.zeros(3, 3, dtype=torch.int64)
    return [masks_of(a)[1], stats, a, b, *tables(), "product", torch.tensor([[3200000000, 0]])], {}


def eligible() -> Arguments:
    a, b = lists(2)
    groups = torch.tensor([[1, 5, 1], [2, 4, 1], [2, 4, 7]])
    return [lists(1)[0], torch.zeros(3, dtype=torch.int64), a, b, *tables(), "product", groups], {}


def pack_around() -> Arguments:
    args, _ = pack()
    bracket = torch.tensor([3200000000, 3210000000, 10, 3, 0])
    return [*args[:2], torch.zeros(1, 2, dtype=torch.int64), *args[2:7], bracket], {}


def adamw() -> Arguments:
    params, mean, square, ipt, shadow, grads = lists(6)
    rest = [*tables(), torch.ones(3, 8), torch.ones(1), rng_of(0), "pins"]
    return [params, mean, square, ipt, shadow, grads, masks_of(params)[1], *rest], {"found_inf": torch.zeros(1)}


def sgd() -> Arguments:
    params, buffer, ipt, shadow, grads = lists(5)
    rest = [*tables(), torch.ones(3, 8), torch.ones(1), rng_of(0), "pins"]
    return [params, buffer, ipt, shadow, grads, masks_of(params)[1], *rest], {}


def boundary(moments: int) -> Arguments:
    params, *firsts, ipt, shadow, mean, unc, grads = lists(6 + moments)
    rest = [*tables(), torch.ones(3, 8), torch.ones(1), rng_of(0), "pins"]
    choice = {
        "around": torch.tensor([3200000000, 3210000000, 10, 3, 0]),
        "stats": torch.zeros(3, 3, dtype=torch.int64),
        "threshold": torch.zeros(1, 2, dtype=torch.int64),
    }
    fold = {"fold_rng": rng_of(1), "beta1": 0.85, "beta2": 0.95, **counting()}
    args = [params, *firsts, ipt, shadow, masks_of(params)[1], mean, unc, grads, *rest]
    return args, {"clip": torch.ones(1), **choice, **fold}


def boundary_adamw() -> Arguments:
    return boundary(2)


def boundary_sgd() -> Arguments:
    return boundary(1)


def apply_mask() -> Arguments:
    (params,) = lists(1)
    return [params, masks_of(params)[1], *tables()], {}


def pruned_weight() -> Tensor:
    return tensors([20 * 300], torch.float32)[0].reshape(20, 300).relu()


def sparse_pack() -> Arguments:
    return [pruned_weight()], {}


def sparse_linear() -> Arguments:
    x = tensors([7 * 300], torch.float32)[0].reshape(7, 300)
    return [x, *torch.ops.pins_ext.sparse_pack(pruned_weight()), torch.ones(20), 20], {}


def sum_of_squares() -> Arguments:
    return [*lists(1), *tables()], {}


def stream() -> Arguments:
    a, b = tensors([700, 700], torch.float32)
    return [[a, b.bfloat16()], [b]], {}


def sparse_linear_int8() -> Arguments:
    x = tensors([7 * 300], torch.float32)[0].reshape(7, 300)
    codes = (pruned_weight() * 20).to(torch.int8)
    packed = torch.ops.pins_ext.sparse_pack(codes)
    return [x, *packed, torch.ones(20), codes.sum(1, dtype=torch.int32), torch.ones(20)], {}


def grouped_pack() -> Arguments:
    return [pruned_weight()], {}


def grouped_linear() -> Arguments:
    x = tensors([3 * 300], torch.float32)[0].reshape(3, 300)
    return [x, *torch.ops.pins_ext.grouped_pack(pruned_weight()), torch.ones(20)], {}


def grouped_expand() -> Arguments:
    return [*torch.ops.pins_ext.grouped_pack(pruned_weight().bfloat16()), 300], {}


CALLS: dict[str, Callable[[], Arguments]] = {
    "accumulate_": accumulate,
    "fold_": fold,
    "fold_moments_": fold_moments,
    "sample": sample,
    "count_": count,
    "count_regions_": count_regions,
    "collect_": collect,
    "tie_index": tie_index,
    "bracket_of": bracket_of,
    "narrow": narrow,
    "settle": settle,
    "settle_around": settle_around,
    "cutoff": cutoff,
    "select": select,
    "eligible_": eligible,
    "pack_": pack,
    "pack_around_": pack_around,
    "masked_adamw_": adamw,
    "masked_sgd_": sgd,
    "boundary_adamw_": boundary_adamw,
    "boundary_sgd_": boundary_sgd,
    "apply_mask_": apply_mask,
    "sparse_pack": sparse_pack,
    "sparse_linear": sparse_linear,
    "sparse_linear_int8": sparse_linear_int8,
    "sum_of_squares": sum_of_squares,
    "stream_": stream,
    "grouped_pack": grouped_pack,
    "grouped_linear": grouped_linear,
    "grouped_expand": grouped_expand,
}
