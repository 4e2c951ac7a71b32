"""N:M and blocks over ranks: the masks of one process where groups lie whole on a rank, refused by name elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run
from sharded import STEPS, pruned

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("rows", "PinsAdamW", {"pattern": "2:4"}),
    ("rows", "PinsAdamW", {"pattern": {"*attention*": "2:4", "*output*": "4x4"}, "state_dtype": "bfloat16"}),
    ("rows", "SGD", {"pattern": {"*attention*": "2:4", "*intermediate*": "4x1"}, "min_density": {"*1.output*": 0.55}}),
]
WIDE: list[tuple[str, str, dict[str, Any]]] = [
    ("columns", "PinsSGD", {"pattern": "4:8", "criterion": "magnitude"}),
    ("rows", "SGD", {"pattern": "4x1", "scope": "layer"}),
    ("parallel", "PinsAdamW", {"pattern": "1x4", "mask_policy": "strict"}),
]


def several(cases: list[tuple[str, str, dict[str, Any]]]) -> list[Any]:
    return [pruned(how, optimizer, {"sparsity": 0.5} | options, width=16) for how, optimizer, options in cases]


def refused() -> str:
    try:
        pruned("rows", "SGD", {"sparsity": 0.5, "pattern": "16x16"}, width=16)
    except ValueError as error:
        return str(error)
    return ""


def agree(cases: list[tuple[str, str, dict[str, Any]]]) -> None:
    told = run(2, several, cases)
    for i, (_, optimizer, options) in enumerate(cases):
        alone = pruned("whole", optimizer, {"sparsity": 0.5} | options, width=16)
        assert len(set(alone["masks"])) >= 3
        assert alone["final"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
        for rank in told:
            assert rank[i]["placements"] != ["None"]
            for part in ("masks", "stats", "final", "weights"):
                assert rank[i][part] == alone[part], (optimizer, options, part)
        assert len(alone["masks"]) == STEPS + 1


def test_masks_are_those_of_one_process() -> None:
    agree(CASES)


@pytest.mark.slow
def test_masks_are_those_of_one_process_in_more_ways() -> None:
    agree(WIDE)


def test_a_block_that_is_cut_is_refused_by_the_tensors_name() -> None:
    for message in run(2, refused):
        assert "layers.0.attention.self.weight: the pattern 16x16 needs whole groups or blocks on every rank" in message
        assert "'none'" in message
