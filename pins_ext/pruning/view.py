"""The model as its last mask leaves it, for as long as somebody looks: evaluations and snapshots fall between masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pins_ext.pruning.masks import Masks


@contextmanager
def masked(parameters: Sequence[Tensor], masks: Masks) -> Iterator[None]:
    """Zero what the last mask prunes; afterwards, also on an exception, every weight has its bits again.

    Hidden values are kept compactly: one element for every pruned weight. Nothing is done before the first mask, where
    pruned weights are zero already, and inside another view.

    Args:
        parameters: the pruned tensors.
        masks: theirs.
    """
    if not masks.chosen or masks.applied or masks.in_view:
        yield
        return
    hidden: list[Tensor] = []
    masks.in_view = True
    try:
        with torch.no_grad():
            for i, p in enumerate(parameters):
                pruned = ~masks.keep(i, p.shape)
                hidden.append(p[pruned])
                p.masked_fill_(pruned, 0)
        yield
    finally:
        with torch.no_grad():
            for i, values in enumerate(hidden):
                p = parameters[i]
                p.masked_scatter_(~masks.keep(i, p.shape), values)
        masks.in_view = False
