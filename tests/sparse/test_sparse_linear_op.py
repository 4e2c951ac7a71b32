"""The sparse operators against the dense product, on every instruction set of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers.sparse_cases import assert_product, pruned
from torch import Tensor

from pins_ext import ops  # noqa: F401  (registers the operators)

pins = torch.ops.pins_ext

# Rows and columns around the sizes of slices (16), blocks (256) and chunks.
SHAPES = [(1, 1), (16, 256), (17, 257), (5, 40), (40, 5), (33, 700), (300, 255), (513, 512), (768, 300)]
TOKENS = [1, 2, 3, 15, 16, 17, 32, 33, 100]
SPARSITIES = [0.0, 0.5, 0.9, 0.99, 1.0]


def assert_like_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    assert_product(pins.sparse_linear(x, *pins.sparse_pack(weight), bias, weight.shape[0]), x, weight, bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_it_is_the_dense_product(shape: tuple[int, int], sparsity: float) -> None:
    weight = pruned(*shape, sparsity)
    for tokens in TOKENS:
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, shape[1], generator=generator)
        assert_like_dense(x, weight, torch.randn(shape[0], generator=generator) if tokens % 2 else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_activations_of_16_bits(dtype: torch.dtype, tokens: int) -> None:
    assert_like_dense(torch.randn(tokens, 300).to(dtype), pruned(70, 300, 0.9), torch.randn(70))


@pytest.mark.parametrize("tokens", TOKENS)
def test_bfloat16_weights_are_exact(tokens: int) -> None:
    weight = pruned(70, 300, 0.9).bfloat16()
    x = torch.randn(tokens, 300)
    y = pins.sparse_linear(x, *pins.sparse_pack(weight), None, 70)
    assert torch.equal(y, pins.sparse_linear(x, *pins.sparse_pack(weight.float()), None, 70))


def codes_of(rows: int, columns: int, sparsity: float) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator)
    codes[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    return codes.to(torch.int8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("lowest", [0, -100, -255])
def test_integer_sums_are_exact(shape: tuple[int, int], vnni: bool, lowest: int) -> None:
    """Tokens of whole numbers over a range of 255 are their own bytes, so the result is the int32 reference itself."""
    codes = codes_of(*shape, 0.9)
    packed, sums = pins.sparse_pack(codes), codes.sum(1, dtype=torch.int32)
    for tokens in [*TOKENS, 63, 64, 65, 130]:
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randint(lowest, lowest + 256, (tokens, shape[1]), generator=generator)
        # Both ends of the range; where zero lies outside of them or there is one column, the range is another.
        if shape[1] < 2:
            x[:] = 255 if lowest == 0 else lowest
            x = x if lowest in (0, -255) else x * 0
        else:
            x[:, 0], x[:, 1] = lowest, lowest + 255
        y = pins.sparse_linear_int8(x.float(), *packed, torch.ones(shape[0]), sums, None, vnni)
        assert torch.equal(y.long(), x @ codes.long().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_activations_stay_within_half_a_step(dtype: torch.dtype) -> None:
    codes, scales, bias = codes_of(70, 300, 0.9), torch.rand(70) / 100, torch.randn(70)
    for tokens in TOKENS:
        x = (torch.randn(tokens, 300) * torch.logspace(-3, 3, tokens)[:, None]).to(dtype)
        sums = codes.sum(1, dtype=torch.int32)
        y = pins.sparse_linear_int8(x, *pins.sparse_pack(codes), scales, sums, bias)
        weight = codes.double() * scales.double()[:, None]
        exact = F.linear(x.double(), weight, bias.double())
        step = (x.double().amax(1).clamp(min=0) - x.double().amin(1).clamp(max=0)) / 255
        # Half a step of each activation, one rounding of the zero point, and those of the result.
        bound = step[:, None] * weight.abs().sum(1) + exact.abs() * torch.finfo(dtype).eps + 1e-4
        assert ((y.double() - exact).abs() <= bound).all()


def test_tokens_that_are_no_numbers_give_nan_and_spare_the_others() -> None:
    codes = codes_of(20, 40, 0.5)
    x = torch.randn(5, 40)
    rest = [torch.ones(20), codes.sum(1, dtype=torch.int32), None]
    expected = pins.sparse_linear_int8(x, *pins.sparse_pack(codes), *rest)
    for bad in (torch.nan, torch.inf, -torch.inf, 3e38):
        spoiled = x.clone()
        spoiled[2, 7] = bad
        spoiled[2, 8] = -3e38
        y = pins.sparse_linear_int8(spoiled, *pins.sparse_pack(codes), *rest)
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    zeros = pins.sparse_linear_int8(torch.zeros(2, 40), *pins.sparse_pack(codes), *rest)
    assert not zeros.any()


def test_any_number_of_dimensions_and_none_of_anything() -> None:
    weight = pruned(20, 30, 0.9)
    for lead in [(), (4,), (2, 3), (2, 1, 5)]:
        assert_like_dense(torch.randn(*lead, 30), weight, None)
    packed = pins.sparse_pack(weight)
    assert pins.sparse_linear(torch.randn(0, 30), *packed, None, 20).shape == (0, 20)
    assert torch.equal(pins.sparse_linear(torch.randn(4, 0), *pins.sparse_pack(torch.zeros(3, 0)), torch.ones(3), 3),
                       torch.ones(4, 3))  # fmt: skip
    assert pins.sparse_linear(torch.randn(4, 9), *pins.sparse_pack(torch.zeros(0, 9)), None, 0).shape == (4, 0)


def test_a_weight_alone_in_its_place_is_exact() -> None:
    """Each position of a block, one at a time: nothing is added to it and nothing lost."""
    for row, column in [(0, 0), (15, 255), (16, 256), (255, 511), (256, 3), (300, 300)]:
        weight = torch.zeros(301, 513)
        weight[row, column] = 1.7
        x = torch.randn(33, 513)
        y = pins.sparse_linear(x, *pins.sparse_pack(weight), None, 301)
        expected = torch.zeros(33, 301)
        expected[:, row] = x[:, column] * torch.tensor(1.7)
        assert torch.equal(y, expected)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight, threads = pruned(768, 300, 0.9), torch.get_num_threads()
    packed = pins.sparse_pack(weight)
    x = torch.randn(100, 300)
    try:
        found = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            found += [[pins.sparse_linear(x[:m], *packed, None, 768) for m in (1, 2, 16, 40, 100)]]
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_python_threads_share_a_packed_matrix() -> None:
    packed = pins.sparse_pack(pruned(300, 300, 0.8))
    inputs = [torch.randn(n, 300) for n in (1, 5, 40, 64)]
    expected = [pins.sparse_linear(x, *packed, None, 300) for x in inputs]
    right: list[bool] = []

    def work(i: int) -> None:
        right.extend(torch.equal(pins.sparse_linear(inputs[i], *packed, None, 300), expected[i]) for _ in range(50))

    jobs = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert right == [True] * 200


def test_packing_keeps_each_weight_once_and_both_zeros_are_zero() -> None:
    weight = pruned(300, 300, 0.9)
    weight[weight == 0] = -0.0
    values, columns, rows, counts, starts = pins.sparse_pack(weight)
    assert values[values != 0].sort().values.equal(weight[weight != 0].sort().values)
    assert values.numel() < 2 * (weight != 0).sum()
    assert columns.numel() == values.numel() == int(counts.sum()) * 16
    assert rows.shape == (counts.numel(), 16)
    assert starts[-1].tolist() == [counts.numel(), int(counts.sum())]
    assert all(len(set(slice_)) == 16 for slice_ in rows.tolist())


def test_every_instruction_set_of_this_machine() -> None:
    """The kernels are chosen at load, so each one needs a process of its own."""
    names = {"avx512": ("default", "avx2"), "avx2": ("default",), "default": ()}[pins.cpu_capability()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not instruction_set"]
    for name in names:
        run = subprocess.run(
            command, env=os.environ | {"PINS_EXT_CPU_CAPABILITY": name}, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{name}: {run.stdout[-3000:]}"
