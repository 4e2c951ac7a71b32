"""What `plan` prints: a published recipe with its schedule drawn, and self-regularization in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pins_ext.pruning.config import PruneConfig
from pins_ext.runs.errors import UsageError
from pins_ext.runs.request import Request
from pins_ext.tasks.load import task_name
from pins_ext.tasks.recipes import RECIPES, TRAINING_EXAMPLES, recipe_for

_DRAWN_POINTS, _DRAWN_WIDTH = 16, 50


def recipe_page(request: Request, pruning: PruneConfig) -> str:
    """The recipe's values, which of them were typed over, and the schedule over the published number of steps."""
    from pins_ext.pruning.schedule import Schedule

    task = task_name(request.task)
    name = request.run.recipe if isinstance(request.run.recipe, str) else cast(str, recipe_for(task))
    recipe = RECIPES[name]
    total, counted = _steps(request, task)
    try:
        schedule = Schedule.of(pruning, total)
    except ValueError as error:
        raise UsageError(str(error)) from error
    asked = {
        **vars(request.task),
        **vars(request.run),
        **vars(request.regularizer),
        **vars(pruning),
        **request.training,
    }
    own_length = bool({"max_steps", "num_train_epochs"} & request.given)
    values = [
        f"  {flag.replace('_', '-'):<28} {_value(asked[flag])}"
        + (f"  (typed; the recipe has {_value(value)})" if flag in request.given else "")
        for flag, value in recipe.flags(own_length).items()
    ]
    return "\n".join(
        [
            f"recipe    {name}: {recipe.source} on {recipe.task}, for {_model(recipe.source)}",
            f"training  {total:,} steps ({counted})",
            *(f"note      {note}" for note in request.notes),
            *values,
            "",
            f"schedule  {schedule.kind}: dense to step {schedule.initial_warmup:,}, "
            f"at the end from step {schedule.final_start:,}, a mask every {schedule.delta_t} steps between",
            *drawn([(t, 1 - schedule.remaining_ratio(t)) for t in _points(total)]),
        ]
    )


def _steps(request: Request, task: str) -> tuple[int, str]:
    """How many steps training would have, and how that was counted."""
    training = request.training
    if (asked := int(training.get("max_steps", 0))) > 0:
        return asked, "as --max-steps says" if "max_steps" in request.given else "as the recipe says"
    examples = TRAINING_EXAMPLES.get(task)
    if examples is None:
        raise UsageError(
            f"the size of {task}'s training set is not published here: give --max-steps, or data and model"
        )
    examples = min(examples, request.task.max_train_samples or examples)
    batches = math.ceil(examples / training["per_device_train_batch_size"])
    per_epoch = math.ceil(batches / training.get("gradient_accumulation_steps", 1))
    epochs = training["num_train_epochs"]
    counted = f"{epochs:g} epochs of {per_epoch:,}; {examples:,} training examples, the published size"
    return math.ceil(epochs * per_epoch), counted


def _points(total: int) -> list[int]:
    """Steps to draw, the first and the last among them."""
    return sorted({round(i * (total - 1) / _DRAWN_POINTS) for i in range(_DRAWN_POINTS + 1)})


def drawn(points: Sequence[tuple[int, float]]) -> list[str]:
    """A bar per point of the schedule: step, sparsity as a number and as a length."""
    width = max(len(f"{step:,}") for step, _ in points)
    return [f"  {t:>{width},}  {s:7.2%}  {'█' * round(s * _DRAWN_WIDTH)}".rstrip() for t, s in points]


def _model(source: str) -> str:
    return "the embedded MiniLM" if source == "pins_ext" else "BERT-base"


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def regularization_line(plan: Mapping[str, Any]) -> str:
    """The plan of a SelfRegularizer in words: which teacher, how it enters the loss, what it costs."""
    every = "step" if plan["every"] == 1 else f"{plan['every']} steps"
    when = {
        "latest": f"a snapshot every {every}",
        "best": "a snapshot at every best evaluation so far",
        "ema": f"a running average from step {plan['every']} on",
    }
    weight = plan["weight"] if isinstance(plan["weight"], str) else f"{plan['weight']:g}"
    scored = ["weights are scored by the task's gradient alone"] if plan["score_gradient"] == "task" else []
    size = sum(plan["memory"].values()) / 2**20
    parts = [f"teacher {plan['teacher']}", when.get(plan["teacher"], "fixed"), f"weight {weight}"]
    return ", ".join([*parts, f"temperature {plan['temperature']:g}", *scored, f"{size:,.1f} MiB"])
