"""What a run shows while it trains: a live bar on a terminal, a line per log elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pins_ext.report import percent

_NOT_SHOWN = ("runtime", "per_second", "preparation_time", "sparsity")


class Watch(TrainerCallback):
    """Loss, sparsity and threshold as they are logged.

    Args:
        console: where to; a live bar is drawn only if it is a terminal. label: the run's name.
    """

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label = console, label
        self._progress: Progress | None = None
        self._seen: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[seen]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console)
            self._progress.add_task(self.label, total=state.max_steps, completed=state.global_step, seen="")
            self._progress.start()

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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The bar stays as it is."""
        self.close()

    def close(self) -> None:
        """Leave the terminal in order, whichever way training ended."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe(logs: dict[str, Any], brief: bool = False) -> str:
    """One line of what was logged: loss, sparsity of the last mask, threshold, evaluation (in brief: its score)."""
    parts = []
    if "loss" in logs:
        parts.append(f"loss {float(logs['loss']):.3f}")
    if "sparsity" in logs:
        parts.append(f"sparsity {percent(logs.get('mask_sparsity', logs['sparsity']))}")
    if logs.get("threshold") is not None:
        parts.append(f"threshold {logs['threshold']:.2e}")
    scores = [
        f"{name.replace('_', ' ')} {value:.3f}"
        for name, value in logs.items()
        if name.startswith(("eval_", "test_")) and not name.endswith(_NOT_SHOWN)
    ]
    if brief:
        return "  ".join(parts + [score.removeprefix("eval ") for score in scores if "loss" not in score][:1])
    parts += scores
    if "eval_sparsity" in logs and "sparsity" not in logs:
        parts.append(f"at sparsity {percent(logs['eval_sparsity'])}")
    return "  ".join(parts)
