"""What `pins-ext train` and `plan` are asked for, parsed and valid."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pins_ext.patterns import pattern_text
from pins_ext.pruning.config import PruneConfig
from pins_ext.runs.adapters import LoraOptions
from pins_ext.runs.errors import UsageError
from pins_ext.storage import STORAGES
from pins_ext.tasks.arguments import TaskArguments
from pins_ext.tasks.recipes import RECIPES

if TYPE_CHECKING:
    from transformers import TrainingArguments

OWN_OPTIMIZERS = ("adamw", "adamax")
"""Values of --optimizer that the Trainer's --optim does not have."""

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

    def __post_init__(self) -> None:
        if self.early_stopping is not None and self.early_stopping < 1:
            raise ValueError(f"--early-stopping must be at least 1 evaluation, got {self.early_stopping}: leave it out")

    def compares(self, given: Collection[str]) -> bool:
        """Whether dense and magnitude runs are trained too: asked for, or nothing in particular was asked for.

        Args:
            given: names of the flags that were given.
        """
        if self.compare is not None:
            return self.compare
        return not {"model", "task", "train_file", "data_dir"} & set(given)


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

    @property
    def unused(self) -> list[str]:
        """Names of the flags that were given, and that this teacher has no use for."""
        given = [f.name for f in dataclasses.fields(self) if f.name != "teacher" and getattr(self, f.name) != f.default]
        if self.teacher == "none":
            return given
        used_by = {"teacher_every": ("latest", "ema"), "ema_decay": ("ema",)}
        return [name for name in given if self.teacher not in used_by.get(name, (self.teacher,))]


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
    def notes(self) -> list[str]:
        """What a reader should know of it before it runs."""
        unused = self.regularizer.unused if self.pruning is not None else []
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        notes = [f"{flags}: --teacher {self.regularizer.teacher} has no use for it"] if unused else []
        return notes + ([self.recipe_note] if self.recipe_note else []) + self.recipe_choices

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
        return self.run.compares(self.given) and self.pruning is not None

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
