"""What the tests of the Triton operators run on, in the interpreter on CPU tensors and on a GPU.

The same calls, `torch.ops.pins_ext.*`, as of the C++ kernels; for the interpreter the Triton launchers take their place
in this process. Sizes are small: the interpreter takes some 30 ms for a block.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

WARNINGS = [
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
    # The interpreter computes with numpy, which remarks upon infinities.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered"),
]

# 1024 weights are a block of the vector path, 512 one of the masked path, 16384 a chunk.
SMALL = [0, 1, 1539]
LISTS: dict[str, list[int]] = {
    "none": [],
    "empty": [0],
    "one": [1],
    "odd": [77],
    "blocks": [2048, 1539, 1024],
    "chunks": [16384, 17413],
    "many": [1, 0, 64, 7, 130] * 10 + [513],
}
# Shards of full tensors, whose local parts are no runs of global indices but the first.
SHARDS = [
    ops.Shard((9, 100), (3, 0)),
    ops.Shard((6, 1000), (0, 300)),
    ops.Shard((5, 7, 11), (1, 2, 3)),
    ops.Shard((2, 3, 5, 70), (0, 1, 2, 3)),
    ops.Shard((700, 3), (0, 1)),
]
SHARD_SIZES = [(4, 100), (6, 410), (3, 4, 6), (2, 2, 2, 60), (700, 1)]


def layout_of(tensors_: list[Tensor], shards: list[ops.Shard | None] | None = None) -> ops.Layout:
    return ops.Layout.of(tensors_, shards, base=(1 << 32) - 1000)


def on(device: str, *lists: list[Tensor]) -> tuple[list[Tensor], ...]:
    """Copies on the device, as misaligned as the originals are."""
    copies = []
    for tensors_ in lists:
        row = []
        for x in tensors_:
            storage = torch.empty(x.numel() + 16, dtype=x.dtype, device=device)
            skip = x.storage_offset() % 16
            row.append(storage[skip : skip + x.numel()].view(x.shape).copy_(x))
        copies.append(row)
    return tuple(copies)


def tables(layout: ops.Layout, device: str) -> tuple[Tensor, Tensor]:
    return layout.places.to(device), layout.chunks.to(device)


def cpu(tensors_: list[Tensor]) -> list[Tensor]:
    return [x.cpu() for x in tensors_]


def counted(keys: Tensor, bracket: list[int]) -> Tensor:
    """What a counting pass leaves in `counts`."""
    lo, hi, shift, *_ = bracket
    inside = keys[(keys >= lo) & (keys <= hi)]
    return torch.cat([(keys < lo).sum()[None], torch.bincount((inside - lo) >> shift, minlength=ops.BINS)])


def keys_of(score: str, a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Order key of every weight of the list, int64 [N]."""
    keys = [ref.order_key(ref.score(score, x, b[i] if b else None)).flatten() for i, x in enumerate(a)]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *keys])
