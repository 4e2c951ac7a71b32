"""What a run shows while it trains and evaluates: live bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pins_ext.integrations.logs import EVALUATED_ZEROS, plain
from pins_ext.runs.html import percent

_SECONDS_BETWEEN_LINES = 30.0
"""Between the lines that a long evaluation writes where there is no terminal."""

_NOT_SHOWN = ("runtime", "per_second", "preparation_time", EVALUATED_ZEROS)


class Watch(TrainerCallback):
    """Loss, sparsity and threshold as they are logged.

    Args:
        console: where to; a live bar is drawn only if it is a terminal.
        label: the run's name.
    """

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label = console, label
        self._progress: Progress | None = None
        self._seen: dict[str, Any] = {}
        self._evaluating: tuple[Progress, TaskID] | None = None
        self._batches, self._said = 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar."""
        if self.console.is_terminal:
            self._progress = self._bars()
            self._progress.add_task(self.label, total=state.max_steps, completed=state.global_step, seen="")

    def _bars(self, transient: bool = False) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[seen]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        bars = Progress(*columns, console=self.console, transient=transient)
        bars.start()
        return bars

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show what is new."""
        if not logs or "train_runtime" in logs:
            return
        self._seen.update(logs)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], seen=describe(self._seen, brief=True))
        else:
            step = f"{state.global_step:>5}/{state.max_steps}"
            self.console.print(f"{self.label}  step {step}  {describe(logs)}", soft_wrap=True)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Move the bar of an evaluation: under the training's, or alone when that has ended."""
        total = len(eval_dataloader) if eval_dataloader is not None else None
        if self._batches == 0:
            self._said = time.monotonic()
        self._batches += 1
        if self.console.is_terminal:
            if self._evaluating is None:
                bars = self._progress or self._bars(transient=True)
                self._evaluating = bars, bars.add_task("evaluating", total=total, seen="")
            bars, evaluation = self._evaluating
            bars.update(evaluation, completed=self._batches)
        elif time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self.console.print(f"{self.label}  evaluating  {self._batches}/{total or '?'} batches", soft_wrap=True)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the evaluation's bar away."""
        self._batches = 0
        if self._evaluating is not None:
            bars, evaluation = self._evaluating
            bars.remove_task(evaluation)
            if bars is not self._progress:
                bars.stop()
            self._evaluating = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The bar stays as it is."""
        self.close()

    def close(self) -> None:
        """Leave the terminal in order, whichever way training or evaluation ended."""
        if self._evaluating is not None:
            self._evaluating[0].stop()
            self._evaluating = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe(logs: dict[str, Any], brief: bool = False) -> str:
    """One line of what was logged: loss, share the last mask pruned, threshold, evaluation (in brief: its score)."""
    parts = []
    if "loss" in logs:
        parts.append(f"loss {float(logs['loss']):.3f}")
    pruning = plain(logs)
    if "sparsity" in pruning:
        parts.append(f"mask {percent(pruning['sparsity'])}")
    if pruning.get("threshold") is not None:
        parts.append(f"threshold {pruning['threshold']:.2e}")
    scores = [
        f"{name.replace('_', ' ')} {value:.3f}"
        for name, value in logs.items()
        if name.startswith(("eval_", "test_")) and not name.endswith(_NOT_SHOWN)
    ]
    if brief:
        return "  ".join(parts + [score.removeprefix("eval ") for score in scores if "loss" not in score][:1])
    parts += scores
    if EVALUATED_ZEROS in logs and "sparsity" not in pruning:
        parts.append(f"with {percent(logs[EVALUATED_ZEROS])} zeros")
    return "  ".join(parts)
