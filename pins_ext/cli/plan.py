"""`pins-ext plan`: what `train` would do with the same flags, without doing it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pins_ext.pruning.config import PruneConfig
from pins_ext.runs import request as requests
from pins_ext.runs.errors import EXIT_OK, UsageError
from pins_ext.tasks.load import task_name
from pins_ext.tasks.recipes import RECIPES, TRAINING_EXAMPLES, recipe_for

_ABOUT = """Says what train would do with the same flags: data, prunable tensors, memory, the schedule, conflicts.
Loads data and model, trains nothing, writes nothing.

With --model and no data, it reads the model's config.json alone, whatever its size: what would be pruned, bytes on each
rank, what fits on which GPU.

With --recipe and neither --model nor data, it shows the recipe and draws its schedule, and loads nothing: the number of
steps then comes from the published size of the training set."""

_EXAMPLES = """examples:
  pins-ext plan --task glue/rte --model bert-base-uncased --recipe
  pins-ext plan --recipe platon-mnli
  pins-ext plan --model meta-llama/Meta-Llama-3-8B --dtype bfloat16 --state-dtype bfloat16 --teacher none --ranks 8
  pins-ext plan --train-file mine.csv --sparsity 0.9 --exclude '*.layer.0.*'"""

_WITHOUT = ("compare", "output_dir", "overwrite", "resume", "resume_from_checkpoint", "label")
"""Flags of train that have no meaning here: they say what becomes of a result."""

_DRAWN_POINTS, _DRAWN_WIDTH = 16, 50


def main(argv: Sequence[str]) -> int:
    """Run the command; 2 when train would refuse."""
    parser = requests.parser("pins-ext plan", _ABOUT, _EXAMPLES, _WITHOUT)
    group = parser.add_argument_group("a model without data")
    group.add_argument("--ranks", type=int, metavar="N", help="processes, each with a GPU of its own [1]")
    group.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="copies of the model that the ranks hold together: 1 is FSDP, as many as ranks DDP, between them HSDP [1]",
    )
    asked = vars(parser.parse_known_args(argv)[0])
    if "help" in asked or "help_all" in asked:
        print(requests.help_text(parser, everything="help_all" in asked))
        return EXIT_OK
    request = requests.parse(parser, argv)
    if request.pruning is None:
        raise UsageError("nothing to plan: the sparsity is 0")
    data = {"task", "data_dir", "train_file", "recipe"} & request.given
    if "model" in request.given and not data:
        from pins_ext.runs.model_plan import model_plan

        split = vars(parser.parse_known_args(request.tokens)[0])
        print(model_plan(request, request.pruning, split.get("ranks", 1), split.get("replicas", 1)))
        return EXIT_OK
    if several := {"ranks", "replicas"} & request.given:
        raise UsageError(f"--{min(several)} is about a model without data: give --model alone")
    if request.run.recipe and not {"model", "data_dir", "train_file"} & request.given:
        print(_recipe_page(request, request.pruning))
    else:
        _plan(request, request.pruning)
    return EXIT_OK


def _plan(request: requests.Request, pruning: PruneConfig) -> None:
    """Load data and model, and print what would be done with them."""
    from torch import nn

    from pins_ext.pruning.pruner import Pruner
    from pins_ext.runs.prepare import as_usage_errors, prepare
    from pins_ext.runs.start import training_line

    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(request, Path(folder))
        trainer = prepared.trainer
        with as_usage_errors():
            pruner = Pruner(cast(nn.Module, trainer.model), trainer.create_optimizer(), pruning, prepared.total_steps)
    print(prepared.task.describe())
    print(f"\nmodel     {prepared.model_name}")
    print(f"training  {training_line(prepared)}")
    for note in prepared.notes:
        if note not in prepared.task.notes:
            print(f"note      {note}")
    print(f"\n{pruner.plan()}")
    if prepared.pins.self_regularizer is not None:
        prepared.pins.self_regularizer.set_total_steps(prepared.total_steps)
        print(f"self-regularization: {regularization_line(prepared.pins.self_regularizer.plan())}")


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


def _recipe_page(request: requests.Request, pruning: PruneConfig) -> str:
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
            *([f"note      {request.recipe_note}"] if request.recipe_note else []),
            *(f"note      {line}" for line in request.recipe_choices),
            *values,
            "",
            f"schedule  {schedule.kind}: dense to step {schedule.initial_warmup:,}, "
            f"at the end from step {schedule.final_start:,}, a mask every {schedule.delta_t} steps between",
            *drawn([(t, 1 - schedule.remaining_ratio(t)) for t in _points(total)]),
        ]
    )


def _steps(request: requests.Request, task: str) -> tuple[int, str]:
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
