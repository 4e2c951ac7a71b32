"""The Triton operators accumulate_ and fold_ against reference.py, bit for bit, interpreted and on a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATS, STATES, VALUES, assert_all_same, clones, random_of, rng_of, tensors
from torch import Tensor
from triton_lists import (
    LISTS,
    SHARD_SIZES,
    SHARDS,
    SMALL,
    WARNINGS,
    counted,
    cpu,
    keys_of,
    layout_of,
    on,
    tables,
)

from pins_ext import ops
from pins_ext import reference as ref

pytestmark = WARNINGS

pins = torch.ops.pins_ext


# ---- accumulate_ -----------------------------------------------------------------------------------


def accumulated(
    criterion: str, ipt: list[Tensor], params: list[Tensor], grads: list[Tensor], layout: ops.Layout, lr: Tensor, n: int
) -> list[Tensor]:
    """What accumulate_ stores, weight by weight; `grads` as used."""
    out = []
    for i, random in enumerate(random_of(layout, rng_of(n))):
        c = ref.instant_score(criterion, params[i].flatten(), params[i].flatten(), grads[i].flatten(), float(lr[i]))
        out.append(ref.store(ref.next_ipt(criterion, ipt[i].flatten(), c, n), ipt[i].dtype, random).view(ipt[i].shape))
    return out


def check_accumulate(
    device: str,
    criterion: str,
    n: int,
    lists: tuple[list[Tensor], list[Tensor], list[Tensor]],
    shards: list[ops.Shard | None] | None = None,
) -> None:
    ipt, params, grads = lists
    layout, lr = layout_of(ipt, shards), torch.linspace(1e-5, 0.9, len(ipt))
    expected = accumulated(criterion, ipt, params, grads, layout, lr, n)
    ipt_, params_, grads_ = on(device, *lists)
    given = [] if criterion == "precomputed" else params_
    accepted = torch.tensor([float(n)], device=device)
    pins.accumulate_(
        ipt_, given, grads_, *tables(layout, device), lr.to(device), accepted, rng_of(n).to(device), criterion
    )
    assert_all_same(cpu(ipt_), expected)
    assert_all_same(cpu(params_ + grads_), params + grads)


@pytest.mark.parametrize("criterion", ops.CRITERIA)
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulate_kernel(device: str, dtype: torch.dtype, state: torch.dtype, criterion: str) -> None:
    for n, misaligned in ((0, True), (3, False)):
        sizes = [77, 600] if misaligned else SMALL
        lists = (
            tensors(sizes, state, seed=3, misaligned=misaligned),
            tensors(sizes, dtype, seed=1, misaligned=misaligned),
        )
        check_accumulate(device, criterion, n, (*lists, tensors(sizes, dtype, seed=2)))


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_accumulate_kernel_sizes(device: str, dtype: torch.dtype, sizes: str) -> None:
    lists = (tensors(LISTS[sizes], dtype, seed=s, misaligned=sizes == "odd") for s in (3, 1, 2))
    check_accumulate(device, "pins", 1, tuple(lists))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulate_kernel_ugly_values(device: str, dtype: torch.dtype, values: str) -> None:
    for criterion in ("pins", "pins-signed", "movement"):
        state = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        lists = (
            tensors([1100, 5], state, values, 3),
            tensors([1100, 5], dtype, values, 1),
            tensors([1100, 5], dtype, values, 2),
        )
        check_accumulate(device, criterion, 4, lists)


def test_accumulate_kernel_shards(device: str) -> None:
    lists = tuple([torch.randn(size).bfloat16() for size in SHARD_SIZES] for _ in range(3))
    check_accumulate(device, "pins", 2, lists, SHARDS)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulate_kernel_scales_clips_and_skips(device: str, dtype: torch.dtype) -> None:
    params, grads = tensors([1300], dtype, seed=1), tensors([1300], dtype, "special", seed=2)
    scale, clip, lr = torch.tensor([1000.0]), torch.tensor([0.3]), torch.tensor([0.5])
    layout = layout_of(params)
    for found_inf in (0.0, 1.0):
        ipt = tensors([1300], torch.float32, seed=3)
        used = [(g.float() / scale) * clip for g in grads]
        expected = clones(ipt) if found_inf else accumulated("pins", ipt, params, used, layout, lr, 2)
        scalars = {"grad_scale": scale, "clip": clip, "found_inf": torch.tensor([found_inf])}
        ipt_, params_, grads_ = on(device, ipt, params, grads)
        rest = [x.to(device) for x in (lr, torch.tensor([2.0]), rng_of(2))]
        kwargs = {name: x.to(device) for name, x in scalars.items()}
        pins.accumulate_(ipt_, params_, grads_, *tables(layout, device), *rest, "pins", **kwargs)
        assert_all_same(cpu(ipt_), expected)


# ---- fold_ -----------------------------------------------------------------------------------------


def check_fold(
    device: str,
    mean: list[Tensor],
    unc: list[Tensor],
    ipt: list[Tensor],
    accepted: float = 3.0,
    bracket: list[int] | None = None,
    shards: list[ops.Shard | None] | None = None,
) -> None:
    layout, rng = layout_of(mean, shards), rng_of(1)
    expected_mean, expected_unc = clones(mean), clones(unc)
    for i, random in enumerate(random_of(layout, rng) if accepted else []):
        old_unc = unc[i].flatten() if unc else None
        new_mean, new_unc = ref.fold(mean[i].flatten(), old_unc, ipt[i].flatten(), 0.85, 0.99)
        expected_mean[i] = ref.store(new_mean, mean[i].dtype, random).view(mean[i].shape)
        if new_unc is not None:
            expected_unc[i] = ref.store(new_unc, mean[i].dtype, random >> 16).view(mean[i].shape)
    mean_, unc_, ipt_ = on(device, mean, unc, ipt)
    counts = torch.full((1 + ops.BINS,), 7, device=device)
    kwargs = {"bracket": torch.tensor(bracket, device=device), "counts": counts} if bracket else {}
    rest = torch.tensor([accepted], device=device), rng.to(device)
    pins.fold_(mean_, unc_, ipt_, *tables(layout, device), *rest, 0.85, 0.99, **kwargs)
    assert_all_same(cpu(mean_), expected_mean)
    assert_all_same(cpu(unc_), expected_unc)
    if bracket:
        keys = keys_of("product" if unc else "identity", expected_mean, expected_unc)
        assert torch.equal(
            counts.cpu(), counted(keys, bracket) if bracket[4] == 0 else torch.full_like(counts, 7).cpu()
        )


@pytest.mark.parametrize("accepted", [3.0, 0.0])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_fold_kernel(device: str, state: torch.dtype, values: str, accepted: float) -> None:
    mean, unc, ipt = (tensors([1, 0, 1100], state, values, seed=s) for s in (1, 2, 3))
    check_fold(device, mean, unc, ipt, accepted)
    check_fold(device, mean, [], ipt, accepted, [0x7F000000, 0xBF800000, 15, 0, 0])


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_fold_kernel_sizes_and_counts(device: str, state: torch.dtype, sizes: str) -> None:
    mean, unc, ipt = (tensors(LISTS[sizes], state, seed=s, misaligned=sizes == "odd") for s in (1, 2, 3))
    check_fold(device, mean, unc, ipt, 1.0, [0x80000000, 0xBE000000, 14, 0, 0])


def test_fold_kernel_leaves_counts_of_a_resolved_bracket(device: str) -> None:
    mean, unc, ipt = (tensors([1100], torch.float32, seed=s) for s in (1, 2, 3))
    check_fold(device, mean, unc, ipt, 1.0, [0x80000000, 0x80000000, 0, 3, 1])


def test_fold_kernel_shards(device: str) -> None:
    mean, unc, ipt = ([torch.randn(size).bfloat16() for size in SHARD_SIZES] for _ in range(3))
    check_fold(device, mean, unc, ipt, 1.0, [0x7F000000, 0xBF800000, 15, 0, 0], SHARDS)
