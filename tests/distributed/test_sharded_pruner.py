"""The same full gradients on any number of ranks, however the model is cut: the same masks and weights, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run
from sharded import STEPS, pruned

CASES: list[tuple[int, str, str, dict[str, Any]]] = [
    (2, "rows", "PinsAdamW", {}),
    (2, "rows", "SGD", {"mask_policy": "strict", "criterion": "platon"}),
    (2, "columns", "PinsSGD", {"state_dtype": "bfloat16"}),
    (2, "parallel", "PinsAdamW", {"mask_optimizer_state": True}),
    (4, "both", "PinsAdamW", {}),
    (4, "hybrid", "AdamW", {"scope": "layer"}),
]
WIDE: list[tuple[int, str, str, dict[str, Any]]] = [
    (size, how, optimizer, options)
    for size, how in ((3, "rows"), (6, "rows"), (8, "rows"), (6, "both"), (8, "both"), (8, "hybrid"), (4, "parallel"))
    for optimizer, options in (
        ("PinsAdamW", {"state_dtype": "bfloat16"}),
        ("SGD", {"beta2": 0.0, "min_density": {"*output*": 0.4}}),
        ("PinsSGD", {"criterion": "magnitude", "mask_policy": "strict"}),
        ("PinsAdamW", {"criterion": "movement", "ties": "reference"}),
        ("AdamW", {"criterion": "pins-update", "scope": "layer"}),
    )
]


def several(cases: list[tuple[str, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [pruned(*case) for case in cases]


def agree(cases: list[tuple[int, str, str, dict[str, Any]]], size: int) -> None:
    here = [case[1:] for case in cases if case[0] == size]
    told = run(size, several, here)
    for i, (how, optimizer, options) in enumerate(here):
        alone = pruned("whole", optimizer, options)
        assert len(set(alone["masks"])) >= 4
        for rank in told:
            assert rank[i]["placements"] != ["None"]
            for part in ("masks", "view", "stats", "final", "weights"):
                assert rank[i][part] == alone[part], (how, optimizer, options, part)
        assert len(alone["masks"]) == STEPS + 1


@pytest.mark.parametrize("size", [2, 4])
def test_masks_and_weights_are_those_of_one_process(size: int) -> None:
    agree(CASES, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4, 6, 8])
def test_masks_and_weights_are_those_of_one_process_on_more_ranks(size: int) -> None:
    agree(WIDE, size)
