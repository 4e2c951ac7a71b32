"""`pins-ext plan`: what `train` would do with the same flags, without doing it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from pins_ext.commands import request as requests
from pins_ext.commands.errors import EXIT_OK, UsageError

_ABOUT = """Says what train would do with the same flags: data, prunable tensors, memory, the schedule, conflicts.
Loads data and model, trains nothing, writes nothing."""

_EXAMPLES = """examples:
  pins-ext plan --task glue/rte --model bert-base-uncased --recipe
  pins-ext plan --train-file mine.csv --sparsity 0.9 --exclude '*.layer.0.*'"""


def main(argv: Sequence[str]) -> int:
    """Run the command; 2 when train would refuse."""
    parser = requests.parser("pins-ext plan", _ABOUT, _EXAMPLES)
    asked = vars(parser.parse_known_args(argv)[0])
    if "help" in asked or "help_all" in asked:
        print(requests.help_text(parser, everything="help_all" in asked))
        return EXIT_OK
    request = requests.parse(parser, argv)
    if request.pruning is None:
        raise UsageError("nothing to plan: the sparsity is 0")

    from torch import nn

    from pins_ext.commands.prepare import as_usage_errors, prepare
    from pins_ext.pruner import Pruner

    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(replace(request, resume=None), Path(folder))
        trainer = prepared.trainer
        with as_usage_errors():
            pruner = Pruner(
                cast(nn.Module, trainer.model), trainer.create_optimizer(), request.pruning, prepared.total_steps
            )
    print(prepared.task.describe())
    print(f"\nmodel     {prepared.model_name}")
    batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    print(f"training  {prepared.total_steps:,} steps of {batch}, learning rate {trainer.args.learning_rate:g}")
    for note in prepared.notes:
        print(f"note      {note}")
    plan = pruner.plan()
    print(f"\n{plan}")
    if prepared.pins.self_regularizer is not None:
        prepared.pins.self_regularizer.set_total_steps(prepared.total_steps)
        described = ", ".join(f"{name} {value}" for name, value in prepared.pins.self_regularizer.plan().items())
        print(f"self-regularization: {described}")
    return EXIT_OK
