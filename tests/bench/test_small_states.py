"""Bytes of set-ups: what is counted is there."""

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


@pytest.mark.parametrize("row", [row for row in SET_UPS if row.peer is None], ids=lambda row: row.name)
def test_what_is_counted_is_there(row: small_states.SetUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_states, "Sentence", Small)
    found = small_states.measure(row, "bert", 2)
    counted = found["counted_kinds"]
    # Neither the room of the selection, which comes and goes, nor an adapter's states.
    held = found["counted"] - counted["selection"] - (counted["gradients"] if row.release or row.frozen else 0)
    assert found["bytes"] == pytest.approx(held, rel=0.15)
    assert torch.get_default_dtype() == torch.float32


def test_goals_in_bytes_of_a_pruned_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_states, "Sentence", Small)
    goals = {
        "float32": 28.2,
        "bfloat16": 14.2,
        "8 bits": 9.5,
        "8 bits, released": 7.5,
        "fisher, 8-bit moments": 6.3,
        "fisher, 8-bit moments, released": 4.3,
        "frozen base, 8 bits": 5.4,
    }
    for row in SET_UPS:
        if row.name in goals:
            found = small_states.measure(row, "bert", 1)["per_weight"]
            assert goals[row.name] - 0.2 < found < goals[row.name], row.name
