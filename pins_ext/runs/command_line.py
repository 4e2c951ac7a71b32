"""From what was typed, and from files of flags, to a `Request`; typed flags win."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pins_ext.pruning.config import PruneConfig
from pins_ext.runs import adapters, options, trainer_flags
from pins_ext.runs.adapters import LoraOptions
from pins_ext.runs.errors import UsageError
from pins_ext.runs.request import NEWEST, OWN_OPTIMIZERS, RegularizerOptions, Request, RunOptions
from pins_ext.tasks.arguments import TaskArguments, TaskError
from pins_ext.tasks.load import EMBEDDED, task_name
from pins_ext.tasks.recipes import RECIPES, recipe_for

T = TypeVar("T")

_ADAMW = ("adamw_torch", "adamw_torch_fused")
"""What the Trainer calls AdamW, which this command fuses with pruning."""

_LEAST = {
    "learning_rate": 0, "weight_decay": 0, "warmup_steps": 0, "max_grad_norm": 0, "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
}  # fmt: skip
"""What is less is refused, some of it by the Trainer after the model is loaded, some of it by nobody."""


def _recipe(text: str) -> bool | str:
    """A recipe's name, or whether to use the task's own."""
    if text in RECIPES:
        return text
    try:
        return options.truth(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"there is no recipe {text!r}; there are {', '.join(RECIPES)}") from error


PRUNING_PARSERS = {
    "sparsity": options.share,
    "initial_sparsity": options.share,
    "warmup": options.steps_or_share,
    "cooldown": options.steps_or_share,
    "scope": options.groups,
    "min_density": options.densities,
    "max_density": options.densities,
    "pattern": options.patterns,
}


def parser(prog: str, about: str, examples: str, without: Iterable[str] = ()) -> options.Parser:
    """The parser of our own flags; the Trainer's are parsed after them.

    Args:
        prog: the command, as it is typed.
        about: what it does.
        examples: a few lines of it.
        without: flags of train that have no meaning for this command, by name: not listed, and refused.
    """
    made = options.Parser(without, prog=prog, usage=f"{prog} [flags]", description=f"{about}\n\n{examples}")
    made.add_fields("run", RunOptions, parse={"recipe": _recipe})
    _add_control(made.add_argument_group("control"), made.without)
    made.add_fields("task", TaskArguments)
    made.add_fields("pruning", PruneConfig, skip=("seed",), parse=PRUNING_PARSERS)
    made.add_fields("self-regularization", RegularizerOptions, parse={"teacher_weight": options.word_or_number})
    made.add_fields("adapters", LoraOptions)
    return made


def _add_control(parser: Any, without: Collection[str]) -> None:
    """Flags about this call of the command; a run doesn't remember them."""
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML or JSON of flags; typed flags win")
    text = "go on with an unfinished run, from its newest whole checkpoint or from this one"
    if "resume" not in without:
        parser.add_argument("--resume", nargs="?", const=NEWEST, metavar="CHECKPOINT", help=text)
        parser.add_argument("--resume-from-checkpoint", dest="resume", help=argparse.SUPPRESS)
    text = "replace what is in the output folder, when done; without it an earlier result moves to DIR.1"
    if "overwrite" not in without:
        parser.add_argument("--overwrite", action="store_true", help=text)
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    parser.add_argument("--help-all", action="store_true", help="show every flag of the Trainer too")


def help_text(made: options.Parser, everything: bool) -> str:
    """Our flags, and the Trainer's most used ones or all of them."""
    if everything:
        training = trainer_flags.parser()
        title = "training: every flag of the Trainer"
    else:
        training = options.Parser(prog="", usage=argparse.SUPPRESS)
        title = "training: the Trainer's most used flags; --help-all lists the others"
        for name, text in trainer_flags.COMMON.items():
            training.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help=text)
    listed = training.format_help().split(":\n", 1)[1]
    return f"{made.format_help()}\n{title}:\n{listed}"


