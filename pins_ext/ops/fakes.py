"""Fake versions of the operators: what torch.compile and opcheck need to know of shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _tensors(*args: object) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(*arg)


def _check_devices(*args: object) -> None:
    """A meta tensor among real ones would bring the call here, where nothing is computed."""
    devices = {x.device for x in _tensors(*args)}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors of a call must be on one device, got {', '.join(sorted(map(str, devices)))}")


@torch.library.register_fake("pins_ext::sample")
def sample(a, b, places, chunks, score, size, *, factors=None, pointers=None):  # type: ignore[no-untyped-def]
    _check_devices(a, b, places, chunks, factors, pointers)
    return places.new_empty(size)


@torch.library.register_fake("pins_ext::tie_index")
def tie_index(a, b, places, chunks, score, bracket, *, factors=None, pointers=None):  # type: ignore[no-untyped-def]
    _check_devices(a, b, places, chunks, bracket, factors, pointers)
    return places.new_empty(1)


@torch.library.register_fake("pins_ext::bracket_of")
def bracket_of(keys, position, total):  # type: ignore[no-untyped-def]
    return keys.new_empty(5)


@torch.library.register_fake("pins_ext::narrow")
def narrow(bracket, counts, position):  # type: ignore[no-untyped-def]
    return torch.empty_like(bracket)


@torch.library.register_fake("pins_ext::settle")
def settle(bracket, candidates, found):  # type: ignore[no-untyped-def]
    return torch.empty_like(bracket), torch.empty_like(found)


@torch.library.register_fake("pins_ext::settle_around")
def settle_around(a, b, places, chunks, score, bracket, position, *, factors=None):  # type: ignore[no-untyped-def]
    _check_devices(a, b, places, chunks, bracket, position, factors)
    return torch.empty_like(bracket), bracket.new_empty(1)


@torch.library.register_fake("pins_ext::cutoff")
def cutoff(bracket, tie, n_prune, total, exact):  # type: ignore[no-untyped-def]
    return bracket.new_empty(2)


@torch.library.register_fake("pins_ext::select")
def select(  # type: ignore[no-untyped-def]
    a,
    b,
    places,
    chunks,
    score,
    n_prune,
    exact=True,
    *,
    factors=None,
    bracket=None,
    counts=None,
    pointers=None,
    total=None,
):
    _check_devices(a, b, places, chunks, n_prune, factors, bracket, counts, pointers)
    return places.new_empty(2)


@torch.library.register_fake("pins_ext::sparse_pack")
def sparse_pack(weight):  # type: ignore[no-untyped-def]
    steps, slices, blocks = (torch.library.get_ctx().new_dynamic_size() for _ in range(3))
    values, columns = weight.new_empty(steps), weight.new_empty(steps, dtype=torch.uint8)
    rows = weight.new_empty(slices, 16, dtype=torch.uint8)
    counts = weight.new_empty(slices, dtype=torch.int16)
    return values, columns, rows, counts, weight.new_empty(blocks, 2, dtype=torch.int64)


@torch.library.register_fake("pins_ext::sparse_linear")
def sparse_linear(x, values, columns, rows, counts, starts, bias, out_features):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("pins_ext::grouped_pack")
def grouped_pack(weight):  # type: ignore[no-untyped-def]
    groups = torch.library.get_ctx().new_dynamic_size()
    values, columns = weight.new_empty(groups, 8), weight.new_empty(groups, 8, dtype=torch.uint8)
    bases = weight.new_empty(groups, dtype=torch.int16)
    return values, columns, bases, weight.new_empty(weight.shape[0] + 1, dtype=torch.int64)


@torch.library.register_fake("pins_ext::grouped_linear")
def grouped_linear(x, values, columns, bases, starts, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], starts.shape[0] - 1)


@torch.library.register_fake("pins_ext::grouped_expand")
def grouped_expand(values, columns, bases, starts, in_features):  # type: ignore[no-untyped-def]
    return values.new_empty(starts.shape[0] - 1, in_features)


@torch.library.register_fake("pins_ext::sum_of_squares")
def sum_of_squares(tensors, places, chunks, *, pointers=None):  # type: ignore[no-untyped-def]
    _check_devices(tensors, places, chunks, pointers)
    return places.new_empty(1, dtype=torch.float64)


@torch.library.register_fake("pins_ext::sparse_linear_int8")
def sparse_linear_int8(x, values, columns, rows, counts, starts, scales, sums, bias, vnni=True):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], scales.shape[0])


def in_place(*args: object, **kwargs: object) -> None:
    """Fake of the operators that write to their arguments and return nothing."""
    _check_devices(*args, *kwargs.values())


torch.library.register_fake("pins_ext::accumulate_", in_place)
torch.library.register_fake("pins_ext::fold_", in_place)
torch.library.register_fake("pins_ext::fold_moments_", in_place)
torch.library.register_fake("pins_ext::count_", in_place)
torch.library.register_fake("pins_ext::count_regions_", in_place)
torch.library.register_fake("pins_ext::collect_", in_place)
torch.library.register_fake("pins_ext::eligible_", in_place)
torch.library.register_fake("pins_ext::pack_", in_place)
torch.library.register_fake("pins_ext::pack_around_", in_place)
torch.library.register_fake("pins_ext::masked_adamw_", in_place)
torch.library.register_fake("pins_ext::masked_sgd_", in_place)
torch.library.register_fake("pins_ext::boundary_adamw_", in_place)
torch.library.register_fake("pins_ext::boundary_sgd_", in_place)
torch.library.register_fake("pins_ext::apply_mask_", in_place)
torch.library.register_fake("pins_ext::stream_", in_place)
