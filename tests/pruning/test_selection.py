"""Scopes, floors and ceilings against a greedy oracle on sorted scores."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pins_ext import Pruner, ops, reference
from pins_ext.distributed.ranks import Ranks
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.scopes import Scopes
from pins_ext.pruning.scores import Operands
from pins_ext.pruning.selection import Selection


def prune(scores: list[Tensor], config: PruneConfig, ratio: float) -> list[Tensor]:
    """Keep masks chosen by the selection."""
    names = [f"layer.{i}.weight" for i in range(len(scores))]
    layout = ops.Layout.of(scores)
    selection = Selection(Scopes(names, [len(s) for s in scores], config), layout, Ranks(scores))
    table = selection.cutoffs(Operands("identity", scores, []), ratio)
    table = table.expand(len(scores), 2)
    return [
        reference.keep_mask(reference.order_key(s), reference.global_index(layout.places[i]), tuple(table[i].tolist()))
        for i, s in enumerate(scores)
    ]


def greedy(scores: list[Tensor], keep: int, least: list[int], most: list[int]) -> list[Tensor]:
    """Each tensor's own top `least`, then the best of all tensors still below `most`."""
    everything = torch.cat(scores)
    owner = torch.cat([torch.full_like(s, i).long() for i, s in enumerate(scores)])
    order = torch.argsort(everything, stable=True).flip(0).tolist()
    kept, count = torch.zeros(len(everything), dtype=torch.bool), [0] * len(scores)
    for position in order:
        if count[owner[position]] < least[owner[position]]:
            kept[position] = True
            count[owner[position]] += 1
    for position in order:
        if not kept[position] and int(kept.sum()) < keep and count[owner[position]] < most[owner[position]]:
            kept[position] = True
            count[owner[position]] += 1
    return list(kept.split([s.numel() for s in scores]))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    sparsity=st.sampled_from([0.1, 0.5, 0.8]),
    floor=st.floats(0, 0.2),
    ceiling=st.floats(0.9, 1.0),
    levels=st.sampled_from([3, 1000]),
)
def test_densities_equal_the_greedy_oracle(
    seed: int, sizes: list[int], sparsity: float, floor: float, ceiling: float, levels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(len(sizes), generator=generator) * 4
    scores = [(torch.rand(n, generator=generator) * s * levels).round() for n, s in zip(sizes, scales, strict=True)]
    config = PruneConfig(sparsity=sparsity, min_density=floor, max_density=ceiling)
    ratio = 1 - sparsity
    keep = round(ratio * sum(sizes))
    # On so few weights rounding can make densities contradict each other or the sparsity.
    least = [math.ceil(Fraction(str(floor)) * n) for n in sizes]
    most = [math.floor(Fraction(str(ceiling)) * n) for n in sizes]
    fits = all(a <= b for a, b in zip(least, most, strict=True)) and sum(least) <= keep <= sum(most)
    if not fits:
        with pytest.raises(ValueError, match=r"do not allow|lies above"):
            prune(scores, config, ratio)
        return
    masks = prune(scores, config, ratio)
    expected = greedy(scores, keep, least, most)
    assert [m.tolist() for m in masks] == [m.tolist() for m in expected]
    assert sum(int(m.sum()) for m in masks) == keep


def test_global_scope_lets_layers_differ_and_layer_scope_does_not() -> None:
    scores = [torch.arange(1.0, 101.0), torch.arange(101.0, 201.0)]
    world = prune(scores, PruneConfig(sparsity=0.5), 0.5)
    assert [int(m.sum()) for m in world] == [0, 100]
    layer = prune(scores, PruneConfig(sparsity=0.5, scope="layer"), 0.5)
    assert [int(m.sum()) for m in layer] == [50, 50]


def test_groups_compete_among_themselves_and_the_rest_is_one_more_group() -> None:
    scores = [torch.arange(1.0, 101.0) * (i + 1) for i in range(4)]
    config = PruneConfig(sparsity=0.5, scope={"first": ("layer.0.*", "layer.1.*")})
    kept = [int(m.sum()) for m in prune(scores, config, 0.5)]
    assert kept[0] + kept[1] == 100
    assert kept[2] + kept[3] == 100
    assert kept[0] < kept[1]


def test_bad_densities_and_groups_say_what_is_wrong() -> None:
    scores = [torch.rand(100), torch.rand(100)]
    with pytest.raises(ValueError, match="at least 160"):
        prune(scores, PruneConfig(sparsity=0.8, min_density=0.8), 0.2)
    with pytest.raises(ValueError, match="allows at most 20"):
        prune(scores, PruneConfig(sparsity=0.8, max_density=0.1), 0.2)
    with pytest.raises(ValueError, match="above max_density"):
        prune(scores, PruneConfig(min_density=0.5, max_density={"layer.1.*": 0.1}), 0.2)
    with pytest.raises(ValueError, match="matches no pruned parameter"):
        prune(scores, PruneConfig(min_density={"nothing*": 0.5}), 0.2)
    with pytest.raises(ValueError, match="the group 'g' matches"):
        prune(scores, PruneConfig(scope={"g": ("nothing*",)}), 0.2)


@pytest.mark.parametrize(
    ("sparsity", "options"),
    [
        (0.93, {"min_density": 0.07}),
        (0.93, {"min_density": 0.07, "max_density": 0.07}),
        (0.71, {"max_density": 0.29}),
        (0.71, {"max_density": 0.29, "scope": "layer"}),
    ],
    ids=str,
)
def test_densities_are_the_decimal_numbers_that_were_written(sparsity: float, options: dict[str, Any]) -> None:
    scores = [torch.arange(1.0, 101.0), torch.arange(1.0, 101.0)]
    masks = prune(scores, PruneConfig(sparsity=sparsity, **options), 1 - sparsity)
    assert [int(m.sum()) for m in masks] == [round(100 * (1 - sparsity))] * 2


def test_early_in_the_schedule_ceilings_bend_the_target_instead_of_failing() -> None:
    scores = [torch.rand(100), torch.rand(100)]
    masks = prune(scores, PruneConfig(sparsity=0.8, max_density=0.5), 1.0)
    assert [int(m.sum()) for m in masks] == [50, 50]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("more", [{}, {"pattern": "4x1"}, {"criterion": "magnitude"}])
def test_bounds_without_a_choice(scope: str, more: dict[str, Any]) -> None:
    """Equal ones ask for the same sparsity in every tensor, on the way there too."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = PinsAdamW(model.parameters())
    config = PruneConfig(sparsity=0.5, delta_t=2, min_density=0.5, max_density=0.5, scope=scope, **more)
    pruner = Pruner(model, optimizer, config, 12)
    for _ in range(12):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    pruner.finalize()
    assert [int((model.get_parameter(name) == 0).sum()) for name in pruner.names] == [128, 64]


def test_bounds_that_round_to_one_count() -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = Pruner(
        model, optimizer, PruneConfig(sparsity=0.5, delta_t=2, scope="layer", min_density=0.3, max_density=0.7), 12
    )
    for _ in range(12):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.finalize()["zeros"] == 34
