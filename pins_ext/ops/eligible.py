"""The scores of what groups N:M can lose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def eligible_(
    scores: Sequence[Tensor],
    nans: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    groups: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """Write the scores by which weights of groups N:M compete; the N best of a group, by (score, position), are NaN.

    No cutoff reaches NaN, so `select` and `pack_` with the score "identity" leave the best alone. A score of NaN itself
    counts as infinity, and infinity as the largest number.

    Args:
        scores: float32 [n tensors]; written.
        nans: int64 [n], scores of each tensor that were NaN; written.
        a: [n tensors], first operand of the score: float32 or bfloat16 for product and deviation, otherwise also
            float16; also a state in 8 bits, see `encode`.
        b: [n tensors], its second operand: in the dtype of a for product and deviation, any of the three for fisher,
            otherwise empty.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        score: one of `SCORES`.
        groups: int64 [n, 3], of each tensor: N, M (at most 32), and how many weights lie from one of a group to the
            next: 1 along the last dimension, the size of the last along the one before it.
        factors: float32 [n], of the score fisher: 1 / (1 - beta2^t) of each tensor; None for the others.
        pointers: int64 [3, n], on a GPU: addresses of scores, a and b; None to look them up, except while a CUDA graph
            is captured.

    Raises:
        RuntimeError: an unknown score, an argument of another dtype, shape or device, not contiguous, an output that
            shares memory with a table, on the CPU groups that do not fill a tensor.
    """
    torch.ops.pins_ext.eligible_(scores, nans, a, b, places, chunks, score, groups, factors=factors, pointers=pointers)
