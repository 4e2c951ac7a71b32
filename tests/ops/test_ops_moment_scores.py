"""fisher and fold_moments_ on the CPU against reference.py, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATS, LISTS, STATES, VALUES
from moment_scores import check_fisher, check_fold_moments

from pins_ext import reference as ref

DTYPES = [(w, m) for w in FLOATS for m in dict.fromkeys((w, torch.float32))]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("weight", "moment"), DTYPES, ids=str)
def test_fisher(weight: torch.dtype, moment: torch.dtype, values: str) -> None:
    check_fisher("cpu", weight, moment, [700, 0, 17000, 65], values)


@pytest.mark.parametrize("sizes", ["empty", "one", "odd", "block", "chunk", "many", "shards"])
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize(("weight", "moment"), DTYPES, ids=str)
def test_fold_moments(weight: torch.dtype, moment: torch.dtype, state: torch.dtype, sizes: str) -> None:
    for with_unc in (True, False):
        check_fold_moments("cpu", state, weight, moment, sizes=LISTS.get(sizes), with_unc=with_unc)
    check_fold_moments("cpu", state, weight, moment, sizes=LISTS.get(sizes), accepted=0.0)


@pytest.mark.parametrize("values", VALUES)
def test_fold_moments_ugly_values(values: str) -> None:
    check_fold_moments("cpu", torch.float32, torch.float32, torch.float32, values, [1000, 5], counting=False)


def test_moments_are_those_of_pins_after_one_step_from_zero() -> None:
    """m = (1 - b1) g and v = (1 - b2) g², corrected for their bias, are g and g²."""
    p, g = torch.randn(1000), torch.randn(1000)
    factors = torch.tensor([1e-3, 1 / (1 - 0.9), 1 / (1 - 0.999)])
    found = ref.moments(p, 0.1 * g, 0.001 * g * g, factors)
    torch.testing.assert_close(found, ref.instant_score("pins", p, p, g, 1e-3), rtol=1e-5, atol=1e-7)
