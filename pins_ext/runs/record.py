"""The record of a run (metrics.json): settings, history, results, timings, versions."""

from __future__ import annotations

import dataclasses
import math
import platform
import resource
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from pins_ext import __version__
from pins_ext.integrations.callback import MASK_ENTRY
from pins_ext.integrations.timing import plain_step_seconds
from pins_ext.runs.html import FORMAT
from pins_ext.runs.prepare import Prepared

_HISTORY = ("loss", "grad_norm", "learning_rate", "epoch", "sparsity", "target_sparsity", "nan")
_MASKS = ("target_sparsity", "threshold", "churn")
_SCHEDULE_POINTS = 200
_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "triton", "numpy")


def make_record(prepared: Prepared, metrics: dict[str, float], train_seconds: float) -> dict[str, Any]:
    """Everything about a finished run, as JSON takes it.

    Args:
        metrics: of the final model, eval_* and test_*. train_seconds: wall time of training, evaluations included.
    """
    request, task, trainer = prepared.request, prepared.task, prepared.trainer
    log = trainer.state.log_history
    baseline = task.baseline()
    return _strict(
        {
            "format": FORMAT,
            "version": 1,
            "label": request.label,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": {
                "name": prepared.model_name,
                "class": type(trainer.model).__name__,
                "auto_class": task.auto_class,
                "dtype": request.run.dtype,
            },
            "data": {
                "task": task.name,
                "source": task.source,
                "licence": task.licence,
                "examples": task.sizes(),
                "labels": list(task.label_names),
                "baseline": {f"eval_{name}": value for name, value in baseline.items()},
                "baseline_name": task.baseline_name,
            },
            "total_steps": trainer.state.global_step,
            "planned_steps": prepared.total_steps,
            "flags": list(request.tokens),
            "config": _settings(prepared),
            "schedule": _schedule(prepared),
            "history": [_chosen(entry, _HISTORY) for entry in log if "loss" in entry],
            "masks": [{"sparsity": e[MASK_ENTRY], **_chosen(e, _MASKS)} for e in log if MASK_ENTRY in e],
            "evaluations": [
                _chosen(entry, ("at_target", *(name for name in entry if name.startswith("eval_"))))
                for entry in log
                if "eval_loss" in entry
            ],
            "final": {
                "metric": f"eval_{task.main_metric}",
                "greater_is_better": task.greater_is_better,
                "points": task.points,
                "metrics": metrics,
                **_sparsity(prepared),
            },
            "timings": _timings(prepared, train_seconds),
            "versions": {
                "pins_ext": __version__,
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in _PACKAGES if find_spec(name)},
            },
            "machine": {
                "platform": platform.platform(),
                "device": str(trainer.args.device),
                "threads": torch.get_num_threads(),
                "cpu_kernels": torch.ops.pins_ext.cpu_capability(),
            },
            "notes": prepared.notes,
        }
    )


def _chosen(entry: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {"step": entry["step"], **{name: entry[name] for name in names if name in entry}}


def _schedule(prepared: Prepared) -> list[dict[str, Any]]:
    """The sparsity that was asked for after each step, in enough points to draw it."""
    pruner = prepared.pins.pruner
    if pruner is None:
        return []
    total = pruner.schedule.total
    steps = [*range(0, total, max(1, total // _SCHEDULE_POINTS)), total - 1]
    return [{"step": t + 1, "target_sparsity": 1 - pruner.schedule.remaining_ratio(t)} for t in steps]


def _settings(prepared: Prepared) -> dict[str, Any]:
    request, regularizer = prepared.request, prepared.pins.self_regularizer
    return {
        "task": {name: value for name, value in dataclasses.asdict(request.task).items() if value is not None},
        "pruning": request.pruning.to_dict() if request.pruning is not None else {},
        "self_regularization": regularizer.plan() if regularizer is not None else {},
        "training": {"optimizer": request.run.optimizer, **request.training},
    }


def _sparsity(prepared: Prepared) -> dict[str, Any]:
    """Zeros overall and per tensor of the final model."""
    pruner, final = prepared.pins.pruner, prepared.pins.final
    if pruner is None or final is None:
        return {"weights": 0, "zeros": 0, "kept": 0, "tensors": {}}
    tensors = {
        name: {"weights": p.numel(), "zeros": p.numel() - int(torch.count_nonzero(p)), "shape": list(p.shape)}
        for name, p in zip(pruner.names, pruner.parameters, strict=True)
    }
    threshold = prepared.pins.stats()["threshold"]
    return {**{name: final[name] for name in ("weights", "zeros", "kept")}, "threshold": threshold, "tensors": tensors}


def _timings(prepared: Prepared, train_seconds: float) -> dict[str, Any]:
    """Mean milliseconds of a step, of the optimizer in it, and of pruning; its share of the step.

    With a fused optimizer pruning is what its step costs more than the plain optimizer's, measured on copies of the
    weights after training; with hooks it is timed by itself.
    """
    timer, trainer = prepared.timer, prepared.trainer
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    timings: dict[str, Any] = {
        "train_seconds": train_seconds,
        "steps_timed": timer.steps,
        "peak_memory_mb": usage / 2**20,
    }
    if not timer.steps:
        return timings
    step, optimizer = timer.seconds / timer.steps, timer.optimizer_seconds / timer.steps
    timings |= {"step_ms": 1e3 * step, "optimizer_ms": 1e3 * optimizer}
    if prepared.pins.pruner is not None:
        outside = prepared.pins.pruning_seconds / timer.steps
        plain = plain_step_seconds(cast(Optimizer, trainer.optimizer), cast(nn.Module, trainer.model))
        pruning = outside if plain is None else max(outside, optimizer - plain)
        timings |= {"pruning_ms": 1e3 * pruning, "pruning_share": pruning / step}
    return timings


def _strict(value: Any) -> Any:
    """Strict JSON has no NaN and no infinity; tuples become lists."""
    if isinstance(value, dict):
        return {str(name): _strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
