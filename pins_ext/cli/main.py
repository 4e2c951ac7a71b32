"""The command `pins-ext`: finds the subcommand, runs it, turns errors into one line and an exit code."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from pins_ext import __version__, extras
from pins_ext.runs.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    CommandError,
    StoppedError,
    one_line,
)

COMMANDS = {
    "train": ("pins_ext.cli.train", "fine-tune and prune a language model, evaluate, save, report"),
    "plan": ("pins_ext.cli.plan", "what train would do: tensors, memory, schedule, conflicts"),
    "prune": ("pins_ext.cli.prune", "prune a model in one shot by a few batches, without training"),
    "ablate": ("pins_ext.cli.ablate", "train a grid of runs: mean and deviation over seeds, overlap of masks"),
    "diagnose": ("pins_ext.cli.diagnose", "how well first order predicts what pruning does to the loss"),
    "export": ("pins_ext.cli.export", "a checkpoint in sparse form, small on disk, or dense again"),
    "run": ("pins_ext.cli.run", "classify, tag, answer or generate with a pruned model, on its sparse weights"),
    "report": ("pins_ext.cli.report", "the HTML report of a run, or of several side by side"),
    "inspect": ("pins_ext.cli.inspect", "the zeros of any safetensors checkpoint: sparsity, patterns, size"),
    "verify": ("pins_ext.cli.verify", "load a result with plain transformers and check that it holds"),
    "doctor": ("pins_ext.cli.doctor", "what this installation can do, and what falls back to what"),
    "bench": ("pins_ext.bench", "time the operators against PyTorch's"),
    "bench-inference": ("pins_ext.bench.inference", "time a pruned model against the runtimes that are here"),
}
"""Name -> the module whose `main(argv) -> int | None` runs it, and what it does. Imported when asked for."""

_TRAINERS = ("train", "ablate", "diagnose", "prune")
"""They make heads and train, for which earlier versions of other packages won't do."""

_HELP = """Iterative global pruning of pretrained language models during fine-tuning.

usage: pins-ext COMMAND [flags]

{commands}

start here:
  pins-ext train                          the demo: dense, PINS and magnitude pruning on real text, in minutes
  pins-ext train --task glue/rte --model bert-base-uncased --sparsity 0.8 --output-dir runs/rte
  pins-ext COMMAND --help                 its flags, with examples

exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted, 143 terminated
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; without arguments, that of the process.

    Returns:
        The exit code.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = _run(name, rest)
    finally:
        lost = _all_is_printed()
    return code or lost


def _run(name: str, rest: list[str]) -> int:
    try:
        if name in ("-h", "--help", "help"):
            print(_HELP.format(commands="\n".join(f"  {n:<17}{about}" for n, (_, about) in COMMANDS.items())))
            return EXIT_OK
        if name in ("-V", "--version"):
            print(f"pins-ext {__version__}")
            return EXIT_OK
        if (refusal := _refusal(name, rest)) is not None:
            return refusal
        with warnings.catch_warnings():
            warnings.showwarning = _say
            return importlib.import_module(COMMANDS[name][0]).main(rest) or EXIT_OK
    except BrokenPipeError:
        _print_no_more()
        return EXIT_OK
    except StoppedError as stop:
        return _fail(str(stop), stop.exit_code, name)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED, name)
    except Exception as error:
        if "--debug" in rest:
            raise
        if isinstance(error, CommandError):
            return _fail(str(error), error.exit_code, name)
        if (what_to_install := extras.advice(error, "train")) is not None:
            return _fail(what_to_install, EXIT_FAILED, name)
        return _fail(f"{one_line(error)}  (--debug shows where)", EXIT_FAILED, name)


def _refusal(name: str, rest: list[str]) -> int | None:
    """The exit code of a command that is not begun."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name!r}; {hint}", EXIT_USAGE)
    if name != "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _fail("runs in one process: start it without accelerate launch and torchrun", EXIT_USAGE, name)
    if name in _TRAINERS and not {"-h", "--help"} & {*rest} and (outdated := extras.outdated()) is not None:
        return _fail(outdated, EXIT_FAILED, name)
    return None


def _all_is_printed() -> int:
    """Whether standard output took all, as an exit code."""
    try:
        if sys.stdout is not None:  # it was closed: `pins-ext train >&-`
            sys.stdout.flush()
    except BrokenPipeError:
        _print_no_more()
    except OSError as error:
        _print_no_more()
        return _fail(f"standard output: {error.strerror}", EXIT_FAILED)
    return EXIT_OK


def _print_no_more() -> None:
    """Whoever read our output has seen enough, `pins-ext train --help | head`, or has no room for more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning as a line for a user, who has no use for the place in the source."""
    if not _rank():
        print(f"note: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, code: int, command: str = "") -> int:
    where = f" (rank {rank})" if (rank := _rank()) else ""
    print(f"pins-ext{command and ' ' + command}{where}: {message}", file=sys.stderr)
    return code


def _rank() -> int:
    """Which of the processes that a launcher has started."""
    return int(os.environ.get("RANK", "0"))
