"""What hooks of a tensor call does not live on by them."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW


def released() -> list[Any]:
    model = nn.Linear(8, 8, bias=False)
    optimizer = PinsAdamW(model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(include=("*",), delta_t=2), 10)
    optimizer.release_gradients()
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return [weakref.ref(each) for each in (model, optimizer, pruner)]


def over_a_frozen_base() -> list[Any]:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    config = PruneConfig(include=("0.weight",), delta_t=2, criterion="platon")
    pruner = Pruner(model, optimizer, config, 10, frozen_base=True)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return [weakref.ref(each) for each in (model, optimizer, pruner)]


@pytest.mark.parametrize("train", [released, over_a_frozen_base])
def test_what_nobody_holds_goes(train: Callable[[], list[Any]]) -> None:
    references = train()
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


@pytest.mark.parametrize("kind", [PinsAdamW, torch.optim.AdamW])
def test_a_pruner_is_not_pickled(kind: Any) -> None:
    model = nn.Linear(8, 8, bias=False)
    optimizer = kind(model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(include=("*",)), 100)
    with pytest.raises(TypeError, match=r"can't be pickled.*state_dict\(\)"):
        pickle.dumps(pruner)
    with pytest.raises(TypeError, match=r"can't be pickled"):
        pickle.dumps((model, optimizer, pruner))
