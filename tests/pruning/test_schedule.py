"""Remaining ratio and mask steps."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from pins_ext.pruning.config import SCHEDULES, PruneConfig
from pins_ext.pruning.schedule import Schedule, n_prune
from pins_ext.reference import cubic_remaining_ratio


def schedule(total: int = 100, **options: object) -> Schedule:
    return Schedule.of(PruneConfig(**({"sparsity": 0.8, "warmup": 10, "cooldown": 30} | options)), total)  # type: ignore[arg-type]


def test_cubic_equals_the_reference_at_every_step() -> None:
    s = schedule()
    expected = [cubic_remaining_ratio(t, 100, 10, 30, 1.0, 1 - 0.8) for t in range(110)]
    assert [s.remaining_ratio(t) for t in range(110)] == expected


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_starts_dense_ends_at_the_target_and_never_grows_back(kind: str) -> None:
    s = schedule(schedule=kind)
    ratios = [s.remaining_ratio(t) for t in range(100)]
    assert ratios[10] == 1.0
    assert ratios[71:] == [1 - 0.8] * 29
    assert ratios == sorted(ratios, reverse=True)


def test_the_shapes_differ() -> None:
    middle = {kind: schedule(schedule=kind).remaining_ratio(30) for kind in SCHEDULES}
    assert len(set(middle.values())) == 5
    assert middle["constant"] < middle["cubic"] < middle["linear"] < middle["cosine"] < middle["one-shot"] == 1.0


def test_masks_are_due_at_window_ends_and_after_the_ramp_at_every_step() -> None:
    due = [t for t in range(100) if schedule().mask_due(t)]
    assert due == [20, 30, 40, 50, 60, 70, *range(71, 100)]


def test_shares_of_training_become_steps() -> None:
    s = Schedule.of(PruneConfig(warmup=0.1, cooldown=0.3), 1000)
    assert (s.initial_warmup, s.final_cooldown) == (100, 300)
    assert Schedule.of(PruneConfig(warmup=0.0, cooldown=0.0), 5).final_cooldown == 2


def test_a_schedule_longer_than_training_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than training"):
        schedule(total=39)


def test_a_callable_schedule_is_asked_and_checked() -> None:
    s = schedule(schedule=lambda t: 1 - t / 200)
    assert s.remaining_ratio(50) == 0.75
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        s.remaining_ratio(200)


@pytest.mark.parametrize("number", [float, np.float32, np.float16, torch.tensor])
def test_a_callable_schedule_may_return_any_number(number: Any) -> None:
    ratio = schedule(schedule=lambda t: number(1 / 3)).remaining_ratio(3)
    assert type(ratio) is float
    assert n_prune(4123 * 4567, ratio, exact=True) == 4123 * 4567 - round(ratio * 4123 * 4567)


@pytest.mark.parametrize("wrong", [None, "half", float("nan"), 0, 1.5, [0.5]])
def test_what_is_no_ratio_is_named(wrong: Any) -> None:
    s = schedule(schedule=lambda t: wrong)
    with pytest.raises(ValueError, match=re.escape(f"returned a remaining ratio of {wrong!r} at step 3")):
        s.remaining_ratio(3)


@pytest.mark.parametrize(
    ("n", "ratio", "exact", "expected"), [(10, 0.25, True, 8), (10, 0.25, False, 7), (7, 1.0, True, 0)]
)
def test_count(n: int, ratio: float, exact: bool, expected: int) -> None:
    assert n_prune(n, ratio, exact) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "^sparsity must be"),
        ({"sparsity": -0.1}, "^sparsity must be"),
        ({"sparsity": float("nan")}, "^sparsity must be"),
        ({"initial_sparsity": 0.9}, "^initial_sparsity must be"),
        ({"criterion": "taylor"}, "criterion must be one of pins, "),
        ({"delta_t": 0}, "delta_t must be an integer"),
        ({"beta1": 1.0}, "^beta1 must be"),
        ({"beta2": 1.5}, "^beta2 must be"),
        ({"warmup": -1}, "warmup must be"),
        ({"cooldown": 1.5}, "cooldown must be"),
        ({"scope": "world"}, "scope must be"),
        ({"scope": {}}, "scope must be"),
        ({"min_density": 2.0}, "min_density"),
        ({"ties": "reference", "min_density": 0.1}, "exact count"),
        ({"state_dtype": "int8"}, "state_dtype must be one of"),
    ],
)
def test_a_bad_value_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneConfig(**options)  # type: ignore[arg-type]