def parse(made: options.Parser, argv: Sequence[str], early: Callable[[TaskArguments], None] | None = None) -> Request:
    """Parse and validate. Typed flags win over files, files over the task's recommendation, that over defaults.

    Args:
        made: the command's parser, see `parser`.
        argv: what was typed.
        early: a check of the data to use, called before transformers is loaded.

    Raises:
        UsageError: an unknown flag or a bad value; the message names it.
    """
    controls = options.Parser(prog=made.prog)
    _add_control(controls, made.without)
    control, typed_tokens = controls.parse_known_args(options.normalised(argv))
    options.refuse_foreign(made, typed_tokens)
    files = vars(control).get("config", [])
    tokens = [token for file in files for token in _tokens_of(file, made)] + typed_tokens
    ours, others = made.parse_known_args(tokens)
    given = vars(ours)
    # What can be said before transformers is loaded, which takes seconds, is said.
    trainer_flags.check(others, made)
    run = _build(RunOptions, given)
    if isinstance(run.recipe, str) and not {"task", "train_file"} & set(given):
        given["task"] = RECIPES[run.recipe].task
    task = _build(TaskArguments, given)
    if not run.output_dir:
        place = Path("runs", "demo" if run.compares(given) else _task_name(task).removeprefix("glue/"))
        run = dataclasses.replace(run, output_dir=str(place))
    recipe = _recipe_name(run, task)
    _build(RegularizerOptions, given)
    asked = _build(PruneConfig, (RECIPES[recipe].flags() if recipe is not None else {}) | given)
    try:
        asked.check_training()
    except ValueError as error:
        raise UsageError(str(error)) from error
    if early is not None:
        _checked(early, task)
    typed = trainer_flags.parse(others, made)
    own_length = bool({"max_steps", "num_train_epochs"} & set(typed))
    recommended = RECIPES[recipe].flags(own_length) if recipe is not None else {}
    # A run without pruning takes the recipe's training, and a flag that is typed wins.
    run = dataclasses.replace(run, optimizer=_optimizer(given, typed) or recommended.get("optimizer", run.optimizer))
    if run.moment_dtype != "float32" and run.optimizer != "adamw":
        raise UsageError(f"--moment-dtype {run.moment_dtype} is of --optimizer adamw, not {run.optimizer}")
    training = trainer_flags.DEFAULTS | recommended | {name: typed[name] for name in typed if name != "optim"}
    pruning = _build(PruneConfig, {"seed": trainer_flags.SEED} | training | given)
    parts = (RunOptions, TaskArguments, PruneConfig, RegularizerOptions, LoraOptions)
    names = {f.name for part in parts for f in dataclasses.fields(part)} - {"seed"}
    request = Request(
        run=run,
        task=_build(TaskArguments, recommended | given),
        regularizer=_build(RegularizerOptions, recommended | given),
        adapters=_build(LoraOptions, given),
        pruning=pruning if pruning.sparsity > 0 else None,
        training={name: value for name, value in training.items() if name not in names},
        overwrite="overwrite" in control,
        resume=getattr(control, "resume", None),
        given=frozenset(given) | frozenset(typed),
        tokens=tuple(tokens),
        recipe=recipe,
    )
    _check_start(request)
    _check_steps(request)
    adapters.check(request)
    if request.needs_evaluations and request.training.get("eval_strategy") == "no":
        raise UsageError(f"{request.needs_evaluations} decides by evaluations on the way: leave out --eval-strategy no")
    return request


def _tokens_of(file: str, made: options.Parser) -> list[str]:
    """What a file of flags says, as it would be typed; what can be said against it names the file."""
    tokens = options.file_tokens(Path(file), made.without)
    try:
        trainer_flags.check(made.parse_known_args(tokens)[1], made)
    except UsageError as error:
        raise UsageError(f"--config {file}: {error}") from error
    return tokens


