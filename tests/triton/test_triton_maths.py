"""The Triton formulas and index arithmetic alone, in the interpreter: every bit pattern, and sizes no memory holds."""

# ruff: noqa: N803  (compile-time arguments of kernels are written in capitals)

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from cases import assert_same
from torch import Tensor

from pins_ext import reference as ref
from pins_ext.triton_kernels import criterion as c
from pins_ext.triton_kernels import layout as at

pytestmark = [
    pytest.mark.interpret,
    # The interpreter computes with numpy, which remarks upon infinities.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]

ROWS = [
    # base, full sizes, local sizes, start
    [5, 1, 1, 1, 90, 1, 1, 1, 90, 0, 0, 0, 0],
    [5, 1, 1, 1, 90, 1, 1, 1, 30, 0, 0, 0, 60],
    [7, 1, 1, 6, 10, 1, 1, 6, 3, 0, 0, 0, 2],
    [7, 1, 4, 5, 11, 1, 3, 4, 6, 0, 1, 1, 5],
    [1 << 40, 4, 3, 5, 7, 2, 2, 3, 2, 1, 1, 2, 4],
    [0, 700, 1, 1, 3, 700, 1, 1, 1, 0, 0, 0, 1],
    [3, 1, 3, 1 << 33, 9, 1, 2, 1 << 32, 8, 0, 1, 5, 1],
    [3, 1, 2, 3, 1 << 34, 1, 2, 2, 1 << 33, 0, 0, 1, 77],
    [3, 1, 2, 9, 600, 1, 2, 4, 511, 0, 0, 1, 77],
]


@triton.jit
def _formula_kernel(out_ptr, x_ptr, random_ptr, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    if FORMULA == "order_key":
        y = c.order_key(c.float_of(x.to(tl.uint32)))
    elif FORMULA == "float_of_bf16":
        y = c.bits_of(c.float_of_bf16(x.to(tl.uint16)))
    elif FORMULA == "float_of_fp16":
        y = c.bits_of(c.float_of_fp16(x.to(tl.uint16)))
    elif FORMULA == "negative_of":
        y = c.bits_of(c.negative_of(c.float_of(x.to(tl.uint32))))
    elif FORMULA == "bf16_of":
        y = c.bf16_of(c.float_of(x.to(tl.uint32)), tl.load(random_ptr + lane).to(tl.uint32))
    else:
        y = c.random_bits(x, tl.load(random_ptr).to(tl.uint32), tl.load(random_ptr + 1).to(tl.uint32))
    tl.store(out_ptr + lane, y.to(tl.int64))


def formula(name: str, x: Tensor, random: Tensor | None = None) -> Tensor:
    """int64 [N]: bits of a formula's results for the bits, int64 [N], of its arguments."""
    out = torch.zeros_like(x)
    assert x.numel() % 1024 == 0
    _formula_kernel[(x.numel() // 1024,)](out, x, x if random is None else random, FORMULA=name, BLOCK=1024)
    return out


def floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def patterns() -> Tensor:
    """int64 [65536]: bits of floats, among them all the ends of classes, and their neighbours."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 1 << 32, (65536,), generator=g)
    ends = [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    bits[: 2 * len(ends)] = torch.tensor(ends + [e | 0x80000000 for e in ends])
    return bits


@pytest.mark.parametrize(("name", "dtype"), [("float_of_bf16", torch.bfloat16), ("float_of_fp16", torch.float16)])
def test_16_bit_floats_are_read_exactly(name: str, dtype: torch.dtype) -> None:
    bits = torch.arange(65536)
    assert_same(floats(formula(name, bits)), bits.to(torch.int16).view(dtype).float())


def test_order_key() -> None:
    bits = patterns()
    assert torch.equal(formula("order_key", bits), ref.order_key(floats(bits)))


def test_negation_flips_one_bit() -> None:
    assert torch.equal(formula("negative_of", patterns()), patterns() ^ 0x80000000)


@pytest.mark.parametrize("random", [0, 0xFFFF, 0x12348000, None])
def test_stochastic_rounding(random: int | None) -> None:
    bits = patterns()
    bits16 = torch.randint(0, 1 << 32, bits.shape) if random is None else torch.full_like(bits, random)
    expected = ref.store(floats(bits), torch.bfloat16, bits16).view(torch.int16).to(torch.int64) & 0xFFFF
    assert torch.equal(formula("bf16_of", bits, bits16), expected)


def test_random_bits_of_large_indices() -> None:
    index = torch.randint(0, 1 << 45, (4096,))
    index[:4] = torch.tensor([0, (1 << 32) - 1, 1 << 32, (1 << 63) - 1])
    for key in (ref.rounding_key(1, 2, 3), (0, 0), (ref.MASK32, ref.MASK32)):
        assert torch.equal(formula("random_bits", index, torch.tensor(key)), ref.random_bits(index, *key))


# ---- index arithmetic --------------------------------------------------------------------------------


def index_of(row: list[int], i: int) -> int:
    """Global index of local weight i, in Python's integers."""
    index, stride = row[0], 1
    for d in (3, 2, 1, 0):
        index += (row[9 + d] + i % row[5 + d]) * stride
        i //= row[5 + d]
        stride *= row[1 + d]
    return index


def numel_of(row: list[int]) -> int:
    return row[5] * row[6] * row[7] * row[8]


@triton.jit
def _walk_kernel(out_ptr, layout_ptr, first, blocks, N: tl.constexpr):
    """Global indices of blocks of 512 weights from `first` on."""
    tensor = tl.program_id(0).to(tl.int64)
    place = at.place_of(layout_ptr, tensor, at.run_of(layout_ptr, tensor), tl.load(first))
    block = 0
    while block < blocks:
        index, place = at.walk_block(layout_ptr, tensor, place)
        tl.store(out_ptr + block * 512 + tl.arange(0, 512), index)
        block += 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "x".join(map(str, row[5:9])))
def test_walk_finds_every_global_index(row: list[int]) -> None:
    n = numel_of(row)
    for first in sorted({0, n // 3, max(0, n // 2 - 700), max(0, n - 1000)}):
        count = min(1536, n - first)
        out = torch.zeros(1536, dtype=torch.int64)
        _walk_kernel[(1,)](out, torch.tensor([row]), torch.tensor([first]), 3, N=512)
        assert out[:count].tolist() == [index_of(row, first + i) for i in range(count)]


@triton.jit
def _rank_kernel(out_ptr, layout_ptr, index_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, at.local_rank(layout_ptr, 0, tl.load(index_ptr + i)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "x".join(map(str, row[5:9])))
def test_local_rank_counts_the_weights_before_an_index(row: list[int]) -> None:
    """Binary search over the global indices, which rise with the local ones, is the judge."""
    n, full = numel_of(row), row[1] * row[2] * row[3] * row[4]
    inside = [index_of(row, i) for i in {0, 1, n // 3, n // 2, n - 2, n - 1} if 0 <= i < n]
    near = {i + d for i in inside for d in (-1, 0, 1)}
    probes = sorted(i for i in {0, row[0], row[0] + full, row[0] + full // 2, (1 << 63) - 1, *near} if i >= 0)
    out = torch.zeros(len(probes), dtype=torch.int64)
    _rank_kernel[(len(probes),)](out, torch.tensor([row]), torch.tensor(probes))
    for index, rank in zip(probes, out.tolist(), strict=True):
        low, high = 0, n
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if index_of(row, middle) < index else (low, middle)
        assert rank == low


@triton.jit
def _wraps_kernel(out_ptr, at_ptr, size_ptr, steps_ptr, LIMIT: tl.constexpr):
    i = tl.program_id(0)
    steps = tl.load(steps_ptr + i).to(tl.uint32)
    tl.store(out_ptr + i, at.wraps_of(tl.load(at_ptr + i), tl.load(size_ptr + i), steps, LIMIT).to(tl.int64))


def test_wraps_of_counters_of_any_size() -> None:
    sizes = (1, 2, 3, 15, 16, 17, 40, (1 << 31) + 1, 1 << 50)
    cases = [
        (position, size, steps)
        for size, steps in itertools.product(sizes, (0, 1, 7, 15))
        for position in sorted({0, size // 2, max(0, size - 8), size - 1})
    ]
    position, size, steps = (torch.tensor(column) for column in zip(*cases, strict=True))
    out = torch.zeros(len(cases), dtype=torch.int64)
    _wraps_kernel[(len(cases),)](out, position, size, steps, LIMIT=16)
    assert out.tolist() == [(p + s) // n for p, n, s in cases]
