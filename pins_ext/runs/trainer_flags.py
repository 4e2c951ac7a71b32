"""The flags of the Hugging Face Trainer: those that are told of, and all of them as it reads them.

transformers takes seconds to load. Until it is needed, its flags are known from its source.
"""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pins_ext.runs import options
from pins_ext.runs.errors import UsageError

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": "none",
}
"""Where this command differs from the Trainer's own defaults: it evaluates, and it can always resume."""

_NUMBERS = {"int": int, "float": float}

COMMON = {
    "num_train_epochs": "passes over the training data [3]",
    "max_steps": "optimizer steps, instead of epochs",
    "learning_rate": "peak learning rate [5e-5]",
    "lr_scheduler_type": "linear, cosine, constant and others [linear]",
    "warmup_steps": "steps, or share of training, up to the peak learning rate [0]",
    "per_device_train_batch_size": "examples per step [16]",
    "gradient_accumulation_steps": "batches per optimizer step [1]",
    "weight_decay": "decoupled weight decay [0]",
    "max_grad_norm": "clip gradients, before importance is taken from them [1]",
    "logging_steps": "steps between log lines and points of the pictures [10]",
    "eval_steps": "steps, or share of training, between evaluations [0.1]",
    "save_steps": "steps, or share of training, between checkpoints [0.1]",
    "load_best_model_at_end": "keep the best model; only one at the target sparsity can be it",
    "metric_for_best_model": "what best means [the task's main metric]",
    "seed": "of everything random, stochastic rounding included [42]",
}


SEED = 42
"""What the Trainer takes where no --seed is given."""


def check(tokens: Sequence[str], made: options.Parser) -> None:
    """Refuse what can be seen to be wrong without transformers: a flag that nobody knows, a number that is none.

    Args:
        tokens: what the command's own parser left over.
        made: the command's own parser, for the flags that were meant.

    Raises:
        UsageError: naming the flag, and the nearest that exists.
    """
    fields = _fields()
    if not fields:
        return
    known = {"--" + name.replace("_", "-"): kind for name, kind in fields.items()}
    known |= {f"--no-{flag[2:]}": "" for flag, kind in known.items() if kind == "bool"}
    flag, takes = "", 0
    for token in tokens:
        name, equals, value = token.partition("=")
        if token.startswith("--"):
            flag = name
            if flag not in known:
                raise options.unknown(token, [*known, *_flags_of(made)])
            takes = 1 if known[flag] in _NUMBERS and not equals else len(tokens)
        elif not flag or not takes:
            raise options.unknown(token, [])
        if equals or not token.startswith("--"):
            _check_number(flag, known[flag], value if token.startswith("--") else token)
            takes -= 1


def _check_number(flag: str, kind: str, text: str) -> None:
    if kind in _NUMBERS:
        try:
            _NUMBERS[kind](text)
        except ValueError as error:
            raise UsageError(f"argument {flag}: invalid {kind} value: {text!r}") from error


def _fields() -> Mapping[str, str]:
    """Name -> annotation of every argument of the Trainer, read in its source; nothing where it is not found."""
    spec = find_spec("transformers")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    file = Path(folders[0], "training_args.py") if folders else None
    if file is None or not file.is_file():
        return {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return dict(_annotations(tree))


def _annotations(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id, ast.unparse(line.annotation).removesuffix(" | None")


def _flags_of(made: argparse.ArgumentParser) -> list[str]:
    return [flag for action in made._actions for flag in action.option_strings if "_" not in flag]


def parse(tokens: list[str], made: options.Parser) -> dict[str, Any]:
    """The Trainer's arguments that were given, by name.

    Args:
        tokens: what the command's own parser left over.
        made: the command's own parser, for the flags that were meant.

    Raises:
        UsageError: an unknown flag or a bad value.
    """
    trainer = parser()
    known, unknown = trainer.parse_known_args(tokens)
    if unknown:
        raise options.unknown(unknown[0], [*_flags_of(made), *_flags_of(trainer)])
    return vars(known)


def check_optimizer(name: str | None, own: Collection[str]) -> None:
    """Raise UsageError for an optimizer that is neither among our own nor one of the Trainer's."""
    from transformers.training_args import OptimizerNames

    names = [*own, *(each.value for each in OptimizerNames)]
    if name is not None and name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise UsageError(f"argument --optimizer: there is no {name!r}; {meant}")


def parser() -> argparse.ArgumentParser:
    """A parser of the Trainer's flags that remembers only what was given."""
    from transformers import HfArgumentParser, TrainingArguments

    class TrainingParser(HfArgumentParser):
        error = options.Parser.error

    made = TrainingParser(TrainingArguments, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)  # type: ignore[arg-type]
    for action in made._actions:
        action.default = argparse.SUPPRESS
        action.help = action.help and " ".join(action.help.split())
        dashed = [flag for flag in action.option_strings if "_" not in flag]
        action.option_strings = dashed or action.option_strings
    return made
