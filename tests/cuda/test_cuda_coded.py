"""The masked update in 8 bits on a GPU: the bytes of the CPU operators, which test_ops_coded.py compares."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_all_same, masks_of, rng_of, tensors
from gpus import Gpu
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext
Shape = tuple[int, ...]
SHAPES: list[Shape] = [(1,), (0,), (7, 33), (40, 2), (77,), (3, 5, 31), (9, 131), (5, 64), (4, 0)]
CHUNKS: list[Shape] = [(500, 33)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Of ipt, exp_avg, exp_avg_sq: at least one in 8 bits.
STORAGES = [
    (torch.uint8, torch.int8, torch.uint8),
    (torch.uint8, torch.float32, torch.float32),
    (torch.uint8, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8, torch.uint8),
    (torch.float32, torch.int8, torch.uint8),
]


def values_of(shapes: list[Shape], values: str, seed: int, signed: bool = False) -> list[Tensor]:
    """float32, not negative unless `signed`; "spread": many octaves within a group."""
    sizes = [math.prod(shape) for shape in shapes]
    made = tensors(sizes, torch.float32, values.replace("spread", "normal"), seed)
    if values == "spread":
        other = tensors(sizes, torch.float32, seed=seed + 50)
        made = [x * torch.exp2(8 * y) for x, y in zip(made, other, strict=True)]
    made = [x.view(shape) for x, shape in zip(made, shapes, strict=True)]
    return made if signed or values == "special" else [x.abs() for x in made]


def stored(values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [ref.encode(x, dtype == torch.int8) if dtype in ops.CODED else x.to(dtype) for x in values]


def placed(device: str, lists: list[list[Tensor]], skip: int) -> list[list[Tensor]]:
    """Copies, so many elements after a whole word."""
    found = []
    for tensors_ in lists:
        copies = []
        for x in tensors_:
            storage = torch.empty(x.numel() + 16, dtype=x.dtype, device=device)
            copies.append(storage[skip:][: x.numel()].view(x.shape).copy_(x))
        found.append(copies)
    return found


def call(adamw: bool, device: str, lists: list[list[Tensor]], layout: ops.Layout, **options: object) -> None:
    n = len(layout.places)
    rows = 0.1 + 0.8 * torch.rand(n, 8, generator=torch.Generator().manual_seed(n))
    rows[:, 2], rows[:, 5], rows[:, 7] = (0.1, -1e-3, 1e-8) if adamw else (0.9, 1.0, 0.0)
    criterion, accepted = options.pop("criterion"), options.pop("accepted")
    given = (rows, torch.tensor([float(str(accepted))]), rng_of(3))
    scalars = {name: torch.tensor([x], device=device) for name, x in options.items() if name != "clear_state"}
    op = pins.masked_adamw_ if adamw else pins.masked_sgd_
    op(
        *lists, layout.places.to(device), layout.chunks.to(device), *(x.to(device) for x in given), criterion,
        options.get("clear_state", False), **scalars,
    )  # fmt: skip


def compare(
    gpu: Gpu,
    shapes: list[Shape],
    values: str,
    dtype: torch.dtype,
    storage: tuple[torch.dtype, ...],
    skip: int = 0,
    layout: ops.Layout | None = None,
    shadow: bool = False,
    masked: bool = True,
    **options: object,
) -> None:
    """AdamW, or SGD where only ipt is in 8 bits and the buffer is stored as the weights are."""
    options = {"criterion": "pins", "accepted": 2} | options
    params, grads = ([x.to(dtype) for x in values_of(shapes, "normal", s, signed=True)] for s in (1, 2))
    ipt = stored(values_of(shapes, values, 5), storage[0])
    first = stored(values_of(shapes, values, 3, signed=True), storage[1])
    second = stored(values_of(shapes, values, 4), storage[2])
    masks = masks_of(params)[1] if masked else []
    layout = layout or ops.Layout.of(params, base=(1 << 32) - 1000)
    shadows = [x.clone() for x in params] if shadow else []
    for adamw in (True, False):
        if not adamw and storage[1] in ops.CODED:
            continue
        moments = [first, second] if adamw else [[x.to(dtype) for x in values_of(shapes, values, 3, signed=True)]]
        lists = [params, *moments, ipt, shadows, grads, masks]
        here, there = placed("cpu", lists, skip), placed(gpu.device, lists, skip)
        call(adamw, "cpu", here, layout, **dict(options))
        with gpu.kernels():
            call(adamw, gpu.device, there, layout, **dict(options))
        for on_cpu, on_gpu in zip(here, there, strict=True):
            back = [x.cpu() for x in on_gpu]
            if on_cpu and on_cpu[0].dtype in ops.CODED:
                assert all(torch.equal(a, b) for a, b in zip(on_cpu, back, strict=True))
            else:
                assert_all_same(back, on_cpu)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_update_in_8_bits(gpu: Gpu, dtype: torch.dtype, storage: tuple[torch.dtype, ...]) -> None:
    compare(gpu, SHAPES, "normal", dtype, storage, skip=1, clear_state=True)
    compare(gpu, SHAPES, "spread", dtype, storage, masked=False, accepted=0)


@pytest.mark.parametrize("values", ["special", "zeros", "equal"])
def test_update_in_8_bits_of_ugly_values(gpu: Gpu, values: str) -> None:
    for storage in STORAGES[:3]:
        compare(gpu, SHAPES, values, torch.bfloat16, storage, grad_scale=64.0, clip=0.5)


@pytest.mark.parametrize("criterion", ops.CRITERIA)
def test_update_in_8_bits_by_every_criterion(gpu: Gpu, criterion: str) -> None:
    compare(gpu, [(5, 33), (70,)], "normal", torch.bfloat16, STORAGES[0], criterion=criterion, shadow=True)


def test_update_in_8_bits_across_chunks_in_shards_and_not_at_all(gpu: Gpu) -> None:
    compare(gpu, CHUNKS, "normal", torch.bfloat16, STORAGES[0])
    shards = [ops.Shard((20, 131), (3, 64)), ops.Shard((9, 4, 40), (2, 1, 0))]
    shapes: list[Shape] = [(6, 67), (5, 2, 40)]
    layout = ops.Layout.of([torch.empty(shape) for shape in shapes], shards)
    compare(gpu, shapes, "normal", torch.bfloat16, STORAGES[0], layout=layout)
    compare(gpu, [(5, 33)], "normal", torch.bfloat16, STORAGES[0], found_inf=1.0)
