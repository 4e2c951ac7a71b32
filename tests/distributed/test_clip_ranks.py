"""torch's clip_grad_norm_ over DTensor gradients, torch's own optimizers and the pruner's hooks: as in one process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, inject, sharded, whole
from torch import Tensor

from pins_ext import PruneConfig, Pruner
from pins_ext.distributed.shards import local

QUICK: list[tuple[int, str, str, dict[str, Any]]] = [(2, "rows", "AdamW", {})]
CASES: list[tuple[int, str, str, dict[str, Any]]] = [
    (2, "rows", "SGD", {"mask_policy": "strict", "criterion": "platon"}),
    (2, "columns", "SGD", {"beta2": 0.0}),
    (3, "rows", "AdamW", {"criterion": "pins-update"}),
    (4, "hybrid", "SGD", {}),
]
# Gradients have norms from 0.12 to 1.9.
NORMS = (0.1, 0.5, None)


def clipped(how: str, kind: str, options: dict[str, Any], max_norm: float | None) -> tuple[list[float], list[Any]]:
    """Train. Returns the norms before clipping, and the masks of every step and the weights at the end."""
    model = sharded(how)
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**(CONFIG | options)), STEPS)
    norms, seen = [], []
    for step in range(STEPS):
        inject(model, step)
        for p in model.parameters():
            assert p.grad is not None
            local(p.grad).mul_(2.0 ** (step % 5 - 2))
        if max_norm is not None:
            norms.append(float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))))
        optimizer.step()
        seen.append(flat(pruner.mask(name) for name in pruner.names))
    pruner.finalize()
    seen.append(flat(p.detach() for p in model.parameters()))
    return norms, seen


def flat(tensors: Iterable[Tensor]) -> Any:
    """All of them, as an array: a rank's tensors are gone when it ends."""
    return torch.cat([whole(t).flatten() for t in tensors]).numpy()


def several(cases: list[tuple[str, str, dict[str, Any], float | None]]) -> list[tuple[list[float], list[Any]]]:
    return [clipped(*case) for case in cases]


def agree(found: list[tuple[int, str, str, dict[str, Any]]], size: int) -> None:
    """The norm is another sum on other ranks, the last bits of the gradients with it."""
    cases = [(*case[1:], max_norm) for case in found if case[0] == size for max_norm in NORMS]
    alone = [clipped("whole", *case[1:]) for case in cases]
    for told in run(size, several, cases):
        for (norms, seen), (norms_alone, seen_alone), case in zip(told, alone, cases, strict=True):
            assert norms == pytest.approx(norms_alone, rel=1e-6), case
            *masks, weights = seen
            *masks_alone, weights_alone = seen_alone
            for mask, mask_alone in zip(masks, masks_alone, strict=True):
                assert int(mask.sum()) == int(mask_alone.sum()), case
                assert int((mask ^ mask_alone).sum()) <= 2, case
            np.testing.assert_allclose(weights, weights_alone, rtol=1e-4, atol=1e-5)
    for i in range(0, len(cases), len(NORMS)):
        norms = [alone[i + j][0] for j in range(2)]
        # The first clips every step, the second some; both choose other weights than gradients that are not clipped.
        assert min(norms[0]) > NORMS[0]
        assert min(norms[1]) < NORMS[1] < max(norms[1])
        for j in range(2):
            assert int((alone[i + j][1][-2] ^ alone[i + 2][1][-2]).sum()) > 20


def test_what_the_hooks_see_is_clipped_by_the_norm_of_both_ranks() -> None:
    agree(QUICK, 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_the_hooks_see_is_clipped_by_the_norm_of_all_ranks(size: int) -> None:
    agree(CASES, size)
