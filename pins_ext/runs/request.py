"""What `pins-ext train` and `plan` are asked for: every flag, from the command line and from files."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pins_ext.patterns import pattern_text
from pins_ext.pruning.config import PruneConfig
from pins_ext.runs import adapters, options, trainer_flags
from pins_ext.runs.adapters import LoraOptions
from pins_ext.runs.errors import UsageError
from pins_ext.storage import STORAGES
from pins_ext.tasks.arguments import TaskArguments, TaskError
from pins_ext.tasks.load import EMBEDDED, task_name
from pins_ext.tasks.recipes import RECIPES, recipe_for

if TYPE_CHECKING:
    from transformers import TrainingArguments

T = TypeVar("T")

OWN_OPTIMIZERS = ("adamw", "adamax")
"""Values of --optimizer that the Trainer's --optim does not have."""

_ADAMW = ("adamw_torch", "adamw_torch_fused")
"""What the Trainer calls AdamW, which this command fuses with pruning."""

NEWEST = "newest"
"""`--resume` without a checkpoint: the newest whole one."""


def _flag(default: Any, help: str, metavar: str | None = None, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar, "choices": choices})


@dataclass(frozen=True)
class RunOptions:
    """The run as a whole."""

    model: str | None = _flag(
        None,
        "model to start from; its head is made if the task needs another: hub name or folder "
        "[the embedded MiniLM; language modelling and data-to-text need one named]",
        "NAME|DIR",
    )
    random_init: bool = _flag(False, "random weights of the model's architecture: config.json and tokenizer are enough")
    output_dir: str = _flag(
        "",
        "folder of the result; it appears when complete, an earlier one moves to DIR.1 [runs/TASK, or runs/demo]",
        "DIR",
    )
    optimizer: str = _flag(
        "adamw", "adamw, fused with pruning; adamax, or one of the Trainer's --optim, with hooks", "NAME"
    )
    dtype: str = _flag("float32", "dtype of the parameters", None, ("float32", "bfloat16", "float16"))
    moment_dtype: str = _flag("float32", "storage of adamw's two moments", None, STORAGES)
    from_sparse: bool = _flag(
        False, "the model is sparse already: its zeros are part of every mask, and the schedule starts from them"
    )
    release_gradients: bool = _flag(
        False, "use and free each gradient inside backward, so that they take no memory; needs --max-grad-norm 0"
    )
    release_norm: float | None = _flag(
        None, "clip released gradients to this norm, which --max-grad-norm would know too late", "X"
    )
    release_clip: str = _flag(
        "previous", "by the norm of the step before, or each tensor by its own", None, ("previous", "tensor")
    )
    label: str | None = _flag(None, "the run's name in tables and reports")
    compare: bool | None = _flag(
        None, "also train dense and by magnitude, with the same budget; on where no model and no data are named"
    )
    recipe: bool | str = _flag(
        False,
        f"published settings where no flag says otherwise: the task's own, or one of {', '.join(RECIPES)}",
        "NAME",
    )
    early_stopping: int | None = _flag(None, "stop after N evaluations at the target without a better one", "N")


@dataclass(frozen=True)
class RegularizerOptions:
    """Self-regularization: the model is held near an earlier checkpoint of itself."""

    teacher: str = _flag(
        "latest", "latest, best (reads the evaluation set), ema, none, or a fixed model: hub name or folder", "WHICH"
    )
    teacher_weight: str | float = _flag("adaptive", "adaptive, or a constant factor of the distance", "adaptive|X")
    temperature: float = _flag(2.0, "softens both distributions of the distance")
    score_gradient: str = _flag("joint", "weights are scored by this loss's gradient", None, ("joint", "task"))
    teacher_every: int | None = _flag(None, "steps between snapshots; if not given, a twentieth of training")
    teacher_init: str | None = _flag(None, "teacher before the first snapshot: hub name or folder", "NAME|DIR")
    ema_decay: float | None = _flag(None, "weight of the old average; if not given, 1 - 1 / teacher-every")


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

_INCIDENTAL = (
    "label", "compare", "output_dir", "save_steps", "save_strategy", "save_total_limit", "logging_steps", "report_to",
    "run_name", "disable_tqdm", "dataloader_num_workers", "per_device_eval_batch_size",
)  # fmt: skip
"""Flags that a resumed run may change: they leave its weights alone."""


