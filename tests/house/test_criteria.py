"""A criterion is a formula in three spellings and a line in one table; no other file of the core knows its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pins_ext import ops, reference
from pins_ext.criteria import CRITERIA, INSTANT, SCORES
from pins_ext.pruning.config import PruneConfig

ROOT = Path(__file__).parents[2]
CORE = ("csrc", "triton_kernels", "pins_ext/ops", "pins_ext/optim", "pins_ext/pruning", "pins_ext/integrations")
RECIPE = {"csrc/criteria.h", "triton_kernels/criterion.py", "pins_ext/reference.py", "pins_ext/criteria.py"}


def listed(macro: str) -> tuple[str, ...]:
    """The names in a list of the C++ header."""
    header = (ROOT / "csrc/criteria.h").read_text()
    lines = re.search(rf"#define {macro}\(X\).*?(?=\n\n|\Z)", header, re.DOTALL)
    assert lines is not None
    return tuple(re.findall(r'X\(\w+, "([\w-]+)"', lines[0]))


def test_the_header_and_the_table_agree() -> None:
    assert listed("PINS_CRITERIA") == INSTANT == ops.CRITERIA
    assert listed("PINS_SCORES") == SCORES == ops.SCORES


@pytest.mark.parametrize("name", [name for name, c in CRITERIA.items() if c.instant and name != "pins"])
def test_a_name_stands_in_the_places_of_the_recipe_alone(name: str) -> None:
    """All but "pins", the default of several options."""
    files = [path for folder in CORE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp")]
    files += [p for f in CORE for pattern in ("*.inl", "*.cu", "*.cuh") for p in (ROOT / f).rglob(pattern)]
    files += [ROOT / name for name in RECIPE]
    quoted = {str(path.relative_to(ROOT)) for path in files if f'"{name}"' in path.read_text()}
    assert quoted == RECIPE


@pytest.mark.parametrize("name", CRITERIA)
def test_the_table_says_what_the_formula_does(name: str) -> None:
    """Whether a zero weight scores 0, and whether the updated weight is read."""
    criterion, p, g = CRITERIA[name], torch.tensor([0.0, 0.5]), torch.tensor([0.25, 0.25])
    if criterion.reads_moments:
        moments = torch.ones(2)
        if criterion.smoothed:
            score = reference.moments(p, moments, moments, torch.tensor([0.1, 1.0, 1.0]))
        else:
            score = reference.score(name, p, moments)
        assert (float(score[0]) == 0) == criterion.zero_at_zero
        return
    if criterion.reads_inputs:
        assert reference.wanda(p[None], torch.ones(3, 2))[0].eq(0).tolist() == [True, False]
        assert criterion.zero_at_zero
        return
    if not criterion.instant:
        assert reference.score(name, p)[0] == 0
        return
    here, later = (reference.instant_score(name, p, p_next, g, 0.1) for p_next in (p, p + 1))
    assert bool((here != later).any()) == criterion.reads_update
    assert (float(reference.instant_score(name, p, p + 1, g, 0.1)[0]) == 0) == criterion.zero_at_zero
    assert PruneConfig(criterion=name).rule is criterion
