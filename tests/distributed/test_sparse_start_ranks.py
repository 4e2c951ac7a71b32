"""Models that are sparse from the start, on several ranks: masks and weights of one process, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, digest, inject, masks, sharded, whole

from pins_ext import PruneConfig, Pruner
from pins_ext.distributed.shards import local

pytestmark = pytest.mark.slow

CASES: list[tuple[int, str, str, dict[str, Any] | None]] = [
    (2, "rows", "PinsAdamW", {}),
    (2, "rows", "SGD", {"mask_policy": "strict", "criterion": "platon"}),
    (2, "columns", "PinsSGD", {"scope": "layer"}),
    (2, "parallel", "PinsAdamW", None),
    (3, "rows", "PinsAdamW", {"state_dtype": "8bit"}),
    (4, "both", "AdamW", {"criterion": "fisher"}),
    (4, "hybrid", "PinsAdamW", {"min_density": {"*output*": 0.4}}),
    (4, "hybrid", "SGD", None),
]


def trained(how: str, optimizer_name: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """Prune on from the zeros that are there, or, without options, keep just them."""
    model = sharded(how)
    for name, p in model.named_parameters():
        if name.startswith("layers.") and p.dim() == 2:
            part = local(p).detach()
            part[part.abs() < 0.1] = 0
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    if options is None:
        pruner = Pruner.from_sparse(model, optimizer)
    else:
        pruner = Pruner.from_sparse(model, optimizer, PruneConfig(**(CONFIG | options)), STEPS)
    told: dict[str, Any] = {"masks": [], "start": pruner.plan()["start_sparsity"]}
    zeros = [whole(p.detach()) == 0 for p in pruner.parameters]
    for step in range(STEPS):
        inject(model, step)
        optimizer.step()
        told["masks"].append(masks(pruner))
        assert all(bool((whole(p.detach())[z] == 0).all()) for p, z in zip(pruner.parameters, zeros, strict=True))
    told["final"] = pruner.finalize()
    return told | {"weights": digest(whole(p) for p in model.parameters())}


def several(cases: list[tuple[str, str, dict[str, Any] | None]]) -> list[dict[str, Any]]:
    return [trained(*case) for case in cases]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_masks_and_weights_are_those_of_one_process(size: int) -> None:
    here = [case[1:] for case in CASES if case[0] == size]
    told = run(size, several, here)
    for i, (how, optimizer, options) in enumerate(here):
        alone = trained("whole", optimizer, options)
        assert (len(set(alone["masks"])) > 4) == (options is not None)
        assert alone["final"]["zeros"] > 500
        for rank in told:
            assert rank[i] == alone, (how, optimizer, options)
