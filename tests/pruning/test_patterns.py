"""N:M and blocks against an oracle on sorted scores: odd sizes, ties, NaN, mixes with a global budget, bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pins_ext import PruneConfig, ops, reference
from pins_ext.distributed.ranks import Ranks
from pins_ext.patterns import Fit, Pattern
from pins_ext.pruning.masks import Masks
from pins_ext.pruning.patterns import fitted, input_axes
from pins_ext.pruning.scopes import Scopes
from pins_ext.pruning.scores import Operands
from pins_ext.pruning.units import Units

LOWEST = torch.finfo(torch.float32).min


def fit(name: str, axis: int = -1) -> Fit:
    pattern = Pattern.parse(name)
    assert pattern is not None
    return Fit(pattern, axis)


def chosen(
    scores: list[Tensor], fits: list[Fit | None], config: PruneConfig, ratio: float
) -> tuple[list[Tensor], Masks]:
    """Keep masks of a selection, through the packed bits, and what chose them."""
    names = [f"layer.{i}.weight" for i in range(len(scores))]
    layout, ranks = ops.Layout.of(scores), Ranks(scores)
    scopes = Scopes(names, [s.numel() for s in scores], config, fits)
    masks = Masks(scores, layout, scopes, config, ranks)
    score = Operands("identity", scores, [])
    units = Units(scores, names, fits, layout).scored(score)
    masks._pack(score, masks.selection.cutoffs(score, ratio, units=units).expand(len(scores), 2), units)
    return [masks.keep(i, s.shape) for i, s in enumerate(scores)], masks


def units_of(score: Tensor, fit: Fit | None) -> tuple[Tensor, Tensor, int]:
    """Order keys of what competes in a tensor, which of them can be pruned, and the weights of one."""
    if fit is None:
        return reference.order_key(score).flatten(), torch.ones(score.numel(), dtype=torch.bool), 1
    if fit.pattern.grouped:
        best = reference.group_mask(score, fit.pattern.keep, fit.pattern.of, fit.axis)
        scores = reference.eligible(score, fit.pattern.keep, fit.pattern.of, fit.axis)
        return reference.order_key(scores).flatten(), ~best.flatten(), 1
    sums = reference.block_scores(score, *fit.cells)
    return reference.order_key(sums).flatten(), torch.ones(sums.numel(), dtype=torch.bool), math.prod(fit.cells)


def oracle(
    scores: list[Tensor],
    fits: list[Fit | None],
    n: int,
    at_the_end: int,
    least: list[int] | None = None,
    most: list[int] | None = None,
) -> list[Tensor]:
    """One region, by sorting: shares of the kinds of units, then the lowest of each by (score, place)."""
    found = [units_of(s, f) for s, f in zip(scores, fits, strict=True)]
    kinds = [("group" if f is not None and f.pattern.grouped else "block" if f is not None else "weight", size)
             for f, (_, _, size) in zip(fits, found, strict=True)]  # fmt: skip
    counts = shares(
        kinds, [int(can.sum()) * size for _, can, size in found], [s.numel() for s in scores], n, at_the_end
    )
    kept = [torch.ones(len(keys), dtype=torch.bool) for keys, _, _ in found]
    for kind, count in counts.items():
        order = sorted(
            (int(keys[j]), i, j)
            for i, (keys, can, _) in enumerate(found)
            if kinds[i] == kind
            for j in range(len(keys))
            if can[j]
        )
        room = {i: [0, 1 << 60] for i in range(len(scores))}
        if least is not None and most is not None:
            best = {i: int((~can).sum()) for i, (_, can, _) in enumerate(found)}
            room = {i: [max(0, -(-least[i] // kind[1]) - best[i]), most[i] // kind[1] - best[i]] for i in room}
        keep = len(order) - count
        taken = dict.fromkeys(room, 0)
        stays = set()
        for _, i, j in reversed(order):
            if taken[i] < room[i][0]:
                taken[i] += 1
                stays.add((i, j))
        for _, i, j in reversed(order):
            if (i, j) not in stays and len(stays) < keep and taken[i] < room[i][1]:
                taken[i] += 1
                stays.add((i, j))
        for _, i, j in order:
            kept[i][j] = (i, j) in stays
    masks = []
    for s, f, bits in zip(scores, fits, kept, strict=True):
        if f is None or f.pattern.grouped:
            masks.append(bits.view(s.shape))
        else:
            a, b = f.cells
            masks.append(bits.view(f.divided(s.shape)).repeat_interleave(a, -2).repeat_interleave(b, -1))
    return masks


def shares(
    kinds: list[tuple[str, int]], prunable: list[int], sizes: list[int], n: int, at_the_end: int
) -> dict[tuple[str, int], int]:
    """Units to prune of each kind, in plain words of docs/concepts/patterns.md."""
    room = {kind: sum(p for k, p in zip(kinds, prunable, strict=True) if k == kind) for kind in set(kinds)}
    groups = room.get(("group", 1), 0)
    counts = {("group", 1): min(groups, groups * n // at_the_end) if at_the_end else 0} if groups else {}
    rest = n - sum(counts.values())
    others = sum(size for k, size in zip(kinds, sizes, strict=True) if k[0] != "group")
    blocks = sorted((k for k in room if k[0] == "block"), key=lambda k: -k[1])
    for kind in blocks:
        counts[kind] = rest * room[kind] // (others * kind[1])
    left = rest - sum(counts[k] * k[1] for k in blocks)
    if ("weight", 1) in room:
        counts["weight", 1] = min(room["weight", 1], left)
        left -= counts["weight", 1]
    for kind in blocks:
        more = min(left // kind[1], room[kind] // kind[1] - counts[kind])
        counts[kind] += more
        left -= more * kind[1]
    return counts


def drawn(generator: torch.Generator, shape: tuple[int, ...], levels: int, odd: bool) -> Tensor:
    """Scores with many ties, of either sign; some not finite."""
    x = (torch.randn(shape, generator=generator) * levels).round() / levels
    if odd:
        # NaN of any bits are one: here also a negative one and one with a payload.
        nans = torch.tensor([-1, 0x7F800001], dtype=torch.int32).view(torch.float32)
        for value in (*nans, *torch.tensor([math.nan, math.inf, -math.inf, -0.0, LOWEST])):
            x = torch.where(torch.rand(shape, generator=generator) < 0.08, value, x)
    return x


SHAPES: list[tuple[tuple[int, ...], str | None, int]] = [
    ((6, 8), "2:4", -1),
    ((8, 6), "2:4", -2),
    ((3, 8, 5), "4:8", -2),
    ((2, 5, 12), "1:4", -1),
    ((5, 9), "1:3", -1),
    ((8, 3), "4x1", -1),
    ((3, 8), "4x1", -2),
    ((2, 6, 10), "3x5", -1),
    ((32, 16), "16x16", -1),
    ((7, 5), None, -1),
    ((11,), None, -1),
    ((1, 1), None, -1),
]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    which=st.lists(st.integers(0, len(SHAPES) - 1), min_size=1, max_size=5),
    progress=st.sampled_from([0.0, 0.3, 0.77, 1.0]),
    beyond=st.floats(0, 1),
    levels=st.sampled_from([1, 3, 1000]),
    odd=st.booleans(),
)
def test_patterns_equal_the_sorting_oracle(
    seed: int, which: list[int], progress: float, beyond: float, levels: int, odd: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen_shapes = [SHAPES[i] for i in which]
    scores = [drawn(generator, shape, levels, odd) for shape, _, _ in chosen_shapes]
    fits = [fit(name, axis) if name is not None else None for _, name, axis in chosen_shapes]
    total = sum(s.numel() for s in scores)
    fixed = sum(int(units_of(s, f)[1].sum()) for s, f in zip(scores, fits, strict=True) if f and f.pattern.grouped)
    others = sum(s.numel() for s, f in zip(scores, fits, strict=True) if not (f and f.pattern.grouped))
    at_the_end = fixed + int(beyond * others)
    assume(0 < at_the_end < total)
    config = PruneConfig(sparsity=at_the_end / total)
    n = round(progress * at_the_end)
    masks, state = chosen(scores, fits, config, 1 - n / total)
    expected = oracle(scores, fits, n, at_the_end)
    assert [m.tolist() for m in masks] == [m.tolist() for m in expected]
    kept, _, nan = state.counts()
    assert kept == sum(int(m.sum()) for m in masks)
    assert nan == sum(int(s.isnan().sum()) for s in scores)
    if progress == 1:
        # Exact, but for less than one block where there is nothing else to prune.
        largest = max([math.prod(f.cells) for f in fits if f and not f.pattern.grouped], default=1)
        assert 0 <= at_the_end - (total - kept) < largest


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    names=st.one_of(
        st.sampled_from([["2:4", "2:4", None, "2:4"], ["4x1", "4x1", None, "4x1"], ["2x2", "2x2", None, "2x2"]]),
        st.lists(st.sampled_from(["2:4", "1:4", "4x1", "2x2", None]), min_size=4, max_size=4),
    ),
    progress=st.sampled_from([0.4, 1.0]),
    floor=st.sampled_from([0.0, 0.1, 0.3]),
    ceiling=st.sampled_from([0.6, 0.75, 1.0]),
    scope=st.sampled_from(["global", "layer", "groups"]),
    odd=st.booleans(),
)
def test_floors_and_ceilings_stay_exact_with_patterns(
    seed: int, names: list[str | None], progress: float, floor: float, ceiling: float, scope: str, odd: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 8), (4, 12), (6, 5), (16, 4)]
    # So far apart that floors and ceilings bind.
    scores = [drawn(generator, shape, 3, odd).abs() * 4**k for k, shape in enumerate(shapes)]
    fits = [fit(name) if name and fit(name).misfit(shape) is None else None
            for name, shape in zip(names, shapes, strict=True)]  # fmt: skip
    sizes = [s.numel() for s in scores]
    sparsity = 0.5
    asked: Any = {"first": ["layer.0.*", "layer.1.*"]} if scope == "groups" else scope
    config = PruneConfig(sparsity=sparsity, min_density=floor, max_density=ceiling, scope=asked)
    least = [math.ceil(floor * n - 1e-9) for n in sizes]
    most = [math.floor(ceiling * n + 1e-9) for n in sizes]
    regions = {"global": [[0, 1, 2, 3]], "layer": [[0], [1], [2], [3]], "groups": [[0, 1], [2, 3]]}[scope]
    try:
        masks, _ = chosen(scores, fits, config, 1 - progress * sparsity)
    except ValueError as error:
        # What patterns fix, or on so few weights a rounding, can make them contradict each other.
        assume("densities" not in str(error) and "the sparsity asks for" not in str(error))
        raise
    expected: dict[int, Tensor] = {}
    for region in regions:
        total = sum(sizes[i] for i in region)
        end = total - round((1 - sparsity) * total)
        n = total - round((1 - progress * sparsity) * total)
        of = [[values[i] for i in region] for values in (scores, fits, least, most)]
        expected |= dict(zip(region, oracle(*of[:2], n, end, *of[2:]), strict=True))  # type: ignore[arg-type]
    assert [m.tolist() for m in masks] == [expected[i].tolist() for i in range(len(scores))]
    for mask, low, high, f in zip(masks, least, most, fits, strict=True):
        assert low <= int(mask.sum()) <= high
        assert f is None or (f.pattern.grouped and progress < 1) or f.violations(mask) == 0


def test_impossible_sums_are_refused_in_words() -> None:
    scores = [torch.rand(8, 8), torch.rand(8, 8)]
    with pytest.raises(ValueError, match=r"exactly 64: set sparsity to 0\.5"):
        chosen(scores, [fit("2:4"), fit("2:4")], PruneConfig(sparsity=0.8), 0.2)
    with pytest.raises(ValueError, match=r"32 to 96: set sparsity to 0\.25 to 0\.75"):
        chosen(scores, [fit("2:4"), None], PruneConfig(sparsity=0.8), 0.2)
    with pytest.raises(ValueError, match=r"32 to 96"):
        chosen(scores, [fit("2:4"), fit("4x1")], PruneConfig(sparsity=0.2), 0.8)
    config = PruneConfig(sparsity=0.5, min_density={"*1*": 0.6})
    with pytest.raises(ValueError, match=r"layer\.1\.weight: the pattern 2:4 keeps 32 of its 64 weights"):
        chosen(scores, [None, fit("2:4")], config, 0.5)


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2:64", "1x1", "4x", "x4", "blocks", "", "2:4 ", "999x999"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no pattern; there are none, N:M"):
        PruneConfig(pattern=text)
    with pytest.raises(ValueError, match="is no pattern"):
        PruneConfig(pattern={"*": text})


def test_settings_that_leave_a_pattern_no_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="exact count"):
        PruneConfig(pattern="2:4", ties="reference")
    with pytest.raises(ValueError, match="needs zeros"):
        PruneConfig(pattern="2:4", sparsity=0.0)
    with pytest.raises(ValueError, match="pattern must be"):
        PruneConfig(pattern=24)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pattern must be"):
        PruneConfig(pattern={})


def test_the_input_dimension_is_the_modules_own() -> None:
    from transformers.pytorch_utils import Conv1D

    class Experts(nn.Module):
        def __init__(self, transposed: bool | None) -> None:
            super().__init__()
            if transposed is not None:
                self.is_transposed = transposed
            self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 4))

    model = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 4),
            "conv": Conv1D(4, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "experts": Experts(False),
            "transposed": Experts(True),
            "unknown": Experts(None),
        }
    )
    axes = input_axes(model)
    assert axes["linear.weight"] == -1
    assert axes["conv.weight"] == -2
    assert axes["attention.in_proj_weight"] == axes["attention.out_proj.weight"] == -1
    assert axes["experts.gate_up_proj"] == -1
    assert axes["transposed.gate_up_proj"] == -2
    assert "unknown.gate_up_proj" not in axes
    parameters = dict(model.named_parameters())
    parameters = {name: parameters[name] for name in ("linear.weight", "conv.weight", "unknown.gate_up_proj")}
    fits, notes = fitted(model, parameters, PruneConfig(pattern="2:4"))
    assert [f and f.cells for f in fits] == [(1, 4), (4, 1), None]
    assert len(notes) == 1
    assert "unknown.gate_up_proj is pruned without the pattern 2:4: no module says" in notes[0]
    with pytest.raises(ValueError, match="matches no pruned parameter"):
        fitted(model, parameters, PruneConfig(pattern={"nothing": "2:4"}))
    with pytest.raises(ValueError, match="fits no pruned tensor"):
        fitted(model, parameters, PruneConfig(pattern="7x1"))
