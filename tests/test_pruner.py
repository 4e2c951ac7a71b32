"""The Pruner in training loops: any optimizer, every criterion and policy, exact counts, odd parameters."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from models import Network, batches, train, zeros
from torch import nn

from pins_ext import PruneConfig, Pruner, reference
from pins_ext.optim import PinsAdamW, PinsSGD

STEPS = 60
CONFIG = PruneConfig(sparsity=0.8, delta_t=5, warmup=5, cooldown=20)


def start(
    config: PruneConfig = CONFIG, optimizer_class: Any = PinsAdamW, **options: Any
) -> tuple[Network, Any, Pruner]:
    model = Network(16, classes=16)
    optimizer = optimizer_class(model.parameters(), **({"lr": 3e-3} | options))
    return model, optimizer, Pruner(model, optimizer, config, STEPS)


def exact(pruner: Pruner) -> int:
    return pruner.n_weights - round((1 - pruner.config.sparsity) * pruner.n_weights)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# ---- any optimizer --------------------------------------------------------------------------------------------------


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


# torch's unfused AdamW takes its square root from a library that is not correctly rounded; its fused one is.
FUSED_AND_HOOKED = [
    (PinsAdamW, partial(torch.optim.AdamW, fused=True), {"weight_decay": 0.01}),
    (
        PinsSGD,
        partial(torch.optim.SGD, foreach=False),
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    (PinsSGD, partial(torch.optim.SGD, foreach=False), {"lr": 0.05, "momentum": 0.8, "dampening": 0.1}),
    (PinsSGD, partial(torch.optim.SGD, foreach=False), {"lr": 0.05}),
]
WITHOUT_MOMENTS = {"lr": 0.05}


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
        assert torch.equal(pruner.threshold, other.threshold)
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


def test_stepping_one_of_two_optimizers_twice_is_refused() -> None:
    model = Network()
    first = torch.optim.SGD(model.layers[0].parameters(), lr=0.05)
    second = torch.optim.SGD(model.layers[1].parameters(), lr=0.05)
    Pruner(model, [first, second], CONFIG, STEPS)
    first.step()
    with pytest.raises(RuntimeError, match="stepped twice"):
        first.step()


# ---- scaled gradients -----------------------------------------------------------------------------------------------


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


# ---- policies -------------------------------------------------------------------------------------------------------


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
    assert pruner.frozen


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
    config = PruneConfig(criterion=lambda p, g, lr: p.sum())
    model, optimizer, _ = start(config)
    with pytest.raises(ValueError, match="one score per weight"):
        train(model, optimizer, 1)


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


# ---- odd parameters -------------------------------------------------------------------------------------------------


def test_a_missing_gradient_counts_as_zero_and_masks_hold() -> None:
    for optimizer_class in (PinsAdamW, torch.optim.AdamW):
        model, optimizer, pruner = start(optimizer_class=optimizer_class)
        train(model, optimizer, 30)
        unused = model.layers[1].output["dense"].weight
        i = next(i for i, p in enumerate(pruner.parameters) if p is unused)
        for x, y in batches(30, seed=4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            unused.grad = None
            optimizer.step()
        assert zeros(pruner) == exact(pruner)
        assert not unused[~pruner.mask(pruner.names[i])].any()


def test_tied_weights_count_once() -> None:
    model = Network()
    model.layers[1].attention["self"].weight = model.layers[0].attention["self"].weight
    model.layers[1].attention["output"]["dense"].weight = nn.Parameter(
        model.layers[0].attention["output"]["dense"].weight.data
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruner(model, optimizer, CONFIG, STEPS)
    assert pruner.n_weights == sum(p.numel() for p in pruner.parameters) == 2 * (2 * 13 * 26) + 2 * 13 * 13
    train(model, optimizer, STEPS)
    assert pruner.finalize()["zeros"] == exact(pruner)


def test_odd_parameters_are_refused_with_a_reason() -> None:
    def attempt(model: nn.Module, **options: Any) -> None:
        Pruner(model, torch.optim.SGD(model.parameters(), lr=1), PruneConfig(**options), STEPS)

    model = Network()
    model.layers[0].output["dense"].weight.data = torch.randn(26, 13).t()
    with pytest.raises(ValueError, match=r"layers\.0\.output\.dense\.weight is not contiguous"):
        attempt(model)
    model = Network()
    model.layers[0].output["dense"].weight.data = model.layers[0].output["dense"].weight.data.double()
    with pytest.raises(ValueError, match="share one dtype"):
        attempt(model)
    model = Network()
    model.layers[0].output["dense"].weight = nn.Parameter(torch.empty(13, 26, device="meta"))
    with pytest.raises(ValueError, match="share one device"):
        attempt(model)
    model, storage = Network(), torch.randn(13 * 13 + 5)
    model.layers[0].attention["self"].weight.data = storage[:169].view(13, 13)
    model.layers[1].attention["self"].weight.data = storage[5:].view(13, 13)
    with pytest.raises(ValueError, match="overlap in memory"):
        attempt(model)
    with pytest.raises(ValueError, match=r"'nothing\*' matches no parameter"):
        attempt(Network(), include=("nothing*",))
    with pytest.raises(ValueError, match=r"'nothing\*' matches no parameter"):
        attempt(Network(), exclude=("nothing*",))
    with pytest.raises(ValueError, match="no prunable parameter"):
        attempt(Network(), exclude=("*",))
    with pytest.raises(ValueError, match="longer than training"):
        attempt(Network(), warmup=50, cooldown=50)
    model = Network()
    model.embed.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        attempt(model, include=("embed.weight",))
    model = Network()
    with pytest.raises(ValueError, match="belong to no optimizer"):
        Pruner(model, torch.optim.SGD(model.classifier.parameters(), lr=1), CONFIG, STEPS)
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer is needed"):
        Pruner(model, ["not one"], CONFIG, STEPS)  # type: ignore[list-item]


def test_zero_sized_and_frozen_parameters_are_left_out() -> None:
    model = Network()
    model.layers.append(nn.Linear(0, 13))
    model.layers[0].output["dense"].weight.requires_grad_(False)
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=1), CONFIG, STEPS)
    assert "layers.0.output.dense.weight" not in pruner.names
    assert "layers.2.weight" not in pruner.names


def test_sparse_gradients_and_closures_are_refused() -> None:
    for optimizer_class in (PinsSGD, torch.optim.SGD):
        model = nn.Sequential(nn.EmbeddingBag(50, 8, sparse=True), nn.Linear(8, 3))
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        Pruner(model, optimizer, PruneConfig(include=("0.weight",)), STEPS)
        model(torch.tensor([[1, 2], [3, 4]])).sum().backward()
        with pytest.raises((ValueError, RuntimeError), match="sparse gradient"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="closure"):
            optimizer.step(lambda: torch.tensor(0.0))


def test_default_choice_of_parameters() -> None:
    pruner = start()[2]
    assert all(n.startswith("layers.") and n.endswith("weight") and "norm" not in n for n in pruner.names)
    assert len(pruner.names) == 8
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert Pruner(plain, torch.optim.SGD(plain.parameters(), lr=1), CONFIG, STEPS).names == ["0.weight", "2.weight"]
    released = start(PruneConfig(parameter_set="released"))[2]
    assert "layers.0.output.dense.bias" in released.names


def test_copies_and_detaching_are_noticed() -> None:
    model, optimizer, pruner = start(optimizer_class=torch.optim.AdamW)
    pruner.verify()
    model.layers[0].output["dense"].weight = nn.Parameter(torch.randn(16, 32))
    with pytest.raises(RuntimeError, match="no longer the parameter"):
        pruner.verify()
    model, optimizer, pruner = start()
    with pytest.raises(RuntimeError, match="already belongs"):
        Pruner(model, optimizer, CONFIG, STEPS)
    pruner.detach()
    with pytest.raises(RuntimeError, match="no longer calls this Pruner"):
        pruner.verify()
    train(model, optimizer, 3)
    assert pruner.step == 0


def test_stats_and_plan_tell_what_a_user_needs() -> None:
    model, optimizer, pruner = start()
    text = str(pruner.plan())
    assert f"{pruner.n_weights:,} prunable weights in 8 tensors" in text
    assert f"{exact(pruner):,} of them zero" in text
    train(model, optimizer, STEPS)
    stats = pruner.stats()
    assert stats["step"] == STEPS
    assert stats["sparsity"] == zeros(pruner) / pruner.n_weights
    assert stats["threshold"] > 0
    assert stats["nan"] == 0
    assert stats["ms"] > 0
    assert 0 <= stats["churn"] < 1
    assert set(stats["per_layer"]) == set(pruner.names)
    kept = {n: float(pruner.mask(n).float().mean()) for n in pruner.names}
    assert stats["per_layer"] == pytest.approx({n: 1 - k for n, k in kept.items()}, abs=1e-6)


def test_nan_scores_are_kept_and_counted() -> None:
    model, optimizer, pruner = start()
    for i, (x, y) in enumerate(batches(40)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if i == 12:
            pruner.importance.ipt[0][0, :4] = float("nan")
        optimizer.step()
    stats = pruner.stats()
    assert stats["nan"] == 4
    assert bool(pruner.mask(pruner.names[0])[0, :4].all())


def test_autograd_notices_that_weights_were_stepped_and_masked() -> None:
    for optimizer_class in (PinsAdamW, torch.optim.AdamW):
        model, optimizer, pruner = start(optimizer_class=optimizer_class)
        train(model, optimizer, 25)
        x, _ = next(batches(1))
        for change in (optimizer.step, pruner.finalize):
            loss = model(x).sum()
            change()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
