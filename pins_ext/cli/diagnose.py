"""`pins-ext diagnose`: train as `train` does, and measure how well first order predicts what pruning does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pins_ext.runs import command_line
from pins_ext.runs.errors import EXIT_OK, CommandError, UsageError
from pins_ext.studies.diagnosis.options import DiagnosisOptions

if TYPE_CHECKING:
    from rich.console import Console

    from pins_ext.runs.request import Request

_ABOUT = """Trains with the flags of train and looks at masks on the way, in the moment before each is applied. On fixed
batches of training data, without dropout, it compares what a first-order model of the loss predicts with what the loss
really does: for the weights that a mask newly prunes, for all it prunes, for the step and the mask together,
and for as many weights drawn at random. At one of the masks it exchanges groups of kept and pruned weights, to see how
far the choice is from the best of small changes. Training itself runs as without, to the last bit; no model is saved.

Writes diagnosis.md, diagnosis.json (every number), diagnosis.csv (every change) and diagnosis.svg."""

_EXAMPLES = """examples:
  pins-ext diagnose --max-steps 60                            the embedded task and model
  pins-ext diagnose --task glue/rte --model bert-base-uncased --recipe --loss-batches 8
  pins-ext diagnose --max-steps 100 --delta-t 5 --masks 20 --exchange-masks 0"""

_WITHOUT = (
    "compare", "resume", "resume_from_checkpoint", "label", "early_stopping", "pattern", "from_sparse",
    "release_gradients", "release_norm", "release_clip", "lora", "lora_alpha", "lora_targets",
)  # fmt: skip
"""Flags of train that have no meaning here: a diagnosis looks at one run to its end, in one go, exchanges single
weights, which a pattern or a sparse start forbids, and reads the gradients of a step, which a frozen base frees."""

_HELP = {
    "output_dir": "folder of the diagnosis [runs/TASK-diagnosis]",
    "overwrite": "write into an output folder that is not empty",
}


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_line.parser("pins-ext diagnose", _ABOUT, _EXAMPLES, _WITHOUT)
    parser.add_fields("diagnosis", DiagnosisOptions)
    parser.retell(_HELP)
    asked = vars(parser.parse_known_args(argv)[0])
    if "help" in asked or "help_all" in asked:
        print(command_line.help_text(parser, everything="help_all" in asked))
        return EXIT_OK
    request = _checked(command_line.parse(parser, argv))
    given = vars(parser.parse_known_args(request.tokens)[0])
    names = {each.name for each in dataclasses.fields(DiagnosisOptions)}
    try:
        options = DiagnosisOptions(**{name: value for name, value in given.items() if name in names})
    except ValueError as error:
        raise UsageError(str(error)) from error
    folder = Path(request.run.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not request.overwrite:
        raise UsageError(f"{folder} is not empty: choose another --output-dir, or --overwrite its diagnosis")

    from pins_ext.runs.terminal import console

    _diagnose(request, options, folder, console())
    return EXIT_OK


def _checked(request: Request) -> Request:
    """Refuse what a diagnosis can't do; leave out what it doesn't need: evaluations and checkpoints."""
    if request.pruning is None:
        raise UsageError("nothing to diagnose: the sparsity is 0")
    if request.training.get("fp16") or request.run.dtype == "float16":
        raise UsageError("gradients in float16 vanish without a scaler: diagnose in float32 or --bf16")
    light = {} if request.needs_evaluations else {"eval_strategy": "no", "save_strategy": "no"}
    run = request.run
    if "output_dir" not in request.given:
        run = replace(run, output_dir=f"{run.output_dir}-diagnosis")
    own = {name: value for name, value in light.items() if name not in request.given}
    return replace(request, run=run, training={**request.training, **own})


def _diagnose(request: Request, options: DiagnosisOptions, folder: Path, console: Console) -> None:
    import tempfile
    import time

    from pins_ext.runs.prepare import as_usage_errors, prepare
    from pins_ext.runs.progress import Watch
    from pins_ext.runs.start import SayWhatStarts
    from pins_ext.studies.diagnosis.document import document, write
    from pins_ext.studies.diagnosis.summary import print_summary
    from pins_ext.studies.diagnosis.training import DiagnoseCallback

    watch = Watch(console, request.label)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as checkpoints:
        prepared = prepare(request, Path(checkpoints), callbacks=(watch,))
        with as_usage_errors():
            callback = DiagnoseCallback(prepared, options, console)
        prepared.trainer.add_callback(SayWhatStarts(prepared, console))
        prepared.trainer.add_callback(callback)
        console.print(
            f"{request.label} on {prepared.task.name}, {prepared.total_steps} steps; the loss is measured on "
            f"{callback.examples} training examples",
            soft_wrap=True,
        )
        try:
            prepared.trainer.train()
        finally:
            watch.close()
    found = callback.diagnosis
    if found is None or not found.changes:
        raise CommandError("no mask was applied in this run: train for more steps, or shorten --warmup and --delta-t")
    content = document(prepared, found, callback.examples, time.perf_counter() - begin)
    folder.mkdir(parents=True, exist_ok=True)
    print_summary(content, console)
    for file in write(content, folder):
        console.print(f"{file}", soft_wrap=True)
