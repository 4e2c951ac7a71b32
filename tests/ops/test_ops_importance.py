"""accumulate_ and fold_ on the CPU against reference.py, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import (
    FLOATS,
    LISTS,
    STATES,
    VALUES,
    assert_all_same,
    clones,
    random_of,
    rng_of,
    tensors,
)
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext


def expected_ipt(
    criterion: str,
    ipt: list[Tensor],
    params: list[Tensor],
    grads: list[Tensor],
    layout: ops.Layout,
    lr: Tensor,
    accepted: int,
    rng: Tensor,
) -> list[Tensor]:
    """What accumulate_ stores: reference.py, weight by weight."""
    out = []
    for i, (state, g, random) in enumerate(zip(ipt, grads, random_of(layout, rng), strict=True)):
        p = params[i] if params else g
        c = ref.instant_score(criterion, p, p, g, float(lr[i]))
        out.append(ref.store(ref.next_ipt(criterion, state, c, accepted), state.dtype, random & 0xFFFF))
    return out


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("criterion", ops.CRITERIA)
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulate(dtype: torch.dtype, state: torch.dtype, criterion: str, sizes: str) -> None:
    for accepted, misaligned in ((0, False), (3, True)):
        params = tensors(LISTS[sizes], dtype, seed=1, misaligned=misaligned)
        grads = tensors(LISTS[sizes], dtype, seed=2, misaligned=misaligned)
        ipt = tensors(LISTS[sizes], state, seed=3, misaligned=misaligned)
        layout, rng, lr = ops.Layout.of(params), rng_of(accepted), torch.linspace(0.1, 0.9, len(params))
        expected = expected_ipt(criterion, ipt, params, grads, layout, lr, accepted, rng)
        before = clones(params + grads)
        given = [] if criterion == "precomputed" else params
        args = (ipt, given, grads, layout.places, layout.chunks, lr, torch.tensor([float(accepted)]), rng, criterion)
        pins.accumulate_(*args)
        assert_all_same(ipt, expected)
        assert_all_same(params + grads, before)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("criterion", ops.CRITERIA)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_accumulate_ugly_values(state: torch.dtype, criterion: str, values: str) -> None:
    for dtype in FLOATS:
        params, grads = tensors([1000, 5], dtype, values, seed=1), tensors([1000, 5], dtype, values, seed=2)
        ipt = tensors([1000, 5], state, values, seed=3)
        layout, rng, lr = ops.Layout.of(params), rng_of(5), torch.tensor([3e-5, 1e-2])
        expected = expected_ipt(criterion, ipt, params, grads, layout, lr, 4, rng)
        pins.accumulate_(ipt, params, grads, layout.places, layout.chunks, lr, torch.tensor([4.0]), rng, criterion)
        assert_all_same(ipt, expected)


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulate_scales_and_clips_gradients(dtype: torch.dtype, state: torch.dtype) -> None:
    params, grads = tensors([3000], dtype, seed=1), tensors([3000], dtype, "special", seed=2)
    layout, lr, scale, clip = ops.Layout.of(params), torch.tensor([0.5]), torch.tensor([1024.0]), torch.tensor([0.3])
    used = [(g.float() / scale) * clip for g in grads]
    for kwargs, g in (
        ({"grad_scale": scale, "clip": clip}, used),
        ({"grad_scale": scale}, [g.float() / scale for g in grads]),
        ({"clip": clip, "found_inf": torch.zeros(1)}, [g.float() * clip for g in grads]),
    ):
        ipt = tensors([3000], state, seed=3)
        expected = expected_ipt("pins", ipt, params, g, layout, lr, 2, rng_of(0))
        args = (ipt, params, grads, layout.places, layout.chunks, lr, torch.tensor([2.0]), rng_of(0), "pins")
        pins.accumulate_(*args, **kwargs)
        assert_all_same(ipt, expected)


def test_accumulate_leaves_a_skipped_step_alone() -> None:
    params, grads, ipt = (tensors([700], torch.float32, seed=s) for s in (1, 2, 3))
    layout, before = ops.Layout.of(params), clones(ipt)
    args = (ipt, params, grads, layout.places, layout.chunks, torch.ones(1), torch.zeros(1), rng_of(0), "pins")
    pins.accumulate_(*args, found_inf=torch.ones(1))
    assert_all_same(ipt, before)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("with_unc", [True, False])
@pytest.mark.parametrize("state", STATES, ids=str)
def test_fold(state: torch.dtype, with_unc: bool, sizes: str, values: str) -> None:
    misaligned = sizes in ("odd", "block")
    mean = tensors(LISTS[sizes], state, values, seed=1, misaligned=misaligned)
    unc = tensors(LISTS[sizes], state, values, seed=2, misaligned=misaligned) if with_unc else []
    ipt = tensors(LISTS[sizes], state, values, seed=3, misaligned=misaligned)
    layout, rng = ops.Layout.of(mean), rng_of(1)
    expected_mean, expected_unc = [], []
    for i, random in enumerate(random_of(layout, rng)):
        new_mean, new_unc = ref.fold(mean[i], unc[i] if with_unc else None, ipt[i], 0.85, 0.99)
        expected_mean.append(ref.store(new_mean, state, random & 0xFFFF))
        if new_unc is not None:
            expected_unc.append(ref.store(new_unc, state, random >> 16))
    before = clones(mean + unc)
    pins.fold_(mean, unc, ipt, layout.places, layout.chunks, torch.zeros(1), rng, 0.85, 0.99)
    assert_all_same(mean + unc, before)
    pins.fold_(mean, unc, ipt, layout.places, layout.chunks, torch.ones(1), rng, 0.85, 0.99)
    assert_all_same(mean, expected_mean)
    assert_all_same(unc, expected_unc)


@pytest.mark.parametrize("accepted", [0.0, 3.0])
@pytest.mark.parametrize("with_unc", [True, False])
@pytest.mark.parametrize("state", STATES, ids=str)
def test_fold_counts_what_it_stored(state: torch.dtype, with_unc: bool, accepted: float) -> None:
    sizes = LISTS["chunk"] + LISTS["many"]
    mean, ipt = tensors(sizes, state, seed=1), tensors(sizes, state, seed=3)
    unc = tensors(sizes, state, seed=2) if with_unc else []
    layout, rng = ops.Layout.of(mean), rng_of(1)
    bracket = torch.tensor([0x7F000000, 0xBF800000, 15, 0, 0])
    counts = torch.full((1 + ops.BINS,), -7)
    tables = (layout.places, layout.chunks)
    pins.fold_(mean, unc, ipt, *tables, torch.tensor([accepted]), rng, 0.85, 0.95, bracket=bracket, counts=counts)
    expected = torch.full((1 + ops.BINS,), -9)
    pins.count_(expected, mean, unc, *tables, "product" if with_unc else "identity", bracket)
    assert torch.equal(counts, expected)
    assert 0 < int(counts[1:].sum()) < layout.total
    bracket[4], before = 1, counts.clone()
    pins.fold_(mean, unc, ipt, *tables, torch.tensor([accepted]), rng, 0.85, 0.95, bracket=bracket, counts=counts)
    assert torch.equal(counts, before)


@pytest.mark.parametrize("base", [2**32 - 300, 2**40 - 20000])
def test_stochastic_rounding_across_words_of_the_index(base: int) -> None:
    """The index's high word changes inside a block."""
    mean, unc, ipt = (tensors([1000, 20000], torch.bfloat16, seed=s) for s in (1, 2, 3))
    layout, rng = ops.Layout.of(mean, base=base), rng_of(2)
    random = random_of(layout, rng)
    folded = [ref.fold(m, u, i, 0.85, 0.95) for m, u, i in zip(mean, unc, ipt, strict=True)]
    pins.fold_(mean, unc, ipt, layout.places, layout.chunks, torch.ones(1), rng, 0.85, 0.95)
    assert_all_same(mean, [ref.store(f[0], torch.bfloat16, r & 0xFFFF) for f, r in zip(folded, random, strict=True)])
    assert_all_same(unc, [ref.store(f[1], torch.bfloat16, r >> 16) for f, r in zip(folded, random, strict=True)])


def test_stochastic_rounding_has_no_bias() -> None:
    """2^18 roundings of one value between two bf16 neighbours average to the value: six standard deviations."""
    n, value = 1 << 18, 1.0 + 0.3 * 2**-7
    ipt = [torch.zeros(n, dtype=torch.bfloat16)]
    layout = ops.Layout.of(ipt)
    args = ([], [torch.full((n,), value)], layout.places, layout.chunks, torch.ones(1), torch.zeros(1), rng_of(3))
    pins.accumulate_(ipt, *args, "precomputed")
    up = (ipt[0].float() > 1).float().mean().item()
    assert abs(up - 0.3) < 6 * (0.3 * 0.7 / n) ** 0.5
