"""Scores: what one is made of, and the instant score of a user's function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """What a score is made of.

    Attributes:
        kind: one of ops.SCORES.
        a: first operand, a tensor for each pruned tensor.
        b: second operand, likewise; empty where there is one operand.
        factors: float32 [n], of the score "fisher".
        shapes: of the tensors, where an operand may be stored in 8 bits.
    """

    kind: str
    a: list[Tensor]
    b: list[Tensor]
    factors: Tensor | None = None
    shapes: Sequence[torch.Size] = ()


Counted = tuple[Tensor, Tensor]
"""A bracket of order keys and the counts of the weights inside it, see ops.select."""


def own_score(criterion: Any, p: Tensor, g: Tensor, lr: Any) -> Tensor:
    """The instant score of a user's function, float32, contiguous. It gets copies, which it may write to.

    Raises:
        ValueError: it returned something else than one real number per weight.
    """
    c = criterion(p.to(torch.float32, copy=True), g.to(torch.float32, copy=True), lr)
    if not isinstance(c, Tensor) or c.shape != p.shape or c.is_complex():
        got = f"{tuple(c.shape)} of {c.dtype}" if isinstance(c, Tensor) else type(c).__name__
        raise ValueError(f"a criterion must return one real score per weight, shape {tuple(p.shape)}; got {got}")
    return c.float().contiguous()
