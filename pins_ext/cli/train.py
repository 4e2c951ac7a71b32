"""`pins-ext train`: fine-tune and prune a language model, evaluate, save, report; without arguments, the demo."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pins_ext.runs import command_line
from pins_ext.runs.errors import EXIT_OK, UsageError
from pins_ext.runs.options import Parser
from pins_ext.runs.request import NEWEST, Request
from pins_ext.tasks.load import refuse_out_of_reach

_ABOUT = """Fine-tunes a language model with the Hugging Face Trainer and prunes it on the way: for classification and
regression, entities, question answering, language modelling or data-to-text. The result is an ordinary checkpoint
whose zeros are exact, with metrics.json, the pruner's state and report.html beside it.

Without a model and data it runs the demo: the embedded MiniLM on English prose from Python's own documentation, trained
dense, pruned by PINS and pruned by magnitude with the same budget, and compared in a table."""

_EXAMPLES = """examples:
  pins-ext train                                              the demo, a few minutes on two cores
  pins-ext train --max-steps 30                               the demo, shortened
  pins-ext train --task glue/rte --model bert-base-uncased --recipe --output-dir runs/rte
  pins-ext train --train-file mine.csv --sparsity 0.9 --num-train-epochs 5 --output-dir runs/mine
  pins-ext train --task wnut17 --data-dir wnut17 --output-dir runs/wnut17      train.conll, dev.conll, test.conll
  pins-ext train --task squad --model bert-base-uncased --doc-stride 128 --output-dir runs/squad
  pins-ext train --task wikitext2 --model gpt2 --max-length 512 --output-dir runs/wikitext2
  pins-ext train --task glue/rte --model bert-base-uncased --lora 8 --output-dir runs/rte-lora      needs peft
  pins-ext train --config rte.yaml --learning-rate 1e-4       flags from a file, and one typed
  pins-ext train --output-dir runs/rte --resume               go on after Ctrl-C or a crash, to the same last bit
  pins-ext train --task glue/rte --compare                    any task, against dense and magnitude
  torchrun --nproc-per-node 4 -m pins_ext train --task glue/rte --output-dir runs/rte      four GPUs, one result"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_line.parser("pins-ext train", _ABOUT, _EXAMPLES)
    asked = vars(parser.parse_known_args(argv)[0])
    if "help" in asked or "help_all" in asked:
        print(command_line.help_text(parser, everything="help_all" in asked))
        return EXIT_OK
    request = command_line.parse(parser, argv, early=refuse_out_of_reach)

    from pins_ext.distributed.first import leave
    from pins_ext.runs.compare import compare
    from pins_ext.runs.run import finished, run
    from pins_ext.runs.summary import print_summary
    from pins_ext.runs.terminal import console

    if request.resume is not None:
        request = _continued(request, parser, argv)
    request, rank = _joined(request)
    screen = console(quiet=rank > 0)
    record = finished(request)
    if record is not None:
        screen.print(
            "this run is complete; there is nothing to resume, and other flags change nothing: for another run name "
            "another --output-dir, or --overwrite this one",
            soft_wrap=True,
        )
    elif request.compares:
        compare(request, screen)
        return EXIT_OK
    else:
        record, _ = run(request, screen)
    leave()
    print_summary([record], [Path(request.run.output_dir)], screen)
    return EXIT_OK


def _continued(request: Request, parser: Parser, argv: Sequence[str]) -> Request:
    """A request to resume, with the flags that the run was started with beside those typed now.

    Raises:
        UsageError: nothing was begun there.
    """
    from pins_ext.runs.compare import three
    from pins_ext.runs.folder import RunFolder, as_typed

    folder = RunFolder(Path(request.run.output_dir).absolute())
    remembered = folder.remembered()
    if remembered:
        return command_line.parse(parser, [*remembered, *argv])
    if request.resume == NEWEST:
        parts = three(request).values() if request.compares else ()
        places = [folder, *(RunFolder(Path(part.run.output_dir).absolute()) for part in parts)]
        if not any(place.begun for place in places):
            raise UsageError(f"nothing to resume in {as_typed(folder.result)}: without --resume a run begins there")
    return request


def _joined(request: Request) -> tuple[Request, int]:
    """Find the processes that torchrun or accelerate launch has started beside this one.

    Returns:
        The request, as it is for them, and which of them this is.

    Raises:
        UsageError: there are, and the request is one that they can't share.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return request, 0
    if request.compares:
        raise UsageError(
            "a comparison trains in one process: start it without accelerate launch and torchrun, or train one run "
            "with --task or --train-file and without --compare"
        )
    if request.adapters.lora is not None:
        raise UsageError("--lora trains in one process, as the gradients of the base are used before they are reduced")
    import torch
    from accelerate import PartialState

    # The Trainer would take itself for the only process.
    cpu = bool(request.training.get("use_cpu")) or not torch.accelerator.is_available()
    ranks = PartialState(cpu=cpu)
    return replace(request, training={**request.training, **({"use_cpu": True} if cpu else {})}), ranks.process_index
