"""What a run shows on a terminal and in a log while it evaluates."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from pins_ext.runs import progress
from pins_ext.runs.progress import Watch


def shown(terminal: bool, batches: int, in_training: bool) -> str:
    """What stands on a terminal, or in a file, after an evaluation of ten batches has come so far."""
    out = io.StringIO()
    watch = Watch(Console(file=out, force_terminal=terminal, width=100), "mine")
    given: tuple[Any, ...] = (TrainingArguments("unused"), TrainerState(max_steps=5), TrainerControl())
    if in_training:
        watch.on_train_begin(*given)
    for _ in range(batches):
        watch.on_prediction_step(*given, eval_dataloader=range(10))
    if batches == 10:
        watch.on_evaluate(*given)
        assert watch._evaluating is None
    watch.close()
    return out.getvalue()


@pytest.mark.parametrize("in_training", [True, False])
def test_an_evaluation_has_a_bar_of_its_own(in_training: bool) -> None:
    text = shown(True, 7, in_training)
    assert "evaluating" in text
    assert "7/10" in text
    assert ("mine" in text) == in_training


@pytest.mark.parametrize("in_training", [True, False])
def test_the_bar_goes_when_the_evaluation_ends(in_training: bool) -> None:
    assert "evaluating" not in shown(True, 10, in_training).splitlines()[-1]


def test_a_long_evaluation_writes_lines_into_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "evaluating" not in shown(False, 3, in_training=True)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert "mine  evaluating  3/10 batches" in shown(False, 3, in_training=True)
