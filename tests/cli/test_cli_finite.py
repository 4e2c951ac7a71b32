"""A run stops at the first number that is not finite, and keeps its last finite checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import assert_same, flags
from transformers import Trainer

from pins_ext.cli.main import main
from pins_ext.files.atomic import newest_complete
from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.finite import FiniteWatch, check_weights
from pins_ext.optim.step import NonFiniteError

Harm = Callable[[Trainer, torch.Tensor], torch.Tensor]


def _loss(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


def _gradient(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
    list(trainer.model.parameters())[-1].grad.fill_(math.inf)  # type: ignore[union-attr]
    return loss


@torch.no_grad()
def _weight(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
    # The vector of a word that no text has: neither loss nor gradient knows.
    trainer.model.bert.embeddings.position_embeddings.weight[-1] = math.nan  # type: ignore[union-attr]
    return loss


@pytest.mark.parametrize(
    ("harm", "said", "newest"),
    [
        (_loss, "the loss was nan at step 8", 6),
        (_gradient, "the gradient norm was inf at step 8", 6),
        (_weight, "position_embeddings.weight held NaN or infinite weights after step 9", 6),
    ],
)
def test_training_stops_and_keeps_what_is_finite(
    tiny: Path, tmp_path: Path, unbroken: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    harm: Harm, said: str, newest: int,
) -> None:  # fmt: skip
    step = Trainer.training_step

    def harmed(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        return harm(self, loss) if self.state.global_step == 7 else loss

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", harmed)
        assert main(["train", *flags(tiny, output, "--save-total-limit", "1")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    work = tmp_path / "run.unfinished"
    assert newest_complete(work)[0] == work / f"checkpoint-{newest}"
    assert str(work / f"checkpoint-{newest}") in error
    assert not output.exists()
    assert main(["train", "--output-dir", str(output), "--resume"]) == 0
    assert_same(output, unbroken)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--release-gradients", "--max-grad-norm", "0"), "has diverged: a gradient is not finite"),
        pytest.param(
            ("--lora", "2", "--criterion", "platon"),
            "has diverged: a gradient of the frozen base is not finite",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients_that_are_used_inside_backward_are_looked_at_too(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    asked: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    new = PinsCallback.new_pruner
    came: list[int] = []

    def bad(gradient: torch.Tensor) -> torch.Tensor:
        came.append(1)
        return gradient * math.inf if len(came) == 8 else gradient

    def harmed(self: PinsCallback, *args: Any) -> Any:
        pruner = new(self, *args)
        pruner.parameters[3].register_hook(bad)
        return pruner

    with monkeypatch.context() as patch:
        patch.setattr(PinsCallback, "new_pruner", harmed)
        assert main(["train", *flags(tiny, tmp_path / "run", *asked, "--teacher", "none")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert f"{tmp_path / 'run.unfinished' / 'checkpoint-6'} is the last checkpoint, and finite" in error
    assert "RuntimeError" not in error
    if "--lora" not in asked:
        assert main(["train", "--output-dir", str(tmp_path / "run"), "--resume"]) == 0
        assert main(["train", *flags(tiny, tmp_path / "whole", *asked, "--teacher", "none")]) == 0
        assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_gpu_s_numbers_are_read_one_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the numbers were a GPU's: none is read in its own step, and all before something is saved."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    def number(x: float) -> torch.Tensor:
        return torch.tensor(x).as_subclass(OnGpu)

    watch = FiniteWatch()
    watch.look("loss", 1, number(math.nan))
    watch.look("gradient norm", 1, number(math.nan))
    with pytest.raises(NonFiniteError, match="the loss was nan at step 1"):
        watch.look("loss", 2, number(0.0))
    watch = FiniteWatch()
    watch.look("loss", 1, number(1.0))
    watch.look("loss", 2, number(math.inf))
    with pytest.raises(NonFiniteError, match="the loss was inf at step 2"):
        watch.settle()
    watch.settle()


def test_every_odd_parameter_is_counted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    check_weights(model, 1)
    with torch.no_grad():
        model[0].bias[0], model[1].weight[0, 0] = math.nan, -math.inf
    with pytest.raises(NonFiniteError, match=r"0\.bias and 1 other parameters"):
        check_weights(model, 3)
