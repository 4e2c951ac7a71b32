"""The record of a run (metrics.json): settings, history, results, timings, versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pins_ext.files.plain import PlainError, plain, typed

RECORD = "metrics.json"
FORMAT = "pins-ext run"
VERSION = 1

Entry = Mapping[str, float | None]
"""What was logged at a step, by name; one of the names is `step`."""


class RecordError(ValueError):
    """A folder holds no readable record of a run."""


@dataclass(frozen=True)
class ModelFacts:
    """The model that was trained.

    Attributes:
        name: as it was asked for.
        kind: its class.
        auto_class: the class of transformers that loads it.
        dtype: of its parameters.
        weights: of all its parameters; 0 where it is not known.
    """

    name: str = "a model"
    kind: str = field(default="", metadata={"key": "class"})
    auto_class: str = "AutoModelForSequenceClassification"
    dtype: str = "float32"
    weights: int = 0


@dataclass(frozen=True)
class DataFacts:
    """What it was trained on.

    Attributes:
        task: as in --task, or "files".
        source: where the data comes from.
        licence: its terms.
        examples: how many each split has.
        labels: class names by id.
        baseline: metrics of a prediction that needs no model.
        baseline_name: what that prediction does.
    """

    task: str = "a task"
    source: str = ""
    licence: str = ""
    examples: Mapping[str, int] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    baseline: Mapping[str, float | None] = field(default_factory=dict)
    baseline_name: str = "baseline"


@dataclass(frozen=True)
class Settings:
    """What was asked for, by name.

    Attributes:
        task: the data and how it is read.
        pruning: a PruneConfig's fields; empty for a dense run.
        self_regularization: a SelfRegularizer's plan; empty without one.
        training: the optimizer and the Trainer's arguments.
    """

    task: Mapping[str, Any] = field(default_factory=dict)
    pruning: Mapping[str, Any] = field(default_factory=dict)
    self_regularization: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorFacts:
    """One pruned tensor: how many weights it has, how many of them are zero, its shape."""

    weights: int
    zeros: int
    shape: tuple[int, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of the weights that is zero."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Final:
    """The final model.

    Attributes:
        metric: the main one, as in `metrics`.
        greater_is_better: its direction.
        points: what one unit of it is in points.
        metrics: eval_* and, where a test set was evaluated, test_*; None stands for NaN.
        weights: prunable ones; 0 for a dense run.
        zeros: how many of them are zero.
        kept: how many the masks keep.
        threshold: the last one, a score.
        tensors: the pruned tensors by name.
    """

    metric: str
    greater_is_better: bool = True
    points: float = 100.0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    weights: int = 0
    zeros: int = 0
    kept: int = 0
    threshold: float | None = None
    tensors: Mapping[str, TensorFacts] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """The main metric."""
        return self.metrics.get(self.metric)

    @property
    def sparsity(self) -> float | None:
        """Share of the prunable weights that is zero; None for a dense run."""
        return self.zeros / self.weights if self.weights else None


@dataclass(frozen=True)
class Timings:
    """What it took.

    Attributes:
        train_seconds: wall time of training, evaluations included.
        steps_timed: the number of steps that the means are of.
        peak_memory_mb: the largest resident set of the process, in MiB.
        step_ms: mean of a step; None where none was timed.
        optimizer_ms: mean of the optimizer in it.
        pruning_ms: mean of pruning in it; None for a dense run.
        pruning_share: the same as a share of the step.
        teacher_ms: mean of the teacher's forward passes and the losses in it; None where it was not timed.
    """

    train_seconds: float = 0.0
    steps_timed: int = 0
    peak_memory_mb: float | None = None
    step_ms: float | None = None
    optimizer_ms: float | None = None
    pruning_ms: float | None = None
    pruning_share: float | None = None
    teacher_ms: float | None = None


@dataclass(frozen=True)
class MachineFacts:
    """Where it was trained: platform, device, CPU threads, instruction set of the CPU kernels."""

    platform: str = ""
    device: str = ""
    threads: int = 0
    cpu_kernels: str = ""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything about a finished run.

    Attributes:
        format: says that the file is this software's.
        version: of the format.
        label: the run's name in tables and pictures.
        created: when, in ISO 8601.
        total_steps: optimizer steps made.
        planned_steps: optimizer steps asked for.
        flags: of the command, as they were typed or stood in files.
        schedule: `target_sparsity` of some steps.
        history: what was logged while training; `sparsity` is the last mask's and `zeros` what was zero at the step (in
            records without `zeros`, `sparsity` is that).
        masks: one entry per new mask.
        evaluations: metrics on the way, and whether the model was `at_target`.
        versions: of the software, by package.
        notes: what a reader of the results should know.

    The attributes that are classes of their own are described there.

    Raises:
        PlainError: an entry of a step that names no step.
    """

    format: str = FORMAT
    version: int = VERSION
    label: str = "run"
    created: str = ""
    model: ModelFacts = field(default_factory=ModelFacts)
    data: DataFacts = field(default_factory=DataFacts)
    total_steps: int = 0
    planned_steps: int = 0
    flags: tuple[str, ...] = ()
    config: Settings = field(default_factory=Settings)
    schedule: tuple[Entry, ...] = ()
    history: tuple[Entry, ...] = ()
    masks: tuple[Entry, ...] = ()
    evaluations: tuple[Entry, ...] = ()
    final: Final
    timings: Timings = field(default_factory=Timings)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: MachineFacts = field(default_factory=MachineFacts)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("schedule", "history", "masks", "evaluations"):
            if any(entry.get("step") is None for entry in getattr(self, part)):
                raise PlainError(f"an entry of {part} has no step")


def as_read(record: RunRecord) -> RunRecord:
    """The record as it will come back from its file, which knows no NaN."""
    return typed(RunRecord, plain(record), "the record")


def read_record(folder: Path) -> RunRecord:
    """The record of a run.

    Args:
        folder: of its result, or the record's file.

    Raises:
        RecordError: there is none, or it was not written by this software.
    """
    file = folder / RECORD if folder.is_dir() else folder
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{folder} is not the folder of a run: it has no {RECORD}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RecordError(f"{file} was not written by pins-ext")
    if data.get("version") != VERSION:
        raise RecordError(f"{file} has version {data.get('version')!r}, this software reads {VERSION}")
    try:
        return typed(RunRecord, data, str(file))
    except PlainError as error:
        raise RecordError(str(error)) from error
