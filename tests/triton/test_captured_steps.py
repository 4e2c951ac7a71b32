"""Captured steps are those of eager training to the last bit: on a GPU in CUDA graphs, elsewhere recorded.

On the CPU the kernels of a GPU are interpreted, or executed as PTX (--ptx 90). More cases, of the CPU's operators:
tests/pruning/test_captured.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from recorded import compare
from watch import like_a_gpu

CASES: dict[str, dict[str, Any]] = {
    "pins": {},
    "moments": {"criterion": "moments"},
    "bfloat16": {"dtype": torch.bfloat16, "state_dtype": "bfloat16", "moment_dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", CASES)
def test_replays_are_eager_steps(device: str, case: str) -> None:
    with nullcontext() if device == "cuda" else like_a_gpu():
        replays = compare(device, **CASES[case]).replays
    assert any(kind.chooses and kind.folds for kind in replays)
    assert any(kind.zeroes and not kind.chooses for kind in replays)
