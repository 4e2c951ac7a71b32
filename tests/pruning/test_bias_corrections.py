"""Bias corrections of steps that a device counts: those of the host, and the betas that have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pins_ext import ops
from pins_ext.optim import PinsAdamW
from pins_ext.optim.bias_corrections import bias_corrections


def test_bias_corrections_are_those_of_the_host() -> None:
    """To the last bit, and to the end, where they are 1."""
    betas = [0.9, 0.999, 0.0, 0.95, 0.999, 0.9]
    for t in (1, 2, 3, 99, 350, 354, 355, 356, 357, 37_000, 37_400, 1 << 24):
        steps = torch.full((len(betas),), t, dtype=torch.float64)
        found = bias_corrections(betas, steps, ops.Uploads(), "test").tolist()
        assert found == [1 - beta ** float(t) for beta in betas]
    with pytest.raises(ValueError, match=r"betas up to 0\.99999"):
        bias_corrections([1 - 1e-9], torch.ones(1), ops.Uploads(), "test")


def test_betas_whose_corrections_need_too_long_a_table_are_refused_at_once() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"betas up to 0\.99999"):
        PinsAdamW(parameters, betas=(0.9, 0.9999999), capturable=True)
    with pytest.raises(ValueError, match=r"betas up to 0\.99999"):
        PinsAdamW([{"params": parameters, "betas": (0.9, 0.9999999)}], capturable=True)
    PinsAdamW(parameters, betas=(0.9, 0.9999999))


@pytest.mark.parametrize("beta", [1.0, -0.5])
def test_betas_that_are_none_are_refused_in_the_step(beta: float) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = PinsAdamW([parameter], lr=torch.tensor(1e-3), capturable=True)
    optimizer.param_groups[0]["betas"] = (0.9, beta)
    parameter.grad = torch.ones(2)
    with pytest.raises(ValueError, match=rf"betas up to 0\.99999.*got {beta}"):
        optimizer.step()
