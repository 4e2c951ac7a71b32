"""The settings of published results, PLATON (Zhang et al., ICML 2022) and PINS (Ren & Zhu, 2023), both for BERT-base;
and those of the embedded task, found by trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One of the choices of a published training.

    Attributes:
        text: what was done.
        flags: name -> value of the flags that do it here; none where it can't be done.
        nearest: flags that come near it.
    """

    text: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    nearest: str = ""


@dataclass(frozen=True)
class Recipe:
    """Training settings of one task.

    Attributes:
        task: as in --task.
        source: who trained so.
        sparsity: the target of that training.
        learning_rate: its peak.
        batch_size: examples per step.
        epochs: how long, or None where `steps` says it.
        steps: how long, or None where `epochs` says it.
        warmup_steps: of the learning rate: steps, or a share of training.
        warmup: steps before the sparsity schedule.
        cooldown: steps after the sparsity schedule.
        beta2: smoothing of the uncertainty.
        length: longest input in tokens, where it is stated.
        method: flags that make the method of that training.
        choices: of the published training, kept here or not.
    """

    task: str
    source: str
    sparsity: float
    learning_rate: float
    batch_size: int
    epochs: int | None
    steps: int | None
    warmup_steps: int | float
    warmup: int
    cooldown: int
    beta2: float
    length: int | None = None
    method: tuple[tuple[str, Any], ...] = (("criterion", "pins"),)
    choices: tuple[Choice, ...] = ()

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
            return flags | {"warmup_steps": self.warmup_steps if self.warmup_steps < 1 else 0.1}
        length = {"max_steps": self.steps} if self.steps else {"num_train_epochs": self.epochs}
        steps = {"warmup": self.warmup, "cooldown": self.cooldown, "warmup_steps": self.warmup_steps}
        return flags | length | steps

    def kept(self, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Returns which of the published choices a run keeps, and which it does not.

        Args:
            values: of all its flags, by name.
        """
        kept, lost = [], []
        for choice in self.choices:
            if choice.flags and all(values.get(name) == value for name, value in choice.flags.items()):
                kept.append(choice.text)
            else:
                lost.append(f"{choice.text} ({choice.nearest})" if choice.nearest else choice.text)
        return kept, lost


PLATON_CHOICES = (
    Choice("importance |p g| with the weight after the step, as its code computes it", {"criterion": "pins-update"}),
    Choice("Adamax", {"optimizer": "adamax"}),
    Choice("weight decay .01", {"weight_decay": 0.01}),
    Choice("a learning-rate warm-up over 10 % of training", {"warmup_steps": 0.1}),
    Choice("steps counted from 1, which puts one zero more into the first window"),
)

PINS_CHOICES = (
    Choice("200 warm-up steps of the learning rate", {"warmup_steps": 200}),
    Choice("no weight decay", {"weight_decay": 0.0}),
    Choice("biases pruned too", {"parameter_set": "released"}, "--parameter-set released does"),
    Choice("ties pruned strictly below the threshold", {"ties": "reference"}, "--ties reference does"),
    Choice(
        "a teacher chosen on the dev set every 50 steps, right after a mask",
        {"teacher": "best", "eval_strategy": "steps", "eval_steps": 50},
        "--teacher best --eval-steps 50 comes near",
    ),
    Choice("AdamW of old transformers, whose eps stands outside the bias correction"),
    Choice("the learning rate of step t + 1 at step t, as its scheduler stepped before the optimizer"),
)


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
    """As PLATON's table has it: the share that remains, and the schedule in multiples of its warm-up.

    The scripts' warmup_steps drive the sparsity schedule alone.
    """
    before, after = (multiple * warmup for multiple in multiples)
    method = (("criterion", "pins-update"), ("teacher", "none"), ("optimizer", "adamax"), ("weight_decay", 0.01))
    return Recipe(
        task, "PLATON", 1 - remaining, lr, batch, epochs, None, 0.1, before, after, beta2,
        method=method, choices=PLATON_CHOICES,
    )  # fmt: skip


# The first recipe of a task is the one that a bare --recipe means.
RECIPES: Mapping[str, Recipe] = {
    "pins-rte": Recipe(
        "glue/rte", "PINS", 0.80, 3e-5, 16, 20, None, 200, 200, 1200, 0.99, length=128, choices=PINS_CHOICES
    ),
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
