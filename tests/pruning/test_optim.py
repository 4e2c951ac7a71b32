"""The fused optimizers against torch's and against hooks, to the last bit, and under gradient scaling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FUSED_AND_HOOKED, STEPS, WITHOUT_MOMENTS, Network, batches, exact, same, start, train, zeros
from torch import nn

from pins_ext import PruneConfig
from pins_ext.optim import PinsAdamW


@pytest.mark.parametrize("policy", ["reference", "strict"])
@pytest.mark.parametrize("criterion", ["pins", "pins-signed", "pins-update", "platon", "movement", "magnitude"])
def test_the_fused_step_equals_torch_and_hooks_to_the_last_bit(criterion: str, policy: str) -> None:
    for beta2 in (0.9, 1, 0):
        config = PruneConfig(criterion=criterion, mask_policy=policy, delta_t=4, warmup=5, cooldown=20, beta2=beta2)
        fused_class, hooked_class, options = FUSED_AND_HOOKED[0]
        fused, optimizer, pruner = start(config, fused_class, **options)
        train(fused, optimizer, STEPS)
        hooked, optimizer, other = start(config, hooked_class, **options)
        train(hooked, optimizer, STEPS)
        assert same(fused, hooked)
        assert torch.equal(pruner.masks.cutoff, other.masks.cutoff)
        assert zeros(pruner) >= exact(pruner) > 0


@pytest.mark.parametrize("case", FUSED_AND_HOOKED, ids=lambda c: str(c[2]))
@pytest.mark.parametrize("clear", [False, True])
def test_fused_optimizers_and_cleared_states_equal_torch_and_hooks(case: Any, clear: bool) -> None:
    fused_class, hooked_class, options = case
    config = PruneConfig(delta_t=4, warmup=5, cooldown=20, mask_optimizer_state=clear)
    fused, optimizer, pruner = start(config, fused_class, **options)
    train(fused, optimizer, STEPS)
    hooked, other, _ = start(config, hooked_class, **options)
    train(hooked, other, STEPS)
    assert same(fused, hooked)
    for p, q in zip(fused.parameters(), hooked.parameters(), strict=True):
        for name, value in other.state[q].items():
            if isinstance(value, torch.Tensor) and value.shape == q.shape:
                assert torch.equal(optimizer.state[p][name], value)
    if clear and options != WITHOUT_MOMENTS:
        name = pruner.names[0]
        moment = next(v for v in optimizer.state[pruner.parameters[0]].values() if isinstance(v, torch.Tensor))
        assert not moment[~pruner.mask(name)].any()
        assert moment.any()


def test_alone_a_fused_optimizer_is_torchs() -> None:
    for fused_class, torch_class, options in FUSED_AND_HOOKED:
        one, other = Network(16, classes=16), Network(16, classes=16)
        train(one, fused_class(one.parameters(), **({"lr": 1e-2} | options)), 30)
        train(other, torch_class(other.parameters(), **({"lr": 1e-2} | options)), 30)
        assert same(one, other)


@pytest.mark.parametrize("shape", [(7, 16), (5,), ()])
def test_a_moment_of_another_shape_is_refused_before_anything_is_loaded(shape: tuple[int, ...]) -> None:
    """Also one of as many weights, which a kernel could not tell."""
    for fused_class, _, options in FUSED_AND_HOOKED:
        model = Network(16)
        optimizer = fused_class(model.parameters(), **{"lr": 1e-2} | options)
        train(model, optimizer, 3)
        before, saved = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
        moments = [name for name in saved["state"].get(0, {}) if name != "step"]
        for name in moments:
            assert saved["state"][0][name].shape == (16, 7)
            changed = {**saved["state"][0], name: torch.ones(shape)}
            with pytest.raises(ValueError, match=rf"state\[0\]\['{name}'\] has shape .*parameter \(16, 7\)"):
                optimizer.load_state_dict({**saved, "state": {**saved["state"], 0: changed}})
            there, here = before["state"][0], optimizer.state_dict()["state"][0]
            assert all(torch.equal(there[key], here[key]) for key in there)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_state_without_one_of_its_moments_is_refused(name: str) -> None:
    model = Network(16)
    optimizer = PinsAdamW(model.parameters())
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][2][name]
    with pytest.raises(ValueError, match=rf"state\[2\] has no '{name}', which goes with 'exp_avg\w*'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16", "8bit"])
def test_moments_are_loaded_however_they_lie_in_memory(moment_dtype: str) -> None:
    model, other = Network(16), Network(16)
    optimizer, again = (PinsAdamW(m.parameters(), moment_dtype=moment_dtype) for m in (model, other))
    train(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name, x in state.items():
            if name != "step" and x.dim() > 1:
                state[name] = x.mT.contiguous().mT
    again.load_state_dict(saved)
    train(model, optimizer, 5, skip=3)
    train(other, again, 5, skip=3)
    assert same(model, other)


def test_checkpoints_of_fused_and_torch_optimizers_are_interchangeable() -> None:
    for fused_class, torch_class, options in FUSED_AND_HOOKED:
        options = {"lr": 1e-2} | options
        whole = Network(16, classes=16)
        train(whole, torch_class(whole.parameters(), **options), 30)
        for first, second in ((fused_class, torch_class), (torch_class, fused_class)):
            model = Network(16, classes=16)
            optimizer = first(model.parameters(), **options)
            train(model, optimizer, 15)
            other = second(model.parameters(), **options)
            other.load_state_dict(optimizer.state_dict())
            for group in other.param_groups:
                group["fused"] = second is FUSED_AND_HOOKED[0][1]
            train(model, other, 30, skip=15)
            assert same(model, whole)


def train_scaled(model: Network, optimizer: Any, scaler: Any, poisoned: set[int]) -> None:
    for i, (x, y) in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if i in poisoned:
            next(iter(model.parameters())).grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()


def test_a_skipped_fused_step_changes_no_weight_and_no_state_but_counts() -> None:
    model, optimizer, pruner = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before: list[Any] = []
    optimizer.register_step_pre_hook(
        lambda *_: before.append(copy.deepcopy((model.state_dict(), pruner.importance.ipt)))
    )
    poisoned = {7, 12}
    train_scaled(model, optimizer, scaler, poisoned)
    for i in poisoned:
        assert all(torch.equal(a, b) for a, b in zip(before[i][1], before[i + 1][1], strict=True))
        assert all(torch.equal(before[i][0][n], before[i + 1][0][n]) for n in before[i][0])
    assert pruner.step == STEPS
    assert zeros(pruner) == exact(pruner)
    assert {float(s["step"]) for s in optimizer.state_dict()["state"].values()} == {STEPS - len(poisoned)}


def test_scaling_by_a_power_of_two_changes_no_bit() -> None:
    plain, optimizer, _ = start()
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for optimizer_class, options in ((PinsAdamW, {}), (torch.optim.AdamW, {"fused": True})):
        scaled, optimizer, _ = start(optimizer_class=optimizer_class, **options)
        train_scaled(scaled, optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0), set())
        assert same(plain, scaled)


def test_the_skipping_of_an_unfused_optimizer_does_not_advance_the_pruner() -> None:
    model, optimizer, pruner = start(optimizer_class=torch.optim.AdamW)
    train_scaled(model, optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0), {7, 12})
    assert pruner.step == STEPS - 2
    assert pruner.finalize()["zeros"] == exact(pruner)


def test_gradient_accumulation_is_one_importance_update() -> None:
    model, optimizer, pruner = start()
    for i, (x, y) in enumerate(batches(2 * STEPS)):
        (nn.functional.cross_entropy(model(x), y) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert pruner.step == STEPS
    assert zeros(pruner) == exact(pruner)
