"""The settings of published results, PLATON (Zhang et al., ICML 2022) and PINS (Ren & Zhu, 2023), both for BERT-base;
and those of the embedded task, found by trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Training settings of one task.

    Attributes:
        source: who trained so. sparsity: the target of that training.
        learning_rate, batch_size: of AdamW. length: longest input in tokens, where it is stated.
        epochs or steps: how long; one of the two is None.
        warmup_steps: of the learning rate.
        warmup, cooldown: steps before and after the sparsity schedule.
        beta2: smoothing of the uncertainty.
    """

    source: str
    sparsity: float
    learning_rate: float
    batch_size: int
    epochs: int | None
    steps: int | None
    warmup_steps: int
    warmup: int
    cooldown: int
    beta2: float
    length: int | None = None


def _platon(
    remaining: float, lr: float, batch: int, epochs: int, warmup: int, multiples: tuple[int, int], beta2: float
) -> Recipe:
    before, after = multiples
    return Recipe("PLATON", 1 - remaining, lr, batch, epochs, None, warmup, before * warmup, after * warmup, beta2)


RECIPES: Mapping[str, Recipe] = {
    "glue/mnli": _platon(0.20, 8e-5, 32, 8, 5400, (1, 5), 0.95),
    "glue/qqp": _platon(0.20, 1e-4, 32, 10, 5400, (1, 5), 0.85),
    "glue/sst2": _platon(0.10, 8e-5, 32, 6, 1000, (1, 5), 0.85),
    "glue/qnli": _platon(0.10, 1e-4, 32, 10, 2000, (1, 6), 0.90),
    "glue/stsb": _platon(0.10, 1e-4, 16, 15, 500, (1, 5), 0.85),
    "glue/mrpc": _platon(0.10, 1e-4, 8, 10, 300, (1, 3), 0.95),
    "glue/cola": _platon(0.10, 1e-4, 32, 15, 500, (1, 3), 0.95),
    "glue/rte": Recipe("PINS", 0.80, 3e-5, 16, 20, None, 200, 200, 1200, 0.99, length=128),
    "stdlib": Recipe("pins_ext", 0.80, 1.5e-4, 16, None, 160, 16, 16, 48, 0.95, length=48),
}
