"""The settings of published results, PLATON (Zhang et al., ICML 2022) and PINS (Ren & Zhu, 2023), both for BERT-base;
and those of the embedded task, found by trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Training settings of one task.

    Attributes:
        task: as in --task. source: who trained so. sparsity: the target of that training.
        learning_rate, batch_size: of AdamW. length: longest input in tokens, where it is stated.
        epochs or steps: how long; one of the two is None.
        warmup_steps: of the learning rate.
        warmup, cooldown: steps before and after the sparsity schedule.
        beta2: smoothing of the uncertainty.
        method: flags that make the method of that training.
    """

    task: str
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
    method: tuple[tuple[str, str], ...] = (("criterion", "pins"),)

    def flags(self, own_length: bool = False) -> dict[str, Any]:
        """The settings as flags, by name.

        Args:
            own_length: the user says how long to train, so the recipe's numbers of steps don't apply.
        """
        flags: dict[str, Any] = {
            **dict(self.method),
            "sparsity": self.sparsity,
            "beta1": 0.85,
            "beta2": self.beta2,
            "delta_t": 10,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch_size,
        }
        if self.length is not None:
            flags["max_length"] = self.length
        if own_length:
            return flags | {"warmup_steps": 0.1}
        length = {"max_steps": self.steps} if self.steps else {"num_train_epochs": self.epochs}
        steps = {"warmup": self.warmup, "cooldown": self.cooldown, "warmup_steps": self.warmup_steps}
        return flags | length | steps


def _platon(
    task: str,
    remaining: float,
    lr: float,
    batch: int,
    epochs: int,
    warmup: int,
    multiples: tuple[int, int],
    beta2: float,
) -> Recipe:
    """As PLATON's table has it: the share that remains, and the schedule in multiples of the warm-up."""
    before, after = (multiple * warmup for multiple in multiples)
    method = (("criterion", "platon"), ("teacher", "none"))
    return Recipe(task, "PLATON", 1 - remaining, lr, batch, epochs, None, warmup, before, after, beta2, method=method)


# The first recipe of a task is the one that a bare --recipe means.
RECIPES: Mapping[str, Recipe] = {
    "pins-rte": Recipe("glue/rte", "PINS", 0.80, 3e-5, 16, 20, None, 200, 200, 1200, 0.99, length=128),
    "platon-rte": _platon("glue/rte", 0.20, 1e-4, 16, 20, 200, (1, 6), 0.95),
    "platon-mnli": _platon("glue/mnli", 0.20, 8e-5, 32, 8, 5400, (1, 5), 0.95),
    "platon-qqp": _platon("glue/qqp", 0.20, 1e-4, 32, 10, 5400, (1, 5), 0.85),
    "platon-sst2": _platon("glue/sst2", 0.10, 8e-5, 32, 6, 1000, (1, 5), 0.85),
    "platon-qnli": _platon("glue/qnli", 0.10, 1e-4, 32, 10, 2000, (1, 6), 0.90),
    "platon-stsb": _platon("glue/stsb", 0.10, 1e-4, 16, 15, 500, (1, 5), 0.85),
    "platon-mrpc": _platon("glue/mrpc", 0.10, 1e-4, 8, 10, 300, (1, 3), 0.95),
    "platon-cola": _platon("glue/cola", 0.10, 1e-4, 32, 15, 500, (1, 3), 0.95),
    "platon-squad": _platon("squad", 0.10, 3e-5, 16, 10, 5400, (1, 5), 0.95),
    "stdlib": Recipe("stdlib", "pins_ext", 0.80, 1.5e-4, 16, None, 160, 16, 16, 48, 0.95, length=48),
}

TRAINING_EXAMPLES: Mapping[str, int] = {
    "glue/mnli": 392_702,
    "glue/qqp": 363_846,
    "glue/qnli": 104_743,
    "glue/sst2": 67_349,
    "glue/cola": 8_551,
    "glue/stsb": 5_749,
    "glue/mrpc": 3_668,
    "glue/rte": 2_490,
    "squad": 87_599,
}
"""Published sizes of the training sets: GLUE as on the hub; of SQuAD 1.1 the questions, each at least one input."""


def recipe_for(task: str) -> str | None:
    """The name of the task's own recipe."""
    return next((name for name, recipe in RECIPES.items() if recipe.task == task), None)
