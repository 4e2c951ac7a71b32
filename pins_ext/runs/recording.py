"""The record of a run that has just ended."""

from __future__ import annotations

import dataclasses
import platform
import resource
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from pins_ext import __version__
from pins_ext.integrations.logs import NEW_MASK, plain
from pins_ext.integrations.timing import plain_step_seconds, pruning_seconds
from pins_ext.pruning.pruner import Pruner
from pins_ext.runs.adapters import LoraOptions
from pins_ext.runs.prepare import Prepared
from pins_ext.runs.record import (
    DataFacts,
    Entry,
    Final,
    MachineFacts,
    ModelFacts,
    RunRecord,
    Settings,
    TensorFacts,
    Timings,
    as_read,
)
from pins_ext.runs.request import Request, RunOptions

_HISTORY = ("loss", "grad_norm", "learning_rate", "epoch", "sparsity", "zeros", "target_sparsity", "nan")
_LOSSES = ("task_loss", "divergence", "teacher_weight")
_MASKS = ("sparsity", "target_sparsity", "threshold", "churn")
_SCHEDULE_POINTS = 200
_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "triton", "numpy")


def make_record(prepared: Prepared, metrics: Mapping[str, float], train_seconds: float) -> RunRecord:
    """Everything about a finished run.

    Args:
        prepared: the run, which has ended.
        metrics: of the final model, eval_* and test_*.
        train_seconds: wall time of training, evaluations included.
    """
    request, task, trainer = prepared.request, prepared.task, prepared.trainer
    record = RunRecord(
        label=request.label,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=ModelFacts(
            prepared.model_name,
            type(trainer.model).__name__,
            task.auto_class,
            request.run.dtype,
            sum(p.numel() for p in cast(nn.Module, trainer.model).parameters()),
        ),
        data=DataFacts(
            task=task.name,
            source=task.source,
            licence=task.licence,
            examples=task.sizes(),
            labels=task.label_names,
            baseline={f"eval_{name}": value for name, value in task.baseline().items()},
            baseline_name=task.baseline_name,
        ),
        total_steps=trainer.state.global_step,
        planned_steps=prepared.total_steps,
        flags=request.tokens,
        config=_settings(prepared),
        final=_final(prepared, metrics),
        timings=_timings(prepared, train_seconds),
        notes=tuple(prepared.notes),
        **logged(trainer.state.log_history),
        **surroundings(trainer.args.device, prepared.pins.pruner),
    )
    return as_read(record)


def logged(log: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts of a record that a Trainer's history tells: `history`, `masks` and `evaluations`."""
    log = list(log)
    return {
        "history": tuple(_chosen(entry, (*_HISTORY, *_LOSSES)) for entry in log if "loss" in entry),
        "masks": tuple(_chosen(entry, _MASKS) for entry in log if NEW_MASK in entry),
        "evaluations": tuple(
            _chosen(entry, ("at_target", *(name for name in entry if name.startswith("eval_"))))
            for entry in log
            if "eval_loss" in entry
        ),
    }


def surroundings(device: torch.device, pruner: Pruner | None) -> dict[str, Any]:
    """The parts of a record that are the same for every way of training: `schedule`, `versions`, `machine`."""
    return {
        "schedule": () if pruner is None else _schedule(pruner),
        "versions": {
            "pins_ext": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES if find_spec(name)},
        },
        "machine": MachineFacts(
            platform.platform(), str(device), torch.get_num_threads(), torch.ops.pins_ext.cpu_capability()
        ),
    }


