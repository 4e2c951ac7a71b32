"""The model as its last mask leaves it, for as long as somebody looks: evaluations and snapshots fall between masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pins_ext.distributed.shards import forget_gathered, local
from pins_ext.pruning.masks import Masks


@contextmanager
def masked(model: nn.Module, parameters: Sequence[Tensor], masks: Masks) -> Iterator[None]:
    """Zero what the last mask prunes; afterwards, also on an exception, every weight has its bits again.

    Hidden values are kept compactly: one element for every pruned weight. Nothing is done before the first mask, where
    pruned weights are zero already, and inside another view.

    Args:
        model: theirs.
        parameters: the pruned tensors, DTensors or plain.
        masks: theirs.
    """
    if not masks.chosen or masks.applied or masks.in_view:
        yield
        return
    # This rank's: each knows the mask of its own.
    parts = [local(p) for p in parameters]
    hidden: list[Tensor] = []
    masks.in_view = True
    try:
        with torch.no_grad():
            for i, p in enumerate(parts):
                pruned = ~masks.keep(i, p.shape)
                hidden.append(p[pruned])
                p.masked_fill_(pruned, 0)
        forget_gathered(model)
        yield
    finally:
        with torch.no_grad():
            for i, values in enumerate(hidden):
                p = parts[i]
                p.masked_scatter_(~masks.keep(i, p.shape), values)
        forget_gathered(model)
        masks.in_view = False
