"""Self-regularization in a Trainer: attached to the model, or in a compute_loss of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bert import CONFIG, arguments, assert_same, model, stock, weights
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.loss import SelfRegularizedLoss
from pins_ext.integrations.trainer import PinsTrainer
from pins_ext.regularization.self_regularizer import SelfRegularizer


class Seeing(Trainer):
    """Notes the loss of every batch."""

    seen: list[Tensor]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self.seen.append(loss.detach().clone())
        return (loss, outputs) if return_outputs else loss


class Subclassed(Seeing, SelfRegularizedLoss):
    """The same, self-regularized by the subclass."""


def gpt2() -> GPT2LMHeadModel:
    """A decoder, whose Trainer passes num_items_in_batch to the model."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("weight", ["adaptive", 0.7])
def test_both_ways_have_equal_losses_and_weights(tmp_path: Path, accumulation: int, weight: Any) -> None:
    runs = []
    for kind in (Seeing, Subclassed):
        net = model()
        regularizer = SelfRegularizer(net, every=2, weight=weight)
        args = arguments(
            tmp_path, max_steps=10, gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=5
        )
        run = stock(net, args, PinsCallback(CONFIG, regularizer), kind=kind)
        run.seen = []  # type: ignore[attr-defined]
        run.train()
        assert regularizer.teacher.snapshot_step == 10
        assert regularizer.stats()["divergence"] > 0
        assert len(run.seen) >= 10  # type: ignore[attr-defined]
        runs.append(run)
    attached, subclassed = runs
    assert [float(x) for x in attached.seen] == [float(x) for x in subclassed.seen]  # type: ignore[attr-defined]
    assert_same(weights(attached), weights(subclassed))
    evaluations = [[e["eval_loss"] for e in run.state.log_history if "eval_loss" in e] for run in runs]
    assert evaluations[0] == evaluations[1]


def test_the_parts_of_the_loss_are_logged_apart(tmp_path: Path) -> None:
    logs = []
    for every in (1, 5):
        net = model()
        callback = PinsCallback(CONFIG, SelfRegularizer(net, every=4, weight=0.7))
        run = stock(
            net,
            arguments(tmp_path / str(every), max_steps=10, gradient_accumulation_steps=1, logging_steps=every),
            callback,
        )
        run.train()
        logs.append([entry for entry in run.state.log_history if "loss" in entry])
    each, rare = logs
    assert [("pins/divergence" in entry) for entry in each] == [step > 4 for step in range(1, 11)]
    for entry in each:
        whole = entry["pins/task_loss"] + 0.7 * entry.get("pins/divergence", 0.0)
        assert entry["loss"] == pytest.approx(whole, abs=1e-4)  # the Trainer rounds what it logs
    assert rare[1]["pins/task_loss"] == pytest.approx(sum(entry["pins/task_loss"] for entry in each[5:]) / 5)
    assert rare[0]["pins/divergence"] == pytest.approx(each[4]["pins/divergence"])
    assert rare[1]["pins/teacher_weight"] == pytest.approx(0.7)


def test_the_loss_of_a_language_model_is_a_sum_over_the_items_of_the_step(tmp_path: Path) -> None:
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        net = gpt2().eval()
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        ids = [torch.randint(40, (8,), generator=torch.Generator().manual_seed(i)) for i in range(32)]
        rows = [
            {"input_ids": x, "labels": torch.where(torch.arange(8) < 2 + i % 6, x, -100)} for i, x in enumerate(ids)
        ]
        args = arguments(
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
        )
        callback = PinsCallback(None, SelfRegularizer(net, every=1, weight=1.0))
        run = SelfRegularizedLoss(net, args, train_dataset=rows, callbacks=[callback])
        run.train()
        found.append(weights(run))
    # Sums of halves round in another order than sums of wholes.
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_it_goes_with_pins_trainer(tmp_path: Path) -> None:
    class Both(SelfRegularizedLoss, PinsTrainer):
        pass

    runs = []
    for kind in (PinsTrainer, Both):
        net = model()
        run = stock(net, arguments(tmp_path), kind=kind, pins=PinsCallback(CONFIG, SelfRegularizer(net, every=3)))
        run.train()
        runs.append(run)
    assert_same(weights(runs[0]), weights(runs[1]))
    resumed_net = model()
    resumed = stock(
        resumed_net,
        arguments(tmp_path / "other"),
        kind=Both,
        pins=PinsCallback(CONFIG, SelfRegularizer(resumed_net, every=3)),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same(weights(resumed), weights(runs[0]))


def test_another_loss_is_not_silently_left_out(tmp_path: Path) -> None:
    net = model()
    callback = PinsCallback(None, SelfRegularizer(net, every=3))
    with pytest.raises(ValueError, match="switch label_smoothing_factor and compute_loss_func off"):
        stock(net, arguments(tmp_path, label_smoothing_factor=0.1), callback, kind=SelfRegularizedLoss).train()