def _chosen(entry: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The step of an entry, and those of the names that it has numbers for."""
    found = {**entry, **plain(entry)}
    return {"step": entry["step"], **{name: found[name] for name in names if isinstance(found.get(name), (int, float))}}


def _schedule(pruner: Pruner) -> tuple[Entry, ...]:
    """The sparsity that was asked for after each step, in enough points to draw it."""
    total = pruner.schedule.total
    steps = [*range(0, total, max(1, total // _SCHEDULE_POINTS)), total - 1]
    return tuple({"step": t + 1, "target_sparsity": 1 - pruner.schedule.remaining_ratio(t)} for t in steps)


def _settings(prepared: Prepared) -> Settings:
    request, regularizer = prepared.request, prepared.pins.self_regularizer
    return Settings(
        task={name: value for name, value in dataclasses.asdict(request.task).items() if value is not None},
        pruning=request.pruning.to_dict() if request.pruning is not None else {},
        self_regularization=regularizer.plan() if regularizer is not None else {},
        training={"optimizer": request.run.optimizer, **_of_states(request), **request.training},
    )


def _of_states(request: Request) -> dict[str, Any]:
    """What was asked of the optimizer's states, gradients, adapters and the start, where it is not the default."""
    names = ("moment_dtype", "from_sparse", "release_gradients", "release_norm", "release_clip")
    asked = {name: getattr(request.run, name) for name in names} | vars(request.adapters)
    defaults = vars(RunOptions()) | vars(LoraOptions())
    return {name: value for name, value in asked.items() if value != defaults[name]}


def _final(prepared: Prepared, metrics: Mapping[str, float]) -> Final:
    """Metrics, and zeros overall and per tensor, of the final model."""
    task, pruner, verified = prepared.task, prepared.pins.pruner, prepared.pins.final
    final = Final(
        metric=f"eval_{task.main_metric}",
        greater_is_better=task.greater_is_better,
        points=task.points,
        metrics={name: value for name, value in metrics.items() if isinstance(value, (int, float))},
    )
    if pruner is None or verified is None:
        return final
    return dataclasses.replace(final, **pruned(pruner, verified, prepared.pins.stats()["threshold"]))


def pruned(pruner: Pruner, verified: Mapping[str, Any], threshold: float | None) -> dict[str, Any]:
    """What a finished pruner adds to `Final`.

    Args:
        pruner: of the run.
        verified: what its `finalize` returned.
        threshold: the last one.
    """
    tensors = {
        name: TensorFacts(p.numel(), p.numel() - int(torch.count_nonzero(p)), tuple(p.shape))
        for name, p in zip(pruner.names, pruner.parameters, strict=True)
    }
    counts = {name: verified[name] for name in ("weights", "zeros", "kept")}
    return {**counts, "threshold": threshold, "tensors": tensors}


def _timings(prepared: Prepared, train_seconds: float) -> Timings:
    """Mean milliseconds of a step, of the optimizer in it, and of pruning; its share of the step.

    With a fused optimizer pruning is what its step costs more than the plain optimizer's, measured on copies of the
    weights after training; with hooks it is timed by itself.
    """
    timer, trainer = prepared.timer, prepared.trainer
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    timings = Timings(train_seconds, timer.steps, usage / 2**20)
    if not timer.steps:
        return timings
    step, optimizer = timer.seconds / timer.steps, timer.optimizer_seconds / timer.steps
    timings = dataclasses.replace(timings, step_ms=1e3 * step, optimizer_ms=1e3 * optimizer)
    regularizer = prepared.pins.self_regularizer
    if regularizer is not None and regularizer.seconds and trainer.args.device.type == "cpu":
        timings = dataclasses.replace(timings, teacher_ms=1e3 * regularizer.seconds / timer.steps)
    if prepared.pins.pruner is None:
        return timings
    outside = prepared.pins.pruning_seconds / timer.steps
    plain = None
    if not prepared.pins.frozen_base:  # whose optimizer has nothing of pruning in its pass
        plain = plain_step_seconds(cast(Optimizer, trainer.optimizer), cast(nn.Module, trainer.model))
    pruning = pruning_seconds(outside, optimizer, plain)
    return dataclasses.replace(timings, pruning_ms=1e3 * pruning, pruning_share=pruning / step)