def _check_start(request: Request) -> None:
    """Refuse what can't go with a sparse start, or with released gradients, as far as flags tell.

    Raises:
        UsageError: with what to change.
    """
    run = request.run
    if run.from_sparse and request.pruning is None:
        raise UsageError("--from-sparse holds zeros while it prunes: --sparsity as the model has keeps just these")
    if run.from_sparse and run.random_init:
        raise UsageError("--from-sparse needs a checkpoint with zeros, and --random-init has none: leave one out")
    if run.from_sparse and request.pruning is not None and request.pruning.patterned:
        raise UsageError(
            "--from-sparse keeps zeros that need not fit a pattern: leave --pattern out to prune further, or leave "
            "--from-sparse out to prune into the pattern from all weights"
        )
    if run.from_sparse and request.compares:
        raise UsageError("--from-sparse has no dense run to compare with: name --model and data, without --compare")
    clips = {"release_norm", "release_clip"} & request.given
    if clips and not run.release_gradients:
        raise UsageError(f"--{min(clips).replace('_', '-')} is of --release-gradients: give it too, or --max-grad-norm")
    if "release_clip" in clips and run.release_norm is None:
        raise UsageError("--release-clip says how to clip, --release-norm to which norm: give it too")
    if run.release_gradients and run.optimizer != "adamw":
        raise UsageError(f"--release-gradients is of --optimizer adamw, not {run.optimizer}")
    if run.release_gradients and request.regularizer.score_gradient == "task" and request.regularizes:
        raise UsageError("--release-gradients: --score-gradient task needs gradients that are gone by then: use joint")
    if run.release_gradients and request.pruning is not None and request.pruning.state_device is not None:
        raise UsageError(
            "--release-gradients: --state-device cpu would let each wait for the host: leave one of them out"
        )


def _check_steps(request: Request) -> None:
    """Refuse what no optimizer steps by, or what one of them can't score by.

    Raises:
        UsageError: with what to change.
    """
    for name, least in _LEAST.items():
        if not (value := request.training.get(name, least)) >= least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value:g}")
    if (steps := request.training.get("max_steps", -1)) == 0 or steps < -1:
        raise UsageError(f"--max-steps must be at least 1, or -1 to go by --num-train-epochs; got {steps}")
    if request.pruning is not None and request.pruning.rule.reads_moments and request.run.optimizer == "sgd":
        raise UsageError(
            f"--criterion {request.pruning.criterion} reads AdamW's moments, and sgd has none: leave one out"
        )


def _optimizer(given: Mapping[str, Any], typed: Mapping[str, Any]) -> str | None:
    """The optimizer that was asked for: by --optimizer, or by its name at the Trainer, --optim.

    Raises:
        UsageError: by both, and they differ; or there is none of that name.
    """
    ours = given.get("optimizer")
    if "optim" not in typed:
        trainer_flags.check_optimizer(ours, OWN_OPTIMIZERS)
        return ours
    theirs = str(getattr(typed["optim"], "value", typed["optim"]))
    theirs = "adamw" if theirs in _ADAMW else theirs
    if ours not in (None, theirs):
        raise UsageError(f"--optimizer {ours} and --optim {theirs} are two names of one choice: leave one out")
    return theirs


def _task_name(task: TaskArguments) -> str:
    """As RECIPES has it; "files" for files of the user's own."""
    return _checked(task_name, task)


def _checked(check: Callable[[TaskArguments], T], task: TaskArguments) -> T:
    try:
        return check(task)
    except TaskError as error:
        raise UsageError(str(error)) from error


def _recipe_name(run: RunOptions, task: TaskArguments) -> str | None:
    """The recipe in use: the one that is named, the task's own on request, and for the embedded task always.

    Raises:
        UsageError: the task's own recipe was asked for and there is none.
    """
    task_name = _task_name(task)
    name = run.recipe if isinstance(run.recipe, str) else recipe_for(task_name)
    if task_name != EMBEDDED and not run.recipe:
        return None
    if name is None:
        raise UsageError(f"--recipe: there is none for this task; by name there are {', '.join(RECIPES)}")
    return name


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from those of the values that are its fields; what it refuses is a usage error."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    try:
        return cls(**{name: value for name, value in values.items() if name in names})
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
