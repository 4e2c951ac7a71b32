"""Weights and moments in 16 bits: they learn, and a resumed run is the run that never stopped."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Network, batches, start, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers.optimization import Adafactor

from pins_ext import PruneConfig, Pruner, ops, reference
from pins_ext.optim import PinsAdamW, PinsSGD
from pins_ext.pruning.plan import ConflictWarning

WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = ("float32", "bfloat16", "8bit")
MAKERS: dict[str, Any] = {
    **{name: lambda p, name=name: PinsAdamW(p, lr=3e-3, moment_dtype=name) for name in MOMENTS},
    "sgd": lambda p: PinsSGD(p, lr=3e-3),
    "momentum": lambda p: PinsSGD(p, lr=3e-3, momentum=0.9),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps with made-up gradients; a model in 16 bits need not compute."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for p in model.parameters():
            p.grad = (1e-2 * torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()


def same_states(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    """Whether the state of every parameter is equal to the last bit, dtypes included."""
    for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert one.state[p].keys() == other.state[q].keys()
        for name, value in one.state[p].items():
            there = other.state[q][name]
            if isinstance(value, torch.Tensor) and not (value.dtype == there.dtype and torch.equal(value, there)):
                return False
    return all(
        torch.equal(p, q) for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True)
    )


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("made", MAKERS)
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
def test_save_load_step_is_the_step_without(dtype: torch.dtype, made: str, pruned: bool) -> None:
    config = PruneConfig(delta_t=2, warmup=2, cooldown=4, mask_policy="strict", state_dtype="bfloat16")

    def new() -> tuple[Network, Any, Pruner | None]:
        model = Network(16).to(dtype)
        optimizer = MAKERS[made](model.parameters())
        return model, optimizer, Pruner(model, optimizer, config, 20) if pruned else None

    model, optimizer, pruner = new()
    step(model, optimizer, 0, 9)
    for method in ("plain", "distributed"):
        other, second, resumed = new()
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        if method == "plain":
            second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
            set_optimizer_state_dict(other, second, state)
        if pruner is not None and resumed is not None:
            resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
        assert same_states(optimizer, second), method
        first, ahead, _ = copied = copy.deepcopy((model, optimizer, pruner))
        step(first, ahead, 9, 12)
        step(other, second, 9, 12)
        assert same_states(ahead, second), method
        del copied


def test_a_state_of_torchs_is_converted() -> None:
    model = Network(16).to(torch.bfloat16)
    theirs = torch.optim.AdamW(model.parameters())
    step(model, theirs, 0, 2)
    for name in MOMENTS:
        ours = PinsAdamW(model.parameters(), moment_dtype=name)
        ours.load_state_dict(theirs.state_dict())
        for p in model.parameters():
            there = theirs.state[p]["exp_avg"].float()
            if name == "8bit":
                assert ours.state[p]["exp_avg_sq"].dtype == torch.uint8
                assert torch.equal(ours.state[p]["exp_avg"], reference.encode(there, signed=True))
            else:
                assert ours.state[p]["exp_avg"].dtype == getattr(torch, name)
                assert torch.equal(ours.state[p]["exp_avg"].float(), there)
        step(model, ours, 2, 3)
        back = PinsAdamW(model.parameters())
        back.load_state_dict(ours.state_dict())
        for p in model.parameters():
            moment = ours.state[p]["exp_avg_sq"]
            moment = reference.decode(moment, p.shape) if name == "8bit" else moment.float()
            assert torch.equal(back.state[p]["exp_avg_sq"], moment)
        step(model, back, 3, 4)


def test_a_copy_keeps_its_moment_dtype() -> None:
    model = Network(16)
    optimizer = PinsAdamW(model.parameters(), moment_dtype="bfloat16")
    copied_model, copied = copy.deepcopy((model, optimizer))
    step(copied_model, copied, 0, 1)
    assert {state["exp_avg_sq"].dtype for state in copied.state.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="moment_dtype must be one of float32, bfloat16"):
        PinsAdamW(model.parameters(), moment_dtype="float64")


@pytest.mark.parametrize("made", MAKERS)
def test_steps_far_below_the_resolution_add_up(made: str) -> None:
    """400 steps of 1e-6 against a weight of 1, whose neighbours in bfloat16 lie 0.004 and 0.008 away."""
    p = nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
    nearest = nn.Parameter(p.detach().clone())
    optimizer, theirs = MAKERS[made]([p]), torch.optim.AdamW([nearest], lr=1e-5, weight_decay=0.0)
    for group in optimizer.param_groups:
        group.update(lr=1e-5, weight_decay=0.0)
    for _ in range(400):
        p.grad = torch.ones_like(p)
        nearest.grad = torch.ones_like(p)
        optimizer.step()
        theirs.step()
    assert torch.equal(nearest, torch.ones_like(nearest))
    moved = 1 - p.detach().float().mean()
    distance = {"momentum": 10 * 400e-5}.get(made, 400e-5)
    # The mean of 20000 weights that end 0.004 apart: one standard deviation is 2e-5.
    assert abs(moved - distance) < {"momentum": 0.1 * distance}.get(made, 1.5e-4)


def test_neither_the_order_of_groups_nor_a_pruner_repeats_random_bits() -> None:
    """Every step and every weight rounds by bits of its own."""
    p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = PinsSGD([p], lr=2**-9)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            p.fill_(1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        seen.append(p.detach() < 1)
    for moved in seen:
        assert 0.45 < moved.float().mean() < 0.55
    assert 0.45 < (seen[0] == seen[1]).float().mean() < 0.55
    assert 0.45 < (seen[1] == seen[2]).float().mean() < 0.55


def fitted(model: Network, optimizer: torch.optim.Optimizer, steps: int = 300) -> float:
    """Mean loss of the last hundred steps against a fixed teacher; gradients come from a float32 copy."""
    torch.manual_seed(1)
    teacher, exact = Network(32, seed=3), Network(32)
    losses = []
    for x, _ in batches(steps):
        exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
        loss = nn.functional.mse_loss(exact(x), teacher(x).detach())
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(exact.parameters())), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-100:]) / 100


def test_bfloat16_weights_learn_what_float32_ones_do_where_nearest_rounding_falls_behind() -> None:
    rate = 2e-5
    full = fitted(model := Network(32), PinsAdamW(model.parameters(), lr=rate))
    small = fitted(
        model := Network(32).to(torch.bfloat16), PinsAdamW(model.parameters(), lr=rate, moment_dtype="bfloat16")
    )
    tiny = fitted(model := Network(32).to(torch.bfloat16), PinsAdamW(model.parameters(), lr=rate, moment_dtype="8bit"))
    nearest = fitted(model := Network(32).to(torch.bfloat16), torch.optim.AdamW(model.parameters(), lr=rate))
    start = fitted(model := Network(32), PinsAdamW(model.parameters(), lr=0.0, weight_decay=0.0))
    print({"start": start, "float32": full, "bfloat16": small, "8bit": tiny, "nearest": nearest})
    assert full < start
    assert abs(small - full) < 0.1 * (start - full)
    assert abs(tiny - full) < 0.1 * (start - full)
    assert nearest - full > 0.25 * (start - full)


def test_the_shadow_is_the_weight_where_it_is_kept() -> None:
    config = PruneConfig(criterion="platon", mask_policy="strict", delta_t=2, warmup=2, cooldown=4)
    with pytest.warns(UserWarning, match="keeps one more state"):
        model, optimizer, pruner = start(config, moment_dtype="bfloat16")
    model.to(torch.bfloat16)
    step(model, optimizer, 0, 12)
    for name, p, shadow in zip(pruner.names, pruner.parameters, pruner.importance.shadow, strict=True):
        keep = pruner.mask(name)
        assert not p[~keep].any()
        assert torch.equal(p[keep], shadow[keep])


def test_a_pruned_run_in_sixteen_bits_reaches_its_sparsity() -> None:
    model = Network(16).to(torch.bfloat16)
    optimizer = PinsAdamW(model.parameters(), lr=3e-3, moment_dtype="bfloat16")
    pruner = Pruner(model, optimizer, PruneConfig(delta_t=4, warmup=5, cooldown=20, state_dtype="bfloat16"), 60)
    train_16_bits(model, optimizer)
    assert pruner.finalize()["zeros"] == pruner.n_weights - round(0.2 * pruner.n_weights)


def train_16_bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for x, y in batches(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(torch.bfloat16)).float(), y).backward()
        optimizer.step()


def test_float32_is_left_as_it_was() -> None:
    one, other = Network(16, classes=16), Network(16, classes=16)
    train(one, PinsAdamW(one.parameters(), lr=1e-2, moment_dtype="float32"), 20)
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True), 20)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


CONFIGS: list[dict[str, Any]] = [
    {},
    {"delta_t": 1},
    {"beta2": 0},
    {"beta2": 1},
    {"criterion": "moments"},
    {"criterion": "fisher"},
    {"criterion": "pins-update", "mask_policy": "strict", "mask_optimizer_state": True},
    {"criterion": "platon", "mask_policy": "strict"},
    {"min_density": 0.05},
    {"pattern": "2:4"},
    {"pattern": "4x1"},
]


@pytest.mark.filterwarnings("ignore::pins_ext.pruning.plan.ConflictWarning")
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_8_bits_of_everything_resume_and_reach_the_sparsity(options: dict[str, Any], tmp_path: Path) -> None:
    fixed = {"delta_t": 4, "warmup": 5, "cooldown": 20, "state_dtype": "8bit"}
    config = PruneConfig(**(fixed | options | ({"sparsity": 0.5} if "pattern" in options else {})))

    def new() -> tuple[Network, Any, Pruner]:
        model = Network(16 if "pattern" in options else 13)
        optimizer = PinsAdamW(model.parameters(), lr=3e-3, moment_dtype="8bit")
        return model, optimizer, Pruner(model, optimizer, config, 60)

    whole, optimizer, pruner = new()
    train(whole, optimizer, 33)
    pruner.save(tmp_path / "pruner.safetensors")
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, 60, skip=33)
    assert pruner.finalize()["zeros"] == pruner.n_weights - round((1 - config.sparsity) * pruner.n_weights)
    assert pruner.stats()["nan"] == 0
    second, optimizer, resumed = new()
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load(tmp_path / "pruner.safetensors")
    train(second, optimizer, 60, skip=33)
    resumed.finalize()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("criterion", ["moments", "fisher"])
@pytest.mark.parametrize("moment_dtype", MOMENTS)
def test_criteria_made_of_the_moments_read_them_as_they_are_stored(criterion: str, moment_dtype: str) -> None:
    """The masks of a run are those of a run whose moments are the decoded ones."""
    config = PruneConfig(criterion=criterion, delta_t=4, warmup=5, cooldown=20)
    model = Network(13)
    optimizer = PinsAdamW(model.parameters(), lr=3e-3, moment_dtype=moment_dtype)
    pruner = Pruner(model, optimizer, config, 60)
    train(model, optimizer, 30)
    moments = pruner.importance.moments()
    p, state = pruner.parameters[0], optimizer.state[pruner.parameters[0]]
    assert moments.exp_avg_sq[0] is state["exp_avg_sq"]
    if criterion == "fisher":
        second = state["exp_avg_sq"]
        plain = reference.decode(second, p.shape) if moment_dtype == "8bit" else second
        kept = pruner.mask(pruner.names[0])
        scores = reference.score("fisher", p, plain, moments.factors[0, 2])
        assert scores[kept].mean() > scores[~kept].mean()
    assert pruner.finalize()["zeros"] == pruner.n_weights - round(0.2 * pruner.n_weights)


def test_cleared_moments_are_cleared_in_8_bits_too() -> None:
    """With a gradient scaler masks do not ride on the pass."""
    config = PruneConfig(delta_t=2, warmup=1, cooldown=3, mask_policy="strict", mask_optimizer_state=True)
    model = Network(13)
    optimizer = PinsAdamW(model.parameters(), lr=3e-3, moment_dtype="8bit")
    pruner = Pruner(model, optimizer, config, 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches(10):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    for name, p in zip(pruner.names, pruner.parameters, strict=True):
        pruned = ~pruner.mask(name).flatten()
        for moment in ("exp_avg", "exp_avg_sq"):
            values = reference.decode(optimizer.state[p][moment], p.shape).flatten()
            assert not values[pruned].any()
            assert values[~pruned].any()


def test_groups_that_ran_across_rows_are_refused(tmp_path: Path) -> None:
    """As earlier versions stored them: flat, and the last scale after the last code."""
    config = PruneConfig(delta_t=2, warmup=1, cooldown=3, state_dtype="8bit")
    model = Network(13)
    optimizer = PinsAdamW(model.parameters(), lr=3e-3, moment_dtype="8bit")
    pruner = Pruner(model, optimizer, config, 10)
    train(model, optimizer, 4)
    state, saved = pruner.state_dict(), copy.deepcopy(optimizer.state_dict())
    name = f"exp_avg_ipt/{pruner.names[0]}"
    state["tensors"][name] = torch.zeros(pruner.parameters[0].numel() // 32 * 34 + 34, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"{name}: torch.uint8 \(\d+,\) there, torch.uint8 \(\d+, 1, 34\) here"):
        pruner.load_state_dict(state)
    n = next(model.parameters()).numel()
    before = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(-(-n // 32) * 34, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"state\[0\]\['exp_avg'\] is \(\d+,\) in 8 bits, .*an earlier version's"):
        optimizer.load_state_dict(saved)
    for there, here in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(there[key], here[key]) for key in there)


def test_what_8_bits_cannot_do_is_refused() -> None:
    for criterion in ("pins-signed", "movement", lambda p, g, lr: p * g):
        with pytest.raises(ValueError, match=r"state_dtype must be float32 or bfloat16 for criterion=.*below zero"):
            PruneConfig(criterion=criterion, state_dtype="8bit")
    x = torch.randn(300)
    for dtype in ops.CODED:
        values = x if dtype == torch.int8 else x.abs()
        assert torch.equal(ops.encode(values, dtype), reference.encode(values, dtype == torch.int8))
        assert torch.equal(
            ops.decode(ops.encode(values, dtype), (300,)),
            reference.decode(reference.encode(values, dtype == torch.int8), (300,)),
        )
    with torch.device("meta"):
        model = Network(16)
    optimizer = PinsAdamW(model.parameters(), moment_dtype="8bit")
    with pytest.raises(ValueError, match=r"state_dtype='8bit' is there on the CPU and on CUDA.*on meta: use bf"):
        Pruner(model, optimizer, PruneConfig(state_dtype="8bit"), 10)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match=r"moment_dtype='8bit' is there on the CPU and on CUDA.*on meta: use bf"):
        optimizer.step()


def test_a_pruner_says_that_nearest_rounding_loses_small_updates() -> None:
    for dtype, kind, told in (
        (torch.bfloat16, torch.optim.AdamW, True),
        (torch.bfloat16, PinsAdamW, False),
        (torch.float32, torch.optim.AdamW, False),
    ):
        model = Network(16).to(dtype)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", ConflictWarning)
            pruner = Pruner(model, kind(model.parameters()), PruneConfig(delta_t=4, warmup=5, cooldown=20), 60)
        said = [str(w.message) for w in found if "AdamW rounds bfloat16 weights to nearest" in str(w.message)]
        assert len(said) == told == len([c for c in pruner.plan()["conflicts"] if c in said])


class Inherits(torch.optim.AdamW):
    """With the step of torch's."""


class Own(torch.optim.AdamW):
    """With a step of its own, of which nothing is known."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(("owner", "told"), [(Inherits, True), (Adafactor, True), (Own, False), (PinsAdamW, False)])
def test_whose_step_rounds_to_nearest_is_known_by_the_step(owner: Any, told: bool) -> None:
    model = nn.Linear(32, 32, dtype=torch.bfloat16)
    pruner = Pruner(model, owner(model.parameters(), lr=None if owner is Adafactor else 1e-3), PruneConfig(), 100)
    found = [text for text in pruner.plan()["conflicts"] if text.startswith(f"{owner.__name__} rounds bfloat16")]
    assert len(found) == told
