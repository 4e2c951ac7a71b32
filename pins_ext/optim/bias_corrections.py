"""Bias corrections of steps that are counted on a device, so that a CUDA graph can hold one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pins_ext import ops

_MOST_STEPS = 1 << 22
"""Of a table of bias corrections: 32 MB, which betas up to 0.99999 need."""


def bias_corrections(betas: Sequence[float], steps: Tensor, uploads: ops.Uploads, use: object) -> Tensor:
    """1 - beta^t, from a table of the very numbers that Python computes; a device's own power may round otherwise.

    Args:
        betas: in [0, 1), one for each parameter.
        steps: float64 [n], t of each, whole numbers from 0 on.
        uploads: keeps the tables.
        use: whose betas they are, see Uploads.

    Returns:
        float64 [n].

    Raises:
        ValueError: a beta so near to 1 that its table would be too long.
    """
    device, distinct, key = steps.device, sorted(set(betas)), tuple(betas)
    table = uploads.of(("corrections", use), tuple(distinct), device, lambda: _table(distinct))
    starts = dict(zip(distinct, accumulate((_length(b) for b in distinct), initial=0), strict=False))
    rows = [(starts[b], starts[b] + _length(b) - 1) for b in betas]
    first, last = uploads.of(("rows", use), key, device, lambda: torch.tensor(rows, device="cpu")).unbind(1)
    return table.index_select(0, torch.minimum(first + steps.long(), last))


def check_betas(betas: Sequence[float]) -> None:
    """Raise ValueError for a beta so near to 1 that its table would be too long."""
    for beta in betas:
        _length(beta)


def _table(betas: Sequence[float]) -> Tensor:
    return torch.tensor(
        [1 - beta ** float(t) for beta in betas for t in range(_length(beta))], dtype=torch.float64, device="cpu"
    )


def _length(beta: float) -> int:
    """Of the table: beyond it beta^t is no more than half an ulp of 1."""
    if beta == 0:
        return 2
    length = math.ceil(54 * math.log(2) / -math.log(beta)) + 2 if 0 < beta < 1 else None
    if length is None or length > _MOST_STEPS:
        raise ValueError(f"capturable=True takes betas up to 0.99999, whose bias corrections fit a table; got {beta}")
    return length
