"""What finalize calls done was counted, and what a user would not expect is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, exact, start, train

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.plan import ConflictWarning


def test_parameters_that_come_to_share_memory_are_not_called_pruned() -> None:
    model, optimizer, pruner = start()
    train(model, optimizer, 50)
    one, other = (model.layers[i].attention["self"].weight for i in (0, 1))
    other.data = one.data
    with pytest.raises(RuntimeError, match=r"layers\.1\.attention\.self\.weight has come to share memory with layers"):
        pruner.finalize()


def test_a_mask_is_frozen_only_when_there_is_one() -> None:
    model, optimizer, pruner = start()
    train(model, optimizer, 2)
    with pytest.raises(RuntimeError, match="no mask has been chosen yet"):
        pruner.freeze()
    train(model, optimizer, STEPS, skip=2)
    assert pruner.finalize()["zeros"] == exact(pruner)


def test_a_mask_frozen_on_the_way_is_reported_as_what_it_is() -> None:
    model, optimizer, pruner = start()
    train(model, optimizer, 22)
    pruner.freeze()
    train(model, optimizer, STEPS, skip=22)
    with pytest.warns(UserWarning, match=r"frozen at a sparsity of .*, before the schedule's 80\.0%"):
        report = pruner.finalize()
    assert report["zeros"] < exact(pruner)
    assert report["final_sparsity"] == report["zeros"] / report["weights"]


def test_a_jump_to_the_final_sparsity_is_said_with_its_numbers() -> None:
    model = Network(16, classes=16)
    optimizer = PinsAdamW(model.parameters(), lr=1e-3)
    pruner = Pruner(model, optimizer, CONFIG, total_steps=10_000)
    train(model, optimizer, 50)
    with pytest.warns(UserWarning, match=r"jumped from .* to 80\.0% after 50 of 10,000 steps.*accumulated") as said:
        assert pruner.finalize()["zeros"] == exact(pruner)
    assert said[0].filename == __file__


def test_a_run_that_went_as_planned_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, pruner = start()
        train(model, optimizer, STEPS)
        pruner.finalize()
        pruner.finalize()
        pruner.detach()
        Pruner.from_sparse(model, optimizer).finalize()


def test_conflicts_are_said_when_the_pruner_is_made() -> None:
    model = Network()
    optimizer = PinsAdamW(model.parameters(), lr=1e-3)
    with pytest.warns(ConflictWarning, match="no mask falls between warm-up and cool-down") as said:
        pruner = Pruner(model, optimizer, PruneConfig(sparsity=0.8), total_steps=3)
    assert [str(warning.message) for warning in said] == pruner.plan()["conflicts"]
    assert said[0].filename == __file__


def test_a_tensor_without_weights_is_named() -> None:
    model = Network(16, classes=16)
    with torch.no_grad():
        model.layers[0].attention["self"].weight.mul_(1e-6)
    optimizer = PinsAdamW(model.parameters(), lr=0.0)
    pruner = Pruner(model, optimizer, PruneConfig(criterion="magnitude", warmup=5, cooldown=20), STEPS)
    train(model, optimizer, STEPS)
    with pytest.warns(UserWarning, match=r"layers\.0\.attention\.self\.weight lost all weights: min_density"):
        pruner.finalize()


def test_a_pruner_says_what_it_is() -> None:
    model, optimizer, pruner = start()
    train(model, optimizer, 3)
    assert repr(pruner) == "Pruner(pins, 3,072 weights in 8 tensors, step 3 of 60, sparsity to reach 0.8)"


@pytest.mark.parametrize("inner", [False, True])
def test_names_are_those_of_the_model_before_it_was_compiled(inner: bool) -> None:
    names = start()[2].names
    model: Any = Network(16, classes=16)
    if inner:
        model.layers[0] = torch.compile(model.layers[0])
    else:
        model = torch.compile(model)
    config = PruneConfig(include=("layers.*.weight",), exclude=("*.norm.*",))
    pruner = Pruner(model, PinsAdamW(model.parameters(), lr=1e-3), config, STEPS)
    assert pruner.names == names
    pruner.detach()
    pruner = Pruner(model, PinsAdamW(model.parameters(), lr=1e-3), CONFIG, STEPS)
    assert pruner.names == names
    pruner.verify()
