"""Weights that compete within one output of a layer: the same number is pruned of each (Wanda, Sun et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from pins_ext.pruning.schedule import n_prune

_AT_ONCE = 1 << 22
"""Weights that are sorted together: 50 MB of scores and indices."""


def prune_rows(weight: Tensor, score: Tensor, sparsity: float, output_dim: int) -> int:
    """Zero, in every row, the weights with the lowest scores; of equal ones those that come first.

    Args:
        weight: [rows, columns], or [columns, rows] where output_dim is 1; written. Several of them, one behind the
            other in a first dimension, are pruned one by one; output_dim counts it, too.
        score: float32 of its shape; NaN counts as highest.
        sparsity: share of a row that is pruned; its number of weights is rounded to the nearest.
        output_dim: the dimension along which rows lie.

    Returns:
        How many were pruned.
    """
    if score.dim() == 3:
        return sum(prune_rows(*each, sparsity, output_dim - 1) for each in zip(weight, score, strict=True))
    weight, score = weight.movedim(output_dim, 0), score.movedim(output_dim, 0)
    rows, columns = score.shape
    count = n_prune(columns, 1 - sparsity, exact=True)
    at_once = max(1, _AT_ONCE // columns)
    for part, values in zip(weight.split(at_once), score.split(at_once), strict=True):
        lowest = values.sort(dim=1, stable=True).indices[:, :count]
        part.masked_fill_(torch.zeros_like(part, dtype=torch.bool).scatter_(1, lowest, True), 0)
    return rows * count
