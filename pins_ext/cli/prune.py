"""`pins-ext prune`: one-shot pruning by calibration batches, into an ordinary checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pins_ext.pruning.config import TRAINING_ONLY, PruneConfig
from pins_ext.runs.command_line import PRUNING_PARSERS
from pins_ext.runs.errors import EXIT_OK, UsageError
from pins_ext.runs.options import Parser, normalised
from pins_ext.runs.request import RunOptions
from pins_ext.tasks.arguments import TaskArguments
from pins_ext.tasks.load import refuse_out_of_reach

_ABOUT = """Prunes a model in one shot: a few batches of the data score its weights, one exact selection sets the lowest
to zero, and an ordinary checkpoint is written. Nothing is trained; Pruner.from_sparse goes on from there. The model is
evaluated on held-out data before and after.

examples:
  pins-ext prune gpt2 --data mine.txt --criterion wanda --sparsity 0.5
  pins-ext prune runs/rte-dense --task glue/rte --sparsity 0.6 --batches 64
  pins-ext prune runs/mine-dense --data mine.csv --criterion fisher --scope layer --output-dir small
"""

EVALUATED = 256
"""Examples to evaluate on, where --max-eval-samples names no other number."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    given = vars(_parser().parse_args(normalised(argv)))
    source = given["model"]
    for name in ("batches", "batch_size"):
        if given.get(name, 1) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {given[name]}")
    if not 0 <= given.get("learning_rate", 0.0) < math.inf:
        raise UsageError(f"--learning-rate must not be negative, got {given['learning_rate']}")
    target = Path(given.get("output_dir", f"{Path(source).name}.pruned"))
    if target.resolve() == Path(source).resolve():
        raise UsageError(f"{target} is the model itself: choose another --output-dir")
    if target.exists() and "overwrite" not in given:
        raise UsageError(f"{target} exists: choose another --output-dir, or replace it with --overwrite")
    try:
        config = _of(PruneConfig, given)
        data = _of(TaskArguments, {"max_eval_samples": EVALUATED} | given)
        if data.task is None and data.train_file is None:
            raise UsageError("calibration data is needed: --data FILE, or a task with --task")
        refuse_out_of_reach(data)
    except ValueError as error:
        raise UsageError(str(error)) from error

    from pins_ext.runs.once import Calibration, prune_checkpoint
    from pins_ext.runs.terminal import console

    calibration = Calibration(
        batches=given.get("batches", 128),
        batch_size=given.get("batch_size", 8),
        seed=given.get("seed", 0),
        learning_rate=given.get("learning_rate", 0.0),
        validates="no_evaluation" not in given,
    )
    asked = RunOptions(model=source, dtype=given.get("dtype", "float32"))
    prune_checkpoint(asked, data, config, calibration, target, console())
    return EXIT_OK


def _of(cls: Any, given: Mapping[str, Any]) -> Any:
    """A dataclass from those of the flags that are its fields."""
    return cls(**{f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given})


def _parser() -> Parser:
    parser = Parser(prog="pins-ext prune", usage="pins-ext prune MODEL --data FILE [flags]", description=_ABOUT)
    parser.add_argument(
        "model", metavar="MODEL", help="hub name or folder of the model, with a head that fits the data"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="the folder to make (default: MODEL.pruned, here)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the output folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the parameters, on the disk too (float32)"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    batches = parser.add_argument_group("calibration")
    batches.add_argument("--data", dest="train_file", metavar="FILE", help="data of your own; the same as --train-file")
    batches.add_argument(
        "--batches", type=int, metavar="N", help="how many batches of the training data, at most (128)"
    )
    batches.add_argument("--batch-size", type=int, metavar="N", help="examples in each (8)")
    batches.add_argument("--seed", type=int, metavar="N", help="seed of what is drawn from the data (0)")
    batches.add_argument(
        "--learning-rate", type=float, metavar="X", help="of the step that pins looks ahead to; at 0 it is platon (0)"
    )
    parser.add_argument(
        "--no-evaluation", action="store_true", help="don't evaluate the model before and after on held-out examples"
    )
    parser.add_fields("data", TaskArguments, skip=("test_file",))
    parser.add_fields("pruning", PruneConfig, skip=("seed", *TRAINING_ONLY), parse=PRUNING_PARSERS)
    return parser
