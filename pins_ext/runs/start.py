"""What a run says before its first step: on what it trains, what it prunes, and what a reader of it should know."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pins_ext.runs.html import percent
from pins_ext.runs.prepare import Prepared


class SayWhatStarts(TrainerCallback):
    """Prints a few lines when training begins; conflicts of the plan become notes of the run.

    It comes after the callback that prunes, whose pruner exists from the start of training on.

    Args:
        prepared: the run.
        console: where to.
        said: notes that an earlier run has printed already.
    """

    def __init__(self, prepared: Prepared, console: Console, said: tuple[str, ...] = ()) -> None:
        self.prepared, self.console, self.said = prepared, console, said

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Everything is attached: say it."""
        pruner = self.prepared.pins.pruner
        pruning = "nothing: a dense run"
        if pruner is not None:
            plan = pruner.plan()
            self.prepared.notes += [f"conflict: {text}" for text in plan["conflicts"]]
            start = percent(plan["start_sparsity"]) if plan["start_sparsity"] else "dense"
            pruning = (
                f"{plan['weights']:,} of {plan['model_weights']:,} weights, {len(plan['tensors'])} tensors; "
                f"{start} to step {plan['warmup']:,}, {percent(plan['final_sparsity'])} from step "
                f"{plan['final_start']:,}"
            )
        lines = [f"training  {training_line(self.prepared)}", f"pruning   {pruning}"]
        lines += [f"note      {note}" for note in self.prepared.notes if note not in self.said]
        self.console.print("\n".join(lines), soft_wrap=True, markup=False)


def training_line(prepared: Prepared) -> str:
    """Steps, what a step holds, learning rate, and how many examples there are."""
    args, sizes = prepared.trainer.args, prepared.task.sizes()
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    processes = f" in {args.world_size} processes" if args.world_size > 1 else ""
    return (
        f"{prepared.total_steps:,} steps of {batch} of {sizes['train']:,} examples, "
        f"learning rate {args.learning_rate:g}{processes}; validated on {sizes['validation']:,}"
    )
