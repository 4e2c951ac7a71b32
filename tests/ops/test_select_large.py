"""Selection past 2^31 weights: exact against an independent count, in constant memory."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.bench import memory

_CPU = torch.device("cpu")
_PIECE = 1 << 24
_MOST_TRANSIENT = 64_000_000


def bfloat16_states(sizes: list[int], seed: int) -> list[Tensor]:
    """Every finite bfloat16 from 0 up and infinity, equally likely: products with zeros, denormals, infinities, NaN."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.empty(n, dtype=torch.bfloat16) for n in sizes]
    for state in states:
        state.view(torch.int16).random_(0, 0x7F81, generator=generator)
    return states


def wanted_bits(a: Tensor, b: Tensor, base: int, score: float, tie: int) -> tuple[np.ndarray, int]:
    """The mask bytes that keep what a stable ascending sort would, by float comparisons; and how many it prunes."""
    # The product in float32, as the score is defined; 0 times infinity is NaN, which is kept.
    with np.errstate(invalid="ignore", over="ignore"):
        scores = a.float().numpy() * b.float().numpy()
        ties = np.flatnonzero(scores == score)
        pruned = scores < score
    pruned[ties[ties + base < tie]] = True
    return np.packbits(~pruned, bitorder="little"), int(pruned.sum())


def check(sizes: list[int], remaining_ratio: float) -> None:
    """Select and pack, then recount everything piece by piece."""
    a, b = bfloat16_states(sizes, 1), bfloat16_states(sizes, 2)
    layout = ops.Layout.of(a)
    masks, stats = [ops.new_mask(x) for x in a], torch.zeros(len(sizes), 3, dtype=torch.int64)
    n_prune = layout.total - round(remaining_ratio * layout.total)
    arguments = a, b, layout.places, layout.chunks, "product"
    begin = time.perf_counter()
    with memory.Peak(_CPU) as selecting:
        threshold = torch.ops.pins_ext.select(*arguments, torch.tensor(n_prune))
    selected = time.perf_counter()
    with memory.Peak(_CPU) as packing:
        torch.ops.pins_ext.pack_(masks, stats, *arguments, threshold.reshape(1, 2))
    packed = time.perf_counter()
    print(
        f"\n{layout.total:,} weights: select {selected - begin:.1f} s, {selecting.bytes:,} B beside the states; "
        f"pack {packed - selected:.1f} s, {packing.bytes:,} B beside the masks"
    )
    assert selecting.bytes is not None
    assert selecting.bytes < _MOST_TRANSIENT
    assert packing.bytes is not None
    assert packing.bytes < _MOST_TRANSIENT
    assert int(stats[:, 0].sum()) == layout.total - n_prune

    score, tie = float(ops.score_of_key(threshold)), int(threshold[1])
    base = pruned = 0
    for x, y, mask in zip(a, b, masks, strict=True):
        for begin_at in range(0, x.numel(), _PIECE):
            piece = slice(begin_at, min(begin_at + _PIECE, x.numel()))
            bits, count = wanted_bits(x[piece], y[piece], base + begin_at, score, tie)
            assert np.array_equal(mask[begin_at // 8 :][: bits.size].numpy(), bits), f"piece at {begin_at}"
            pruned += count
        base += x.numel()
    assert pruned == n_prune


def test_select_exact_by_an_independent_count() -> None:
    """The same as below, small enough for every run."""
    check([100_003, 3, 50_021], 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("remaining_ratio", [0.2])
def test_select_past_int32(remaining_ratio: float) -> None:
    """2.2 G weights, one tensor of them beyond 2^31 by itself, bfloat16 states of 8.8 GB."""
    sizes = [2**31 + 4099, 52_512_253]
    needed, free = 4 * sum(sizes) + sum(sizes) // 8 + (1 << 30), memory.available(_CPU)
    if needed > free:
        pytest.skip(f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    check(sizes, remaining_ratio)
