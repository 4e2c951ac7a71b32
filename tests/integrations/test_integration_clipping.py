"""A Trainer with ClipInPass: gradients stay as they are, the norm is logged, weights are those of a stock Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bert import CONFIG, arguments, model, stock, weights
from transformers import Trainer, TrainerCallback

from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.clipping import ClipInPass
from pins_ext.integrations.optimizer import optimizer
from pins_ext.integrations.trainer import PinsTrainer

CLIP = {"max_grad_norm": 0.05, "save_strategy": "no", "logging_steps": 1}


class Norms(TrainerCallback):
    """Norm of the gradients that the optimizer is given, at each step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        self.seen.append(torch.nn.utils.get_total_norm(grads))


class Clipping(ClipInPass, Trainer):
    """What the documentation tells users to write."""


def run(folder: Path, kind: type[Trainer], fused: bool = True) -> Any:
    args = arguments(folder, **CLIP)
    options = {"optimizer_cls_and_kwargs": optimizer(args)} if fused else {}
    trainer = stock(model(), args, PinsCallback(CONFIG), kind=kind, **options)
    trainer.norms = Norms()
    trainer.add_callback(trainer.norms)
    trainer.train()
    return trainer


def test_it_trains_as_a_stock_trainer_without_writing_gradients(tmp_path: Path) -> None:
    ours, stocks = (run(tmp_path / kind.__name__, kind) for kind in (Clipping, Trainer))
    assert min(ours.norms.seen) > CLIP["max_grad_norm"] >= max(stocks.norms.seen) - 1e-6
    logged = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (ours, stocks)]
    torch.testing.assert_close(torch.tensor(logged[0]), torch.tensor(logged[1]), rtol=1e-3, atol=1e-5)
    # Norms differ by a rounding, and a weight at the cutoff may go the other way.
    theirs = weights(stocks)
    differ = torch.cat([((t - theirs[name]).abs() > 1e-3).flatten() for name, t in weights(ours).items()])
    assert differ.float().mean() < 0.01


def test_hooked_optimizers_are_clipped_by_the_trainer(tmp_path: Path) -> None:
    ours = run(tmp_path, Clipping, fused=False)
    assert max(ours.norms.seen) <= CLIP["max_grad_norm"] + 1e-6


def test_pins_trainer_clips_in_its_pass() -> None:
    assert issubclass(PinsTrainer, ClipInPass)
    assert PinsTrainer._clip_grad_norm is ClipInPass._clip_grad_norm
