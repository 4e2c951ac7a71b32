"""Is a layer faster sparse or dense on this machine? Measured, for a moment, on the layer itself."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.files.atomic import write_file

ROUNDS = 7
"""Dense and sparse take turns, and the fastest of each counts: a busy machine only ever adds time."""

SECONDS = 0.002
"""One measurement repeats a call for about this long: well above the clock's and the scheduler's grain."""


@dataclass(frozen=True)
class Trial:
    """Layers of one shape and about one sparsity, and how fast one of them was.

    Attributes:
        shape: (out, in).
        sparsity: of the layer that was measured.
        tokens: numbers of tokens that were tried.
        dense: microseconds of the dense layer, for each number of tokens.
        sparse: microseconds of the sparse one.
        layers: names of the layers that this trial stands for.
    """

    shape: tuple[int, int]
    sparsity: float
    tokens: tuple[int, ...]
    dense: tuple[float, ...]
    sparse: tuple[float, ...]
    layers: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """Geometric mean over the numbers of tokens of dense time / sparse time."""
        return statistics.geometric_mean(d / s for d, s in zip(self.dense, self.sparse, strict=True))

    @property
    def chosen(self) -> str:
        """ "sparse" or "dense", whichever was faster."""
        return "sparse" if self.speedup > 1 else "dense"


@dataclass(frozen=True)
class Calibration:
    """What was measured, and what was left dense without measuring.

    Attributes:
        machine: the instruction set of the kernels and the number of threads.
        trials: one for each shape and sparsity.
        dense: name -> why the layer stays dense, for those that were not tried.
        others: share of the machine's CPU time that other processes used meanwhile; None: too little to disturb.
    """

    machine: str
    trials: tuple[Trial, ...]
    dense: Mapping[str, str]
    others: float | None = None

    def table(self) -> str:
        """Lines for people."""
        lines = [f"sparse or dense, measured in µs ({self.machine}):"]
        for trial in self.trials:
            times = "   ".join(
                f"{n} token{'s' if n > 1 else ''} {d:,.0f} -> {s:,.0f}"
                for n, d, s in zip(trial.tokens, trial.dense, trial.sparse, strict=True)
            )
            layers = f"{len(trial.layers)} layer{'s' if len(trial.layers) > 1 else ''}"
            lines.append(
                f"  {layers} of {trial.shape[0]} x {trial.shape[1]}, {trial.sparsity:.1%} zeros: {times}: "
                f"{trial.chosen} ({trial.speedup:.1f} x)"
            )
        reasons: dict[str, int] = {}
        for reason in self.dense.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines += [f"  {count} layer{'s' if count > 1 else ''} dense: {reason}" for reason, count in reasons.items()]
        if self.others is not None:
            lines.append(
                f"  other processes used {self.others:.0%} of the CPU meanwhile: work that is shared among threads\n"
                "  waits for a core, so times and choices are not those of a quiet machine"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The measurements for JSON."""
        trials = [asdict(trial) | {"speedup": trial.speedup, "chosen": trial.chosen} for trial in self.trials]
        return {"machine": self.machine, "others": self.others, "trials": trials, "dense": dict(self.dense)}

    def save(self, path: str | Path) -> None:
        """Write the measurements as JSON.

        Raises:
            SaveError: the file can't be written.
        """
        write_file(Path(path), json.dumps(self.as_json(), indent=1))


def measure(
    dense: nn.Module,
    sparse: nn.Module,
    inputs: Sequence[Tensor],
    rounds: int = ROUNDS,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Microseconds of a call of each layer on each input: the least of interleaved rounds.

    Args:
        dense: a layer.
        sparse: another one of the same function.
        inputs: one for each number of tokens.
        rounds: measurements of each.
    """
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for x in inputs:
            repeats = [_repeats(layer, x) for layer in (dense, sparse)]
            found: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                for layer, count, into in zip((dense, sparse), repeats, found, strict=True):
                    into.append(_timed(layer, x, count))
            for into, result in zip(found, times, strict=True):
                result.append(min(into) * 1e6)
    return tuple(times[0]), tuple(times[1])


def measure_calls(calls: Sequence[Callable[[], object]], rounds: int = 15) -> list[float]:
    """Seconds of each call: medians of rounds in which they take turns; a first round warms up."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, into in zip(calls, found, strict=True):
            begin = time.perf_counter()
            call()
            into.append(time.perf_counter() - begin)
    return [statistics.median(times[1:]) for times in found]


def _repeats(layer: nn.Module, x: Tensor) -> int:
    """Calls that take about SECONDS; the first one, which warms up, does not count."""
    layer(x)
    return max(1, round(SECONDS / max(_timed(layer, x, 1), 1e-7)))


def _wait(x: Tensor) -> None:
    """Until a GPU has done what it was told: calls return before."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _timed(layer: nn.Module, x: Tensor, count: int) -> float:
    _wait(x)
    begin = time.perf_counter()
    for _ in range(count):
        layer(x)
    _wait(x)
    return (time.perf_counter() - begin) / count
