"""What sparse kernels would gain on a checkpoint's pruned matrices, measured on this machine by their shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from pins_ext.contention import Neighbours
from pins_ext.sparse.calibration import Calibration, Trial, measure
from pins_ext.sparse.inference import MEASURED_FROM
from pins_ext.sparse.linear import SparseLinear
from pins_ext.sparse.survey import TensorSurvey

_EMBEDDINGS = ("embed", "wte", "wpe", "shared.weight")


def expected_speed(
    found: Sequence[TensorSurvey],
    tokens: Sequence[int] = (1, 128),
    min_sparsity: float = MEASURED_FROM,
    progress: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Time a dense and a sparse float32 layer of each shape and about each sparsity, with random weights.

    Args:
        found: what `survey` saw.
        tokens: numbers of tokens (batch × sequence) to measure.
        min_sparsity: share of zeros from which on a matrix is tried.
        progress: told before each shape is measured.

    Returns:
        The measurements; `trial.layers` names the matrices that a trial stands for.
    """
    groups: dict[tuple[int, int, int], list[TensorSurvey]] = {}
    for each in found:
        embeds = any(part in each.name.lower() for part in _EMBEDDINGS)
        if len(each.shape) == 2 and each.weights and each.sparsity >= min_sparsity and not embeds:
            groups.setdefault((each.shape[0], each.shape[1], round(each.sparsity * 20)), []).append(each)
    trials = []
    neighbours = Neighbours(torch.device("cpu"))
    neighbours.begin()
    for (rows, columns, _), members in groups.items():
        sparsity = sum(each.sparsity for each in members) / len(members)
        progress(f"measuring {rows} x {columns} with {sparsity:.0%} zeros")
        generator = torch.Generator().manual_seed(0)
        layer = nn.Linear(columns, rows, bias=False)
        with torch.no_grad():
            kept = torch.rand(rows, columns, generator=generator) >= sparsity
            layer.weight.copy_(torch.randn(rows, columns, generator=generator) * kept)
        inputs = [torch.randn(n, columns, generator=generator) for n in tokens]
        dense, sparse = measure(layer, SparseLinear(layer.weight), inputs)
        names = tuple(each.name for each in members)
        trials.append(Trial((rows, columns), sparsity, tuple(tokens), dense, sparse, names))
    machine = f"{torch.ops.pins_ext.cpu_capability()}, {torch.get_num_threads()} threads"
    neighbours.keep()
    return Calibration(machine, _steadied(trials), {}, neighbours.disturbance)


def _steadied(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """With the least time of all dense layers of a shape: their zeros make no difference, stalls do."""
    dense: dict[tuple[int, int], list[tuple[float, ...]]] = {}
    for trial in trials:
        dense.setdefault(trial.shape, []).append(trial.dense)
    return tuple(replace(t, dense=tuple(map(min, zip(*dense[t.shape], strict=True)))) for t in trials)


def totals(calibration: Calibration) -> dict[int, tuple[float, float]]:
    """Microseconds of all measured layers, dense and as `sparsify_for_inference` chooses, for each number of tokens."""
    sums: dict[int, tuple[float, float]] = {}
    for trial in calibration.trials:
        for n, dense, sparse in zip(trial.tokens, trial.dense, trial.sparse, strict=True):
            before, after = sums.get(n, (0.0, 0.0))
            chosen = sparse if trial.chosen == "sparse" else dense
            sums[n] = (before + dense * len(trial.layers), after + chosen * len(trial.layers))
    return sums
