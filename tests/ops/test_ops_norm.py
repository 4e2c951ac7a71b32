"""sum_of_squares on the CPU: bit for bit the reference's, and clipping by it is torch's."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FLOATS, LISTS, VALUES, rng_of, tensors
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext


def sum_of_squares(xs: list[Tensor]) -> Tensor:
    layout = ops.Layout.of(xs)
    return pins.sum_of_squares(xs, layout.places, layout.chunks)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("sizes", [*LISTS, "beyond the totals"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sum_of_squares(dtype: torch.dtype, sizes: str) -> None:
    numels = LISTS.get(sizes, [3] * 300 + [40000])
    for values in VALUES:
        xs = tensors(numels, dtype, values, misaligned=sizes in ("odd", "block"))
        found = sum_of_squares(xs)
        assert found.dtype == torch.float64
        assert same(found, ref.sum_of_squares(xs))


def test_it_is_the_square_of_the_norm() -> None:
    """Squares of float32 are exact in float64; the sums are off by some 2^-53 of it each."""
    xs = tensors([1000, 77, 300_001], torch.float32)
    exact = math.fsum(x * x for tensor in xs for x in tensor.tolist())
    assert abs(float(sum_of_squares(xs)) / exact - 1) < 50 * 2**-53


def test_the_number_of_threads_cannot_be_seen() -> None:
    xs, threads = tensors([20_000, 300_001, 5], torch.float32), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(sum_of_squares(xs).item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(found)) == 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e15])
def test_clipping_in_the_pass_is_torchs_clipping(scale: float) -> None:
    """Where the norm rounds to the same float32, an update with the factor equals one with clipped gradients."""
    grads = [g * scale for g in tensors([700, 1, 0, 40_000], torch.float32, seed=2)]
    norm, factor = ops.clip_factor(sum_of_squares(grads), max_norm=1.0)
    clipped = [torch.nn.Parameter(g.clone()) for g in grads]
    for p, g in zip(clipped, grads, strict=True):
        p.grad = g.clone()
    expected = torch.nn.utils.clip_grad_norm_(clipped, 1.0)
    torch.testing.assert_close(norm[0], expected, rtol=1e-6, atol=0)
    factor = (1.0 / (expected + 1e-6)).clamp(max=1.0).reshape(1)
    params, layout = tensors([700, 1, 0, 40_000], torch.float32, seed=1), ops.Layout.of(grads)
    hyper = torch.tensor([[0.1, 0.01, 0.0, 1.0, 0.0, 0.0, -0.1, 0.0]] * 4)
    rest = (layout.places, layout.chunks, hyper, torch.zeros(1), rng_of(0), "pins")
    ours, theirs = ([p.clone() for p in params] for _ in range(2))
    pins.masked_sgd_(ours, [], [], [], grads, [], *rest, clip=factor)
    pins.masked_sgd_(theirs, [], [], [], [p.grad for p in clipped], [], *rest)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_norm_whose_square_overflows_float32_is_still_a_norm() -> None:
    norm, factor = ops.clip_factor(sum_of_squares([torch.full((100,), 1e30)]), 1.0)
    assert norm.item() == pytest.approx(1e31)
    assert factor.item() == pytest.approx(1e-31)


@pytest.mark.parametrize(("value", "factor"), [(float("inf"), 0.0), (float("nan"), float("nan"))])
def test_a_norm_that_is_not_finite_is_torchs(value: float, factor: float) -> None:
    norm, found = ops.clip_factor(sum_of_squares([torch.tensor([1.0, value])]), 1.0)
    assert same(norm, torch.tensor([value]))
    assert same(found, torch.tensor([factor]))


def test_scaled_gradients() -> None:
    scaled = [x * 1024 for x in tensors([5000], torch.float32)]
    norm, factor = ops.clip_factor(sum_of_squares(scaled), 0.5, grad_scale=torch.tensor([1024.0]))
    own, clip = ops.clip_factor(sum_of_squares([x / 1024 for x in scaled]), 0.5)
    assert torch.equal(norm, own)
    assert torch.equal(factor, clip)
