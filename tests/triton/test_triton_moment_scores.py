"""fisher and fold_moments_ in Triton against reference.py, interpreted, emulated and on a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import STATES
from moment_scores import check_fisher, check_fold_moments
from triton_lists import WARNINGS

pytestmark = WARNINGS


@pytest.mark.parametrize("values", ["normal", "special", "ties"])
@pytest.mark.parametrize(
    ("weight", "moment"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
    ids=str,
)
def test_fisher_kernels(device: str, weight: torch.dtype, moment: torch.dtype, values: str) -> None:
    check_fisher(device, weight, moment, [70, 0, 1100], values)


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("weight", STATES, ids=str)
def test_fold_moments_kernel(device: str, weight: torch.dtype, state: torch.dtype) -> None:
    check_fold_moments(device, state, weight, weight, sizes=[1, 0, 1100])
    check_fold_moments(device, state, weight, torch.float32, "special", [1100], counting=False)
    check_fold_moments(device, state, weight, weight, sizes=[1100], with_unc=False)
    check_fold_moments(device, state, weight, weight, sizes=[1100], accepted=0.0)


def test_fold_moments_kernel_shards(device: str) -> None:
    check_fold_moments(device, torch.bfloat16, torch.float32, torch.float32)
