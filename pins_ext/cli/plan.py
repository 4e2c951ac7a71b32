"""`pins-ext plan`: what `train` would do with the same flags, without doing it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from pins_ext.runs import command_line
from pins_ext.runs.errors import EXIT_OK, UsageError
from pins_ext.runs.plan_page import recipe_page, regularization_line
from pins_ext.runs.request import Request

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


def main(argv: Sequence[str]) -> int:
    """Run the command; 2 when train would refuse."""
    parser = command_line.parser("pins-ext plan", _ABOUT, _EXAMPLES, _WITHOUT)
    group = parser.add_argument_group("a model without data")
    group.add_argument("--ranks", type=int, metavar="N", help="processes, each with a GPU of its own [1]")
    group.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="copies of the model that the ranks hold together: 1 is FSDP, as many as ranks DDP, between them HSDP [1]",
    )
    group.add_argument(
        "--frozen-base", action="store_true", help="the model does not learn, adapters do; --lora counts those, too"
    )
    asked = vars(parser.parse_known_args(argv)[0])
    if "help" in asked or "help_all" in asked:
        print(command_line.help_text(parser, everything="help_all" in asked))
        return EXIT_OK
    request = command_line.parse(parser, argv)
    if request.pruning is None:
        raise UsageError("nothing to plan: the sparsity is 0")
    data = {"task", "data_dir", "train_file", "recipe"} & request.given
    if "model" in request.given and not data:
        from pins_ext.runs.model_plan import model_plan

        split = vars(parser.parse_known_args(request.tokens)[0])
        sizes = (
            split.get("ranks", 1),
            split.get("replicas", 1),
            "frozen_base" in split or request.adapters.lora is not None,
        )
        print(model_plan(request, request.pruning, *sizes))
        return EXIT_OK
    if several := {"ranks", "replicas", "frozen_base"} & request.given:
        flag = min(several).replace("_", "-")
        raise UsageError(f"--{flag} is about a model without data: give --model alone")
    if request.run.recipe and not {"model", "data_dir", "train_file"} & request.given:
        print(recipe_page(request, request.pruning))
    else:
        _plan(request)
    return EXIT_OK


def _plan(request: Request) -> None:
    """Load data and model, and print what would be done with them."""
    from torch import nn

    from pins_ext.runs.prepare import as_usage_errors, prepare
    from pins_ext.runs.start import training_line

    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(request, Path(folder))
        trainer = prepared.trainer
        with as_usage_errors():
            pruner = prepared.pins.new_pruner(
                cast(nn.Module, trainer.model), trainer.create_optimizer(), prepared.total_steps
            )
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
