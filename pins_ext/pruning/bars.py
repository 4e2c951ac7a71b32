"""Marks of weights that are pruned for good, in the states that their importance is kept in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.shards import local, shard_of

_NAN_CODE = 255
"""Of an average in 8 bits, see reference.encode: all bits are ones."""


def write_bars(
    states: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor], masks: Sequence[Tensor], smoothed: bool
) -> None:
    """Let the weights that masks prune score below all others from now on, or in 8 bits NaN.

    An average of minus infinity stays what it is, whatever is averaged into it, and so does a sum. 8 bits have no
    infinity, but NaN, which stays as well and lies above all others: there the selection leaves them out, see
    Selection.held.

    Args:
        states: tensors by state, of this rank's parts; written to.
        parameters: the pruned tensors, DTensors or plain.
        masks: packed bits of each.
        smoothed: whether the score is made of the averages, and not of the window's mean.
    """
    values = {"exp_avg_ipt": -math.inf, "exp_avg_unc": math.inf, "shadow": 0.0}
    if not smoothed:
        values["ipt"] = -math.inf
    named = values.keys() & states.keys()
    for i, (p, bits) in enumerate(zip(parameters, masks, strict=True)):
        pruned = ~ops.unpack_bits(bits, local(p).shape)
        coded = [states[name][i] for name in named if states[name][i].dtype in ops.CODED]
        if coded:
            # masked_fill_ takes several times as long as an OR with bytes of ones.
            codes = ops.by_group(pruned, shard_of(str(i), p)).to(torch.uint8).mul_(_NAN_CODE)
            for state in coded:
                state[..., : ops.GROUP] |= codes.to(state.device)
        for name in named:
            if (state := states[name][i]).dtype not in ops.CODED:
                state.masked_fill_(pruned.to(state.device), values[name])
