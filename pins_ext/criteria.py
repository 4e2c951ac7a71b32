"""Every criterion once: its name, and what a pruner must know of it beside its formula.

The formula of an instant score has three spellings: csrc/criteria.h, triton_kernels/criterion.py and, as the
specification, reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Criterion:
    """How the importance of a weight comes about.

    Attributes:
        name: as PruneConfig and the operators take it.
        instant: whether every gradient gives each weight an instant score, which the kernels compute and gather over
            windows; otherwise the score is read from the weights, as the operators' score kind of the same name does.
        smoothed: whether windows are averaged (PLATON, Zhang et al. 2022); otherwise their sum is the score.
        reads_moments: whether the score is made of AdamW's own moments.
        reads_update: whether the instant score needs the weight that the optimizer produces.
        reads_inputs: whether the score is made of the inputs of the weights' layers, which `prune_once` collects.
        zero_at_zero: whether a weight at exactly zero scores 0, so that under strict masks it could never return by its
            own score.
        signed: whether the score of a weight may be below zero.
        warning: what a user should know before choosing it.
    """

    name: str
    instant: bool = True
    smoothed: bool = True
    reads_moments: bool = False
    reads_update: bool = False
    reads_inputs: bool = False
    zero_at_zero: bool = False
    signed: bool = False
    warning: str = ""

    @property
    def reads_gradients(self) -> bool:
        """Whether gradients decide the score, at once or by what an optimizer makes of them."""
        return self.instant or self.reads_moments


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("pins"),
        Criterion(
            "pins-signed",
            signed=True,
            warning="collapsed to chance at 90 % sparsity in a trial: it is meant for ablations",
        ),
        Criterion("pins-update", reads_update=True),
        Criterion("platon", zero_at_zero=True),
        Criterion("movement", smoothed=False, zero_at_zero=True, signed=True),
        Criterion("magnitude", instant=False, smoothed=False, zero_at_zero=True),
        Criterion("fisher", instant=False, smoothed=False, reads_moments=True, zero_at_zero=True),
        Criterion("moments", instant=False, reads_moments=True),
        Criterion("wanda", instant=False, smoothed=False, reads_inputs=True, zero_at_zero=True),
    )
}

PRECOMPUTED = Criterion("precomputed", signed=True)
"""The criterion of the operators for scores that were computed elsewhere: a user's own function."""

INSTANT = tuple(c.name for c in (*CRITERIA.values(), PRECOMPUTED) if c.instant)
"""What the operators take as `criterion`, in the order of csrc/criteria.h."""

SCORES = ("product", "identity", "deviation", "magnitude", "fisher")
"""Kinds of score that the selection orders, in the order of csrc/criteria.h; reference.score says what they are."""
