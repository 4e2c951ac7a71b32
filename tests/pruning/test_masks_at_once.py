"""Training on the CPU, where masks are written while the cutoff is found, equals selecting first, to the bit."""

from __future__ import annotations

from typing import Any
from unittest.mock import PropertyMock, patch

import pytest
import torch
from torch import Tensor, nn

from pins_ext import PruneConfig, Pruner, ops
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.fused import FusedSlot
from pins_ext.pruning.selection import Selection

STEPS = 24


def trained(**settings: Any) -> tuple[list[Tensor], list[Any]]:
    """Weights, states and masks at the end, and what the masks told at every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 70), nn.Linear(70, 33))
    optimizer = PinsAdamW(model.parameters(), lr=1e-2)
    config = PruneConfig(**{"sparsity": 0.7, "warmup": 3, "cooldown": 5, "include": ["*.weight"], **settings})
    pruner, told = Pruner(model, optimizer, config, total_steps=STEPS), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(8, 40)).square().sum().backward()
        optimizer.step()
        told.append((pruner.masks.counts(), pruner.masks.cutoff.tolist()))
    pruner.finalize()
    states = [x for p in model.parameters() for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return [*model.parameters(), *states, *pruner.masks.bits], told


@pytest.mark.parametrize("delta_t", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mask_policy": "strict"},
        {"mask_optimizer_state": True},
        {"state_dtype": "bfloat16"},
        {"criterion": "fisher"},
        {"criterion": "moments"},
        {"criterion": "magnitude"},
        {"beta2": 0.0},
        {"beta2": 1.0},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::pins_ext.pruning.plan.ConflictWarning")
def test_the_bits_are_those_of_selecting_first(settings: dict[str, Any], delta_t: int) -> None:
    before = patch.object(FusedSlot, "one_pass", PropertyMock(return_value=False))
    with before, patch("pins_ext.ops.pack_lowest_", wraps=ops.pack_lowest_) as packed:
        tensors, told = trained(delta_t=delta_t, **settings)
    assert packed.called
    with patch.object(Selection, "packs", PropertyMock(return_value=False)):
        split, told_before = trained(delta_t=delta_t, **settings)
    assert told == told_before
    assert all(map(torch.equal, tensors, split))


@pytest.mark.parametrize("settings", [{"ties": "reference"}, {"scope": "layer"}, {"min_density": {"*": 0.1}}], ids=str)
def test_other_selections_go_first(settings: dict[str, Any]) -> None:
    with patch("pins_ext.ops.pack_lowest_", wraps=ops.pack_lowest_) as packed:
        trained(delta_t=4, **settings)
    assert not packed.called
