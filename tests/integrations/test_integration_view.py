"""Evaluations between two masks see the masked model, in a stock Trainer and in PinsTrainer; weights do not change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bert import CONFIG, EVALUATED, WITHOUT_DROPOUT, Looks, arguments, assert_same, model, pins, stock, weights
from transformers import Trainer

from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.evaluation import score_of
from pins_ext.integrations.trainer import PinsTrainer


def run(folder: Path, kind: type[Trainer], **changes: Any) -> tuple[Any, Looks]:
    # Without dropout: a stock Trainer lets evaluations draw from the random numbers of training.
    net, looks, callback = model(**WITHOUT_DROPOUT), Looks(), PinsCallback(CONFIG)
    object.__setattr__(net, "pins", callback)
    args = arguments(folder, **(EVALUATED | changes))
    if kind is PinsTrainer:
        trainer: Any = stock(net, args, looks, kind=kind, pins=callback)
    else:
        trainer = stock(net, args, callback, looks)
    trainer.train()
    return trainer, looks


@pytest.mark.parametrize("kind", [Trainer, PinsTrainer])
def test_evaluations_see_the_mask_and_training_does_not(tmp_path: Path, kind: type[Trainer]) -> None:
    evaluated, looks = run(tmp_path / "a", kind)
    assert min(share for share in looks.during if share >= 0) > 0.05
    assert not any(looks.after)
    history = evaluated.state.log_history
    logged = [e["eval_pins/zeros"] for e in history if "eval_pins/zeros" in e]
    assert logged[-4:] == pytest.approx([0.75] * 4, abs=1e-3)
    # A view is not the target: between masks a checkpoint would hold a dense model.
    callback = pins(evaluated)
    assert callback.final is not None
    dense, _ = run(tmp_path / "b", kind, eval_strategy="no")
    assert_same(weights(evaluated), weights(dense))


def test_a_view_is_not_the_target(tmp_path: Path) -> None:
    """At the final sparsity, but between two masks, so that what would be saved is not."""
    trainer, _ = run(tmp_path, Trainer, max_steps=6)
    callback = pins(trainer)
    assert callback.pruner is not None
    callback.at_target = True
    masks = callback.pruner.masks
    masks.applied, masks.in_view = False, True
    trainer.state.log_history.append({})
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics={})
    assert callback.at_target is False


def test_the_best_teacher_follows_the_tasks_metric(tmp_path: Path) -> None:
    args, found = arguments(tmp_path), {"eval_accuracy": 0.5, "eval_loss": 2.0, "eval_matthews": 0.25}
    assert score_of(args, found, ("matthews", True)) == 0.25
    assert score_of(args, found, ("perplexity", False)) is None
    assert score_of(args, found, None) == 0.5
    chosen = copy.copy(args)
    chosen.metric_for_best_model, chosen.greater_is_better = "loss", False
    assert score_of(chosen, found, ("matthews", True)) == -2.0
    assert torch.tensor(score_of(args, {"eval_loss": 2.0}, None)) == -2.0
