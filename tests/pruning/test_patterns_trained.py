"""Training, resuming, verifying, planning and starting over with N:M and blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_patterns import fit
from torch import Tensor, nn

from pins_ext import PruneConfig, Pruner, ops, prune_once, reference
from pins_ext.optim import PinsAdamW
from pins_ext.patterns import recognised
from pins_ext.pruning.plan import ConflictWarning


def trained(model: nn.Module, config: PruneConfig, steps: int = 24, **options: Any) -> Pruner:
    """A pruner after that many steps on random gradients, finalized."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = Pruner(model, optimizer, config, steps, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    pruner.finalize()
    return pruner


QUICK: dict[str, Any] = {"delta_t": 3, "warmup": 3, "cooldown": 6}


@pytest.mark.parametrize("pattern", ["4x1", "8x8", "2:4"])
def test_second_moments_in_8_bits_under_a_pattern(pattern: str) -> None:
    """The criterion fisher reads them beside weights that are not coded; blocks are the best by what they stand for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    optimizer = PinsAdamW(model.parameters(), lr=1e-3, moment_dtype="8bit")
    config = PruneConfig(
        sparsity=0.5, criterion="fisher", pattern=pattern, schedule="one-shot", delta_t=3, warmup=3, cooldown=1
    )
    pruner = Pruner(model, optimizer, config, 9)
    weight, generator = model[0].weight, torch.Generator().manual_seed(0)
    for _ in range(9):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    assert bool(weight.all())  # the one mask comes at the end
    scores = weight.detach().square() * ops.decode(optimizer.state[weight]["exp_avg_sq"], weight.shape)
    assert pruner.finalize()["zeros"] == 256
    kept = weight != 0
    assert fit(pattern).violations(kept) == 0
    if pattern != "2:4":
        rows, columns = map(int, pattern.split("x"))
        sums = scores.view(16 // rows, rows, 32 // columns, columns).sum((1, 3))
        blocks = kept.view(16 // rows, rows, 32 // columns, columns).any(3).any(1)
        assert torch.equal(blocks, sums >= sums.flatten().sort(descending=True).values[blocks.sum() - 1])


@pytest.mark.parametrize(
    ("criterion", "options"),
    [
        ("pins", {}),
        ("pins", {"beta2": 0.0, "mask_policy": "strict"}),
        ("pins", {"state_dtype": "bfloat16"}),
        ("movement", {}),
        ("magnitude", {}),
        ("platon", {"mask_policy": "strict"}),
    ],
)
def test_training_ends_in_the_pattern_with_the_exact_count(criterion: str, options: dict[str, Any]) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    # The middle one is pruned without a pattern, and makes up what the two others leave of the budget.
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(9, 7), Conv1D(6, 8), nn.Linear(8, 8))
    pattern = {"*": "2:4", "3.*": "4x1"}
    config = PruneConfig(sparsity=0.55, criterion=criterion, pattern=pattern, **QUICK, **options)
    with pytest.warns(ConflictWarning, match=r"1\.weight is pruned without the pattern 2:4: its shape \(7, 9\)"):
        pruner = trained(model, config)
    weights = [p for p in model.parameters() if p.dim() == 2]
    total = sum(p.numel() for p in weights)
    assert sum(p.numel() - int(p.count_nonzero()) for p in weights) == total - round(0.45 * total)
    assert fit("2:4").violations(weights[0] != 0) == fit("2:4", -2).violations(weights[2] != 0) == 0
    assert fit("4x1").violations(weights[3] != 0) == 0
    assert int((weights[0] != 0).sum()) == 64
    assert pruner.stats()["sparsity"] == pytest.approx(0.55, abs=1 / total)


def test_a_pruner_with_a_pattern_resumes_to_the_bit() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    cut = copy.deepcopy(whole)
    config = PruneConfig(sparsity=0.5, pattern="2:4", **QUICK)

    def run(model: nn.Module, stop: int | None) -> Pruner:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        pruner = Pruner(model, optimizer, config, 24)
        for step in range(24):
            if step == stop:
                saved = copy.deepcopy(pruner.state_dict())
                pruner.detach()
                pruner = Pruner(model, optimizer, config, 24)
                pruner.load_state_dict(saved)
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        pruner.finalize()
        return pruner

    run(whole, None)
    run(cut, 13)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    other = Pruner(cut, torch.optim.SGD(cut.parameters()), PruneConfig(sparsity=0.5, **QUICK), 24)
    state = Pruner(whole, torch.optim.SGD(whole.parameters()), config, 24).state_dict()
    with pytest.raises(ValueError, match="pattern: '2:4' there, 'none' here"):
        other.load_state_dict(state)


def test_recognised_patterns_are_the_tightest_and_random_zeros_have_none() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 64, generator=generator)
    for keep, of in ((2, 4), (1, 4), (4, 8), (2, 8)):
        for axis in (-1, -2):
            found = recognised(reference.group_mask(x, keep, of, axis), axis)
            assert found is not None
            assert found.name == f"{keep}:{of}"
    assert recognised(x > 0.5, -1) is None
    assert recognised(x > 2, -1) is None
    assert recognised(x >= 0, -1) is None
    for rows, columns in ((4, 1), (16, 16), (1, 4)):
        blocks = torch.rand(64 // rows, 64 // columns, generator=generator) > 0.5
        found = recognised(blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1), -1)
        assert found is not None
        assert found.name == f"{rows}x{columns}"
    transposed = blocks.repeat_interleave(4, 1)
    found = recognised(transposed, -2)
    assert found is not None
    assert found.name == "4x1"


def left_over(rows: int, columns: int, left: int) -> Tensor:
    """A mask that keeps this many weights anywhere."""
    kept = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(5))[:left]
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[kept] = True
    return mask.view(rows, columns)


@pytest.mark.parametrize("axis", [-1, -2])
def test_zeros_that_chance_makes_are_no_pattern(axis: int) -> None:
    """In a matrix with hardly a weight left groups and blocks are empty without any plan."""
    for left in (1, 2, 10, 100, 1000, 3000):
        assert recognised(left_over(384, 384, left), axis) is None, left
    for shape in ((4, 4), (2, 64), (8, 8), (64, 4)):
        for left in (1, 2, 4, 8):
            assert recognised(left_over(*shape, left), axis) is None, (shape, left)
    # A few whole columns, in which weights are missing anywhere.
    columns = torch.zeros(384, 384, dtype=torch.bool)
    columns[:, [3, 70, 71, 200, 383]] = True
    for mask in (columns, columns.T, columns & left_over(384, 384, 70_000)):
        assert recognised(mask, axis) is None
    stack = torch.stack([left_over(96, 96, 20), left_over(96, 96, 40)])
    assert recognised(stack, axis) is None


def test_a_pattern_stays_one_however_many_zeros_come_on_top() -> None:
    x = torch.rand(384, 384, generator=torch.Generator().manual_seed(0))
    groups = reference.group_mask(x, 2, 4, -1) & left_over(384, 384, 110_000)
    blocks = (left_over(24, 24, 100)).repeat_interleave(16, 0).repeat_interleave(16, 1)
    for mask, name in ((groups, "2:4"), (blocks, "16x16"), (torch.stack([groups, groups]), "2:4")):
        mask[..., 5, :] = mask[..., 7] = False
        found = recognised(mask, -1)
        assert found is not None
        assert found.name == name


def test_verify_names_patterns_and_finds_what_breaks_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    pruner = trained(model, PruneConfig(sparsity=0.5, pattern={"0.*": "2:4", "1.*": "4x1"}, **QUICK))
    assert pruner.verify()["patterns"] == {"2:4": 1, "4x1": 1}
    pruner.masks.bits[0].bitwise_not_()
    pruner.masks.bits[0][0] = 0b1110001
    with pytest.raises(RuntimeError, match=r"0\.weight: 1 groups or blocks do not have the pattern 2:4"):
        pruner.verify()


def test_before_a_score_is_known_there_is_no_pattern_to_verify() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config = PruneConfig(sparsity=0.5, pattern="2:4", schedule="constant", warmup=0, cooldown=2)
    pruner = Pruner(model, optimizer, config, 40)
    for _ in range(3):
        model[0].weight.grad = torch.randn(8, 8)
        optimizer.step()
    assert pruner.verify()["patterns"] == {}
    for _ in range(20):
        model[0].weight.grad = torch.randn(8, 8)
        optimizer.step()
    assert pruner.verify()["patterns"] == {"2:4": 1}
    assert pruner.stats()["threshold"] is None


def test_plan_tells_patterns_misfits_and_what_blocks_leave() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(15, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.warns(ConflictWarning, match="2.weight is pruned without"):
        plan = Pruner(model, optimizer, PruneConfig(sparsity=0.4, pattern="16x16", **QUICK), 24).plan()
    assert plan["patterns"] == {"16x16": (2, 512)}
    assert any("2.weight is pruned without the pattern 16x16" in line for line in plan["conflicts"])
    assert "pattern 16x16: 512 weights in 2 tensors" in str(plan)
    # 223 of 557: none of the two blocks at their share, all 45 others, and then no whole block more.
    assert (plan["zeros_at_the_end"], plan["remainder"]) == (45, 178)
    assert "178 fewer than asked for: blocks go whole" in str(plan)


def test_from_sparse_recognises_a_pattern_or_checks_the_one_it_is_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight *= reference.group_mask(model[0].weight.abs(), 2, 4, -1)
        model[1].weight *= (torch.rand(8, 32) < 0.5).repeat_interleave(4, 0)
        model[2].weight *= torch.rand(32, 32) < 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner.from_sparse(model, optimizer)
    assert pruner.verify()["patterns"] == {"2:4": 1, "4x1": 1}
    assert pruner.plan()["patterns"] == {"2:4": (1, 512), "4x1": (1, 1024)}
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    assert pruner.verify()["patterns"] == {"2:4": 1, "4x1": 1}
    pruner.detach()
    pruner = Pruner.from_sparse(model, optimizer, PruneConfig(pattern={"0.*": "2:4"}))
    assert pruner.verify()["patterns"] == {"2:4": 1}
    pruner.detach()
    with pytest.raises(ValueError, match=r"2\.weight does not have the pattern 2:4"):
        Pruner.from_sparse(model, optimizer, PruneConfig(pattern={"2.*": "2:4"}))
    Pruner.from_sparse(model, optimizer).detach()
    with pytest.raises(ValueError, match="pattern: weights that stay pruned need not fit it"):
        Pruner.from_sparse(model, optimizer, PruneConfig(pattern={"0.*": "2:4"}, sparsity=0.6), total_steps=40)


def test_one_shot_pruning_takes_patterns_wanda_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    expected = reference.group_mask(model[0].weight.detach().abs() * x.norm(dim=0), 2, 4, -1)
    found = prune_once(model, [x], PruneConfig(sparsity=0.5, criterion="wanda", pattern="2:4"), loss=lambda m, b: m(b))
    assert found.sparsity == 0.5
    assert torch.equal(model[0].weight != 0, expected)
    by_blocks = PruneConfig(sparsity=0.5, criterion="magnitude", pattern="4x1")
    other = nn.Sequential(nn.Linear(16, 8), nn.Linear(9, 8))
    with pytest.warns(ConflictWarning, match="1.weight"):
        prune_once(other, [], PruneConfig(sparsity=0.5, criterion="magnitude", pattern="2:4"))
    prune_once(nn.Sequential(nn.Linear(16, 8)), [], by_blocks)
    with pytest.raises(ValueError, match="scope='row'"):
        PruneConfig(sparsity=0.5, criterion="wanda", pattern="2:4", scope="row")
