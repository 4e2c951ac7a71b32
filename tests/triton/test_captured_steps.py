"""Captured steps are those of eager training to the last bit: on a GPU in CUDA graphs, elsewhere recorded.

On the CPU the kernels of a GPU are executed as PTX (--ptx 90). More cases, of the CPU's operators:
tests/pruning/test_captured.py.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_training import separately
from recorded import compare, compare_without_a_pruner
from watch import like_a_gpu

CASES: dict[str, dict[str, Any]] = {
    "pins": {},
    "moments": {"criterion": "moments"},
    "bfloat16": {"dtype": torch.bfloat16, "state_dtype": "bfloat16", "moment_dtype": "bfloat16"},
}
MORE: dict[str, dict[str, Any]] = {
    "fisher": {"criterion": "fisher"},
    "magnitude": {"criterion": "magnitude"},
    "strict": {"mask_policy": "strict"},
    "clipped": {"max_norm": 0.5},
    "scaled": {"scaled": True},
    "SGD": {"optimizer": "sgd"},
}
"""On a GPU as quick as the others; emulated they take their time."""


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_replays_are_eager_steps(compiled_device: str, case: str) -> None:
    # Eager steps by the separate passes that captured ones are made of.
    with nullcontext() if compiled_device == "cuda" else like_a_gpu(), separately():
        replays = compare(compiled_device, **(CASES | MORE)[case]).replays
    assert any(kind.chooses for kind in replays)
    assert any(kind.zeroes for kind in replays)


def test_an_optimizer_without_a_pruner(device: str) -> None:
    with nullcontext() if device == "cuda" else like_a_gpu():
        compare_without_a_pruner(device)


@pytest.mark.gpu
def test_the_page_about_it() -> None:
    """Forward and backward in a graph of their own, whose gradients the steps' graphs read."""
    page = Path(__file__).parents[2] / "docs" / "how_to" / "cuda_graphs.md"
    found: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(code, found)
    assert found["step"].graphs
