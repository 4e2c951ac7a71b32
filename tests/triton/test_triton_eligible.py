"""eligible_ in Triton against reference.py, interpreted, emulated and on a GPU."""

from __future__ import annotations

import pytest
import torch
from eligible_scores import KINDS, SMALL, check_eligible
from triton_lists import WARNINGS

from pins_ext import ops

pytestmark = WARNINGS


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_eligible_kernel(device: str, score: str, dtype: torch.dtype, axis: int) -> None:
    check_eligible(device, score, dtype, "special", SMALL, (2, 4), axis)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("pattern", [(1, 3), (4, 8), (5, 32)], ids=str)
def test_eligible_kernel_patterns(device: str, pattern: tuple[int, int], axis: int) -> None:
    of = pattern[1]
    check_eligible(device, "identity", torch.float32, "ties", [(of, 5 * of), (2, of, of)], pattern, axis)


def test_eligible_kernel_groups_that_chunks_cut(device: str) -> None:
    """A chunk is 16384 weights."""
    check_eligible(device, "product", torch.bfloat16, "ties", [(3, 5700)], (1, 3), -1)
    check_eligible(device, "product", torch.bfloat16, "ties", [(4, 4200)], (2, 4), -2)


def test_eligible_kernel_shards(device: str) -> None:
    shards = [ops.Shard((32, 40), (8, 8)), ops.Shard((4, 16, 24), (1, 8, 8))]
    check_eligible(device, "product", torch.float32, "ties", [(16, 24), (2, 8, 16)], (2, 4), -1, shards)


def test_eligible_kernel_of_nothing(device: str) -> None:
    check_eligible(device, "identity", torch.float32, "normal", [], (2, 4), -1)
    check_eligible(device, "identity", torch.float32, "normal", [(0, 8)], (2, 4), -1)
