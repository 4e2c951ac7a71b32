"""The Pruner in training loops: any optimizer, every policy, exact counts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import CONFIG, FUSED_AND_HOOKED, STEPS, Network, batches, exact, same, start, train, zeros
from torch import nn

from pins_ext import PruneConfig, Pruner, reference
from pins_ext.optim import PinsAdamW, PinsSGD


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        (torch.optim.Adafactor, {}),
        (torch.optim.RMSprop, {}),
        (PinsAdamW, {}),
        (PinsSGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_any_optimizer_ends_at_the_exact_sparsity(optimizer_class: Any, options: dict[str, Any]) -> None:
    model, optimizer, pruner = start(optimizer_class=optimizer_class, **options)
    train(model, optimizer, STEPS)
    assert pruner.step == STEPS
    report = pruner.finalize()
    assert report["zeros"] == zeros(pruner) == exact(pruner)
    assert report["kept"] == pruner.n_weights - exact(pruner)


def test_several_optimizers_share_one_budget() -> None:
    model = Network()
    first = torch.optim.SGD(model.layers[0].parameters(), lr=0.05)
    second = PinsAdamW(
        [*model.embed.parameters(), *model.layers[1].parameters(), *model.classifier.parameters()], lr=3e-3
    )
    pruner = Pruner(model, [first, second], CONFIG, STEPS)
    for x, y in batches(STEPS):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        first.step()
        second.step()
    assert pruner.step == STEPS
    assert zeros(pruner) == exact(pruner)


def test_strict_masks_hold_after_every_step_and_weights_return() -> None:
    config = PruneConfig(sparsity=0.8, delta_t=5, warmup=5, cooldown=20, mask_policy="strict")
    for optimizer_class in (PinsAdamW, torch.optim.AdamW):
        model, optimizer, pruner = start(config, optimizer_class)
        masks: list[torch.Tensor] = []

        def check(pruner: Pruner = pruner, masks: list[torch.Tensor] = masks) -> None:
            whole = torch.cat([pruner.mask(n).flatten() for n in pruner.names])
            weights = torch.cat([p.flatten() for p in pruner.parameters])
            assert not weights[~whole].any()
            masks.append(whole)

        train(model, optimizer, STEPS, after=check)
        returned = sum(int((b & ~a).sum()) for a, b in itertools.pairwise(masks))
        assert returned > 0


@pytest.mark.parametrize("criterion", ["platon", "movement", "magnitude"])
def test_regrow_lets_vanishing_criteria_return_or_not(criterion: str) -> None:
    returned = {}
    for regrow in ("shadow", "never"):
        config = PruneConfig(
            criterion=criterion, sparsity=0.6, delta_t=2, warmup=2, cooldown=20, mask_policy="strict", regrow=regrow
        )
        model, optimizer, pruner = start(config, lr=0.3 if criterion == "magnitude" else 0.02)
        masks: list[torch.Tensor] = []
        train(
            model,
            optimizer,
            STEPS,
            after=lambda p=pruner, m=masks: m.append(torch.cat([p.mask(n).flatten() for n in p.names])),
        )
        returned[regrow] = sum(int((b & ~a).sum()) for a, b in itertools.pairwise(masks))
        assert bool(pruner.importance.shadow) == (regrow == "shadow")
    assert returned["shadow"] > returned["never"]


def test_between_masks_the_reference_policy_trains_densely() -> None:
    model, optimizer, pruner = start()
    history: list[int] = []
    train(model, optimizer, STEPS, after=lambda: history.append(zeros(pruner)))
    assert history[30] > 0
    assert history[31] < history[30] / 2
    assert history[-20:] == [exact(pruner)] * 20


def test_freeze_fixes_the_mask() -> None:
    model, optimizer, pruner = start()
    train(model, optimizer, 36)
    pruner.freeze()
    before = {n: pruner.mask(n) for n in pruner.names}
    train(model, optimizer, 20, seed=9)
    assert all(torch.equal(before[n], pruner.mask(n)) for n in pruner.names)
    assert all(not p[~pruner.mask(n)].any() for n, p in zip(pruner.names, pruner.parameters, strict=True))
    pruner.verify()


def test_one_shot_selects_once() -> None:
    config = PruneConfig(sparsity=0.5, delta_t=5, warmup=5, cooldown=20, schedule="one-shot")
    model, optimizer, pruner = start(config)
    history: list[int] = []
    train(model, optimizer, STEPS, after=lambda: history.append(zeros(pruner)))
    assert history[40] == 0
    assert set(history[41:]) == {exact(pruner)}
    assert pruner.masks.frozen


def test_finalize_before_the_schedule_ends_reaches_the_target() -> None:
    for stop in (3, 23):
        model, optimizer, pruner = start()
        train(model, optimizer, stop)
        assert pruner.finalize()["zeros"] == exact(pruner)
    _, _, untouched = start()
    with pytest.raises(RuntimeError, match="no gradient has been seen"):
        untouched.finalize()


def test_a_sparse_model_goes_on_with_its_zeros() -> None:
    model, optimizer, pruner = start()
    train(model, optimizer, STEPS)
    pruner.finalize()
    again = Network(16, classes=16)
    again.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    kept = Pruner.from_sparse(again, optimizer)
    train(again, optimizer, 20)
    assert all(torch.equal(kept.mask(n), pruner.mask(n)) for n in pruner.names)
    assert kept.verify()["zeros"] == exact(pruner)
    assert not same(again, model)
    dense = Network()
    with pytest.raises(ValueError, match="no zeros"):
        Pruner.from_sparse(dense, torch.optim.SGD(dense.parameters(), lr=1))


def test_a_users_own_criterion_equals_the_built_in_it_copies() -> None:
    def mine(p: torch.Tensor, g: torch.Tensor, lr: float) -> torch.Tensor:
        return reference.instant_score("pins", p, p, g, lr)

    built_in, optimizer, _ = start()
    train(built_in, optimizer, STEPS)
    for optimizer_class in (PinsAdamW, FUSED_AND_HOOKED[0][1]):
        config = PruneConfig(sparsity=0.8, delta_t=5, warmup=5, cooldown=20, criterion=mine)
        own, optimizer, _ = start(config, optimizer_class)
        train(own, optimizer, STEPS)
        assert same(built_in, own)
    for wrong in (lambda p, g, lr: p.sum(), lambda p, g, lr: p + 1j):
        model, optimizer, _ = start(PruneConfig(criterion=wrong))
        with pytest.raises(ValueError, match="one real score per weight"):
            train(model, optimizer, 1)


@pytest.mark.parametrize("optimizer_class", [PinsAdamW, torch.optim.AdamW])
def test_a_users_own_criterion_may_work_in_place(optimizer_class: Any) -> None:
    models = []
    for criterion in (lambda p, g, lr: (p * g).abs(), lambda p, g, lr: g.mul_(p.mul_(g)).div_(g).copy_(p).abs_()):
        config = PruneConfig(sparsity=0.8, delta_t=5, warmup=5, cooldown=20, criterion=criterion)
        model, optimizer, _ = start(config, optimizer_class)
        train(model, optimizer, 30)
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("criterion", ["pins", "pins-update"])
def test_other_gradients_can_score_the_weights(criterion: str) -> None:
    config = PruneConfig(criterion=criterion, delta_t=5, warmup=5, cooldown=20)
    runs = {}
    for source in ("own", "given", "other"):
        for optimizer_class in (PinsAdamW, FUSED_AND_HOOKED[0][1]):
            model, optimizer, pruner = start(config, optimizer_class)
            if source != "own":
                turned = [0] if source == "other" else []

                def gradients(pruner: Pruner = pruner, turned: list[int] = turned) -> dict[str, torch.Tensor]:
                    return {n: p.grad.flip(turned) for n, p in zip(pruner.names, pruner.parameters, strict=True)}

                pruner.score_gradients = gradients
            train(model, optimizer, STEPS)
            runs[source, optimizer_class] = model
    first, second = PinsAdamW, FUSED_AND_HOOKED[0][1]
    assert same(runs["own", first], runs["given", first])
    assert same(runs["given", first], runs["given", second])
    assert same(runs["other", first], runs["other", second])
    assert not same(runs["own", first], runs["other", first])


def test_bfloat16_states_are_repeatable_and_close() -> None:
    runs = []
    for dtype in ("bfloat16", "bfloat16", "float32"):
        model, optimizer, pruner = start(PruneConfig(sparsity=0.8, delta_t=5, warmup=5, cooldown=20, state_dtype=dtype))
        train(model, optimizer, STEPS)
        runs.append(torch.cat([pruner.mask(n).flatten() for n in pruner.names]))
        assert zeros(pruner) == exact(pruner)
    assert torch.equal(runs[0], runs[1])
    assert (runs[0] & runs[2]).sum() / runs[2].sum() > 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_sixteen_bits(dtype: torch.dtype) -> None:
    model = Network().to(dtype)
    optimizer = PinsAdamW(model.parameters(), lr=1e-2, eps=1e-4)
    pruner = Pruner(model, optimizer, CONFIG, STEPS)
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
    assert pruner.finalize()["zeros"] == exact(pruner)
