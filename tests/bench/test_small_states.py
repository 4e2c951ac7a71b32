"""Bytes of a pruned weight in every set-up; that they are there is tests/pruning/test_memory.py's."""

from __future__ import annotations

import pytest
import torch
from models import Network, batches
from torch import Tensor, nn

from pins_ext.bench import small_states
from pins_ext.bench.small_states import SET_UPS


class Small(nn.Module):
    """As Sentence, of 20 thousand weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network(64)

    def loss(self) -> Tensor:
        x, y = next(batches(1))
        return nn.functional.cross_entropy(self.net(x.to(self.net.embed.weight.dtype)), y)


@pytest.mark.slow
def test_goals_in_bytes_of_a_pruned_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_states, "Sentence", Small)
    goals = {
        "float32": 28.13,
        "bfloat16": 14.13,
        "8 bits": 9.44,
        "8 bits, released": 7.44,
        "fisher, 8-bit moments": 6.25,
        "fisher, 8-bit moments, released": 4.25,
        "frozen base, bfloat16": 6.13,
        "frozen base, 8 bits": 4.25,
    }
    for row in SET_UPS:
        if row.name in goals:
            found = small_states.measure(row, "bert", 1)
            assert found["per_weight"] == pytest.approx(goals[row.name], abs=0.1), row.name
            assert found["step_ms"] > 0
    assert torch.get_default_dtype() == torch.float32
