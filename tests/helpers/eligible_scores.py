"""eligible_ against reference.py on any device: groups along either dimension, ties, what is not finite, shards."""

from __future__ import annotations

import torch
from cases import FLOATS, STATES, tensors
from torch import Tensor
from triton_lists import cpu, layout_of, on, tables

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext

KINDS = [("product", d) for d in STATES] + [("identity", d) for d in FLOATS] + [("fisher", torch.float32)]

SMALL = [(0, 8), (1, 8), (8, 24), (2, 16, 40), (48, 8)]
"""Shapes that hold whole groups of 2, 4 and 8 in both dimensions but the second, which has them in the last alone."""


def check_eligible(
    device: str,
    score: str,
    dtype: torch.dtype,
    values: str,
    shapes: list[tuple[int, ...]],
    pattern: tuple[int, int],
    axis: int,
    shards: list[ops.Shard | None] | None = None,
) -> None:
    """Scores, bit for bit, and how many were NaN."""
    (keep, of), sizes = pattern, [torch.Size(shape).numel() for shape in shapes]
    fits = [i for i, shape in enumerate(shapes) if shape[axis] % of == 0]
    shapes, sizes = [shapes[i] for i in fits], [sizes[i] for i in fits]

    def drawn(seed: int, misaligned: bool) -> list[Tensor]:
        flat = tensors(sizes, dtype, values, seed=seed, misaligned=misaligned)
        return [x.view(shape) for x, shape in zip(flat, shapes, strict=True)]

    a, b = drawn(1, True), drawn(2, False) if score in ("product", "fisher") else []
    factors = torch.linspace(1.0, 5.0, len(a)) if score == "fisher" else None
    layout = layout_of(a, shards)
    groups = [[keep, of, 1 if axis == -1 else max(1, shape[-1])] for shape in shapes]
    (a_, b_), nans = on(device, a, b), torch.full((len(a),), -1, device=device)
    found = [torch.full(shape, 7.0, device=device) for shape in shapes]
    kwargs = {} if factors is None else {"factors": factors.to(device)}
    table = torch.tensor(groups, dtype=torch.int64, device=device).view(-1, 3)
    pins.eligible_(found, nans, a_, b_, *tables(layout, device), score, table, **kwargs)
    for i, x in enumerate(cpu(found)):
        scores = ref.score(score, a[i], b[i] if b else None, *([] if factors is None else [factors[i]]))
        expected = ref.eligible(scores, keep, of, axis)
        same = (x.view(torch.int32) == expected.view(torch.int32)) | (x.isnan() & expected.isnan())
        assert bool(same.all()), (shapes[i], int((~same).sum()))
        assert int(nans[i]) == int(scores.isnan().sum())
