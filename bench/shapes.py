"""Shapes of real models, and the names of what is measured on: what the command line's help needs, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]

# One block each: attention projections, then the feed-forward matrices.
_BERT: Sequence[Shape] = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
_LLAMA: Sequence[Shape] = [(4096, 4096)] * 4 + [(11008, 4096), (11008, 4096), (4096, 11008)]
_SHAPES: dict[str, tuple[Sequence[Shape], int]] = {
    "flat": ([], 16_000_000),
    "bert-base": (_BERT, 84_934_656),
    "llama-7b": (_LLAMA, 6_476_005_376),
    # Biases, norms and adapters: from one weight to some ten thousand.
    "many-small": ([(1,), (768,), (3072,), (64, 48), (8, 768), (33, 31), (127, 129)], 0),
    "misaligned": (_BERT, 84_934_656),
}
SHAPES = tuple(_SHAPES)
_MANY = 5000

DTYPES = ("fp32", "bf16", "fp16")
SCORES = ("lognormal-1", "lognormal-4", "lognormal-8", "zeros-80", "equal", "bf16-ties", "window-miss")
RATIOS = (0.01, 0.2, 0.5, 0.8, 0.99)


def shapes_of(name: str, params: int | None = None) -> tuple[Shape, ...]:
    """Shapes of the pruned matrices, about `params` weights in all: blocks are repeated, the last matrix cut to rows.

    Args:
        name: one of SHAPES.
        params: weights wanted; None for the model's own size.
    """
    block, natural = _SHAPES[name]
    if name == "many-small":
        tensors = [block[i % len(block)] for i in range(_MANY)]
        if params is None:
            return tuple(tensors)
        scale = params / sum(map(math.prod, tensors))
        return tuple((max(1, round(math.prod(shape) * scale)),) for shape in tensors)
    wanted = params or natural
    if not block:
        return ((wanted,),)
    shapes: list[Shape] = []
    while wanted > 0:
        rows, columns = block[len(shapes) % len(block)]
        rows = min(rows, max(1, wanted // columns))
        shapes.append((rows, columns))
        wanted -= rows * columns
    return tuple(shapes)