@dataclass(frozen=True)
class Request:
    """A parsed and validated request.

    Attributes:
        run: flags of the run.
        task: flags of the task.
        regularizer: flags of self-regularization.
        adapters: flags of LoRA.
        pruning: flags of pruning; None where the sparsity asked for is 0.
        training: TrainingArguments by name, the Trainer's own defaults left out.
        overwrite: replace what is there.
        resume: go on with what is there: NEWEST, or a checkpoint's folder.
        given: names of the flags that were given, in a file or typed.
        tokens: those flags as they would be typed.
        recipe: the name of the recipe in use, if there is one.
    """

    run: RunOptions
    task: TaskArguments
    regularizer: RegularizerOptions
    adapters: LoraOptions
    pruning: PruneConfig | None
    training: Mapping[str, Any]
    overwrite: bool = False
    resume: str | None = None
    given: frozenset[str] = frozenset()
    tokens: tuple[str, ...] = ()
    recipe: str | None = None

    def settings(self) -> dict[str, Any]:
        """What decides a run's weights, as plain data."""
        ours = [self.run, self.task, self.regularizer, self.adapters]
        flat = {name: value for part in ours for name, value in dataclasses.asdict(part).items()}  # type: ignore[call-overload]
        flat |= {f"pruning {k}": v for k, v in (self.pruning.to_dict() if self.pruning else {}).items()}
        flat |= self.training
        return json.loads(json.dumps({k: v for k, v in flat.items() if k not in _INCIDENTAL}, default=str))

    @property
    def label(self) -> str:
        """The run's name: the one that was given, or what the run is."""
        if self.run.label:
            return self.run.label
        if self.pruning is None:
            return "dense"
        name = "PINS" if self.pruning.criterion == "pins" else str(self.pruning.criterion)
        pattern = f" {pattern_text(self.pruning.pattern)}" if self.pruning.patterned else ""
        return f"{name} {100 * self.pruning.sparsity:g} %{pattern}"

    @property
    def regularizes(self) -> bool:
        """Whether there may be a teacher: a dense run has one only where it was asked for."""
        return self.regularizer.teacher != "none" and (self.pruning is not None or "teacher" in self.given)

    @property
    def release(self) -> dict[str, Any] | None:
        """Arguments of FusedOptimizer.release_gradients; None: gradients wait for the step."""
        if not self.run.release_gradients:
            return None
        return {"max_norm": self.run.release_norm, "clip": self.run.release_clip}

    @property
    def needs_evaluations(self) -> str | None:
        """The flag that decides something by evaluations on the way, if one was given."""
        flags = {
            "--teacher best": self.regularizes and self.regularizer.teacher == "best",
            "--early-stopping": self.run.early_stopping,
            "--load-best-model-at-end": self.training.get("load_best_model_at_end"),
        }
        return next((flag for flag, on in flags.items() if on), None)

    @property
    def recipe_note(self) -> str | None:
        """What a recipe says that does not apply, because its numbers of steps belong to its own length."""
        own_length = {"max_steps", "num_train_epochs"} & self.given
        if not self.run.recipe or not own_length or {"warmup", "cooldown", "warmup_steps"} <= self.given:
            return None
        return (
            f"--{min(own_length).replace('_', '-')} replaces the recipe's length, so its warm-up and cool-down, "
            "numbers of steps, give way to the defaults, shares of training"
        )

    @property
    def recipe_choices(self) -> list[str]:
        """Which choices of the published training the run keeps, and which not, in a sentence each."""
        if self.recipe is None or self.pruning is None:
            return []
        ours = {**vars(self.pruning), **vars(self.run), **vars(self.regularizer)}
        values = {"weight_decay": 0.0, **ours, **self.training}
        kept, lost = RECIPES[self.recipe].kept(values)
        told = {"kept of": kept, "not kept of": lost}
        source = RECIPES[self.recipe].source
        return [f"{which} {source}, as released: {'; '.join(choices)}" for which, choices in told.items() if choices]

    @property
    def compares(self) -> bool:
        """Whether dense and magnitude runs are trained too: asked for, or nothing in particular was asked for."""
        return _compares(self.run, self.given) and self.pruning is not None

    def training_arguments(self, output_dir: Path) -> TrainingArguments:
        """The Trainer's arguments, writing to this folder.

        Raises:
            UsageError: the Trainer refuses them.
        """
        import torch
        from transformers import TrainingArguments

        if self.training.get("deepspeed"):
            raise UsageError("DeepSpeed steps inside backward, where pruning can't follow: train without --deepspeed")
        optim = {} if self.run.optimizer in OWN_OPTIMIZERS else {"optim": self.run.optimizer}
        # Without a GPU torch warns of every loader that pins its memory.
        fixed = {"output_dir": str(output_dir), "disable_tqdm": True}
        pin = {"dataloader_pin_memory": torch.cuda.is_available()}
        try:
            return TrainingArguments(**{**pin, **self.training, **optim, **fixed})
        except (ValueError, TypeError, ImportError, KeyError) as error:
            raise UsageError(" ".join(str(error).split())) from error


def parser(prog: str, about: str, examples: str, without: Iterable[str] = ()) -> options.Parser:
    """The parser of our own flags; the Trainer's are parsed after them.

    Args:
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
    tokens = [token for file in files for token in options.file_tokens(Path(file), made.without)] + typed_tokens
    ours, others = made.parse_known_args(tokens)
    given = vars(ours)
    # What can be said before transformers is loaded, which takes seconds, is said.
    trainer_flags.check(others, made)
    run = _build(RunOptions, given)
    if isinstance(run.recipe, str) and not {"task", "train_file"} & set(given):
        given["task"] = RECIPES[run.recipe].task
    task = _build(TaskArguments, given)
    if not run.output_dir:
        place = Path("runs", "demo" if _compares(run, given) else _task_name(task).removeprefix("glue/"))
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
    pruning = _build(PruneConfig, training | given)
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
    adapters.check(request)
    if request.needs_evaluations and request.training.get("eval_strategy") == "no":
        raise UsageError(f"{request.needs_evaluations} decides by evaluations on the way: leave out --eval-strategy no")
    return request


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
    if run.release_gradients and request.regularizer.score_gradient == "task" and request.regularizes:
        raise UsageError("--release-gradients: --score-gradient task needs gradients that are gone by then: use joint")


def _optimizer(given: Mapping[str, Any], typed: Mapping[str, Any]) -> str | None:
    """The optimizer that was asked for: by --optimizer, or by its name at the Trainer, --optim.

    Raises:
        UsageError: by both, and they differ.
    """
    ours = given.get("optimizer")
    if "optim" not in typed:
        return ours
    theirs = str(getattr(typed["optim"], "value", typed["optim"]))
    theirs = "adamw" if theirs in _ADAMW else theirs
    if ours not in (None, theirs):
        raise UsageError(f"--optimizer {ours} and --optim {theirs} are two names of one choice: leave one out")
    return theirs


def _compares(run: RunOptions, given: Collection[str]) -> bool:
    if run.compare is not None:
        return run.compare
    return not {"model", "task", "train_file", "data_dir"} & set(given)


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
