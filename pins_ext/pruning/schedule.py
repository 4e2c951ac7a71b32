"""How much is kept at each step, and which steps choose a mask: pure functions of the step."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from pins_ext.pruning.config import PruneConfig, RatioFunction


@dataclass(frozen=True)
class Schedule:
    """The remaining ratio over a training run (PLATON, Zhang et al. 2022; cubic: Zhu & Gupta 2017).

    Attributes:
        total: steps of the run.
        initial_warmup: last step before the schedule.
        final_cooldown: steps at the end.
        initial_ratio: share of the prunable weights that is kept at the beginning.
        final_ratio: share that is kept at the end.
        delta_t: steps between masks while the schedule runs.
        kind: cubic | linear | cosine | constant (the final ratio right after the warm-up) | one-shot (dense until the
            cool-down, then one mask for good) | a function of the step that returns the remaining ratio.
    """

    total: int
    initial_warmup: int
    final_cooldown: int
    initial_ratio: float
    final_ratio: float
    delta_t: int
    kind: str | RatioFunction

    @staticmethod
    def of(config: PruneConfig, total_steps: int) -> Schedule:
        """Resolve shares of training into steps.

        Raises:
            TypeError: total_steps is no integer.
            ValueError: warm-up and cool-down together are longer than training.
        """
        try:
            total_steps = operator.index(total_steps)
        except TypeError:
            raise TypeError(f"total_steps must be an integer, got {total_steps!r}") from None
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        warmup = config.warmup if isinstance(config.warmup, int) else round(config.warmup * total_steps)
        cooldown = config.cooldown if isinstance(config.cooldown, int) else max(2, round(config.cooldown * total_steps))
        if warmup + cooldown > total_steps:
            raise ValueError(
                f"the schedule is longer than training: warmup of {warmup} and cooldown of {cooldown} steps "
                f"do not fit into {total_steps}; shorten them or train longer"
            )
        return Schedule(
            total_steps,
            warmup,
            cooldown,
            1 - config.initial_sparsity,
            1 - config.sparsity,
            config.delta_t,
            config.schedule,
        )

    @property
    def final_start(self) -> int:
        """First step at the final ratio."""
        return self.total - self.final_cooldown + 1

    def remaining_ratio(self, t: int) -> float:
        """Share of the prunable weights kept at step t (from 0)."""
        if callable(self.kind):
            given = self.kind(t)
            try:
                ratio = float(given)  # counts are exact in Python's own numbers
            except (TypeError, ValueError):
                ratio = math.nan
            if not 0 < ratio <= 1:
                raise ValueError(
                    f"the schedule returned a remaining ratio of {given!r} at step {t}; it must be in (0, 1]"
                )
            return ratio
        if t <= self.initial_warmup:
            return self.initial_ratio
        if t >= self.final_start or self.kind == "constant":
            return self.final_ratio
        if self.kind == "one-shot":
            return self.initial_ratio
        progress = (t - self.initial_warmup) / (self.total - self.initial_warmup - self.final_cooldown)
        left = {"cubic": (1 - progress) ** 3, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return self.final_ratio + (self.initial_ratio - self.final_ratio) * left[self.kind]

    def mask_due(self, t: int) -> bool:
        """Whether weights are zeroed after step t: every delta_t steps while the schedule runs, every step after it."""
        if t <= self.initial_warmup:
            return False
        return t >= self.final_start or t % self.delta_t == 0

    def is_new_mask(self, t: int) -> bool:
        """Whether the mask of step t is one of its own, not merely the last one again."""
        return self.mask_due(t) and (t % self.delta_t == 0 or t == self.final_start)

    def selects_once(self, t: int) -> bool:
        """Whether the mask chosen at t stays for good (one-shot pruning)."""
        return self.kind == "one-shot" and t >= self.final_start


def n_prune(n_weights: int, remaining_ratio: float, exact: bool) -> int:
    """How many of n weights a remaining ratio prunes; the released rule (exact=False) truncates instead of rounding."""
    return n_weights - round(remaining_ratio * n_weights) if exact else int(n_weights * (1 - remaining_ratio))
