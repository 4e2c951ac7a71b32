"""Training that goes on after an exception inside an optimizer's step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, batches, exact, same, start
from torch import nn

from pins_ext import PruneConfig, Pruner, reference
from pins_ext.optim import PinsAdamW
from pins_ext.optim.step import NonFiniteError


def backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def fail(optimizer: Any, p: nn.Parameter) -> None:
    """A step that dies on an unpruned parameter, when the pruner has begun it."""
    assert p.grad is not None
    p.grad = p.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("optimizer_class", [PinsAdamW, torch.optim.AdamW])
def test_a_step_takes_the_place_of_one_that_died(optimizer_class: Any) -> None:
    model, optimizer, pruner = start(optimizer_class=optimizer_class)
    weight = pruner.parameters[0]
    expected, gradients = torch.zeros_like(weight), 0
    for i, (x, y) in enumerate(batches(STEPS)):
        for dies in [True, True, False] if i == 2 else [False]:
            backward(model, x, y)
            # PinsAdamW refuses before anything is written; torch's is begun, and its gradient has counted.
            if i < 4 and not (dies and optimizer_class is PinsAdamW):
                c = reference.instant_score("pins", weight, weight, weight.grad, 3e-3)
                expected, gradients = reference.next_ipt("pins", expected, c, gradients).detach(), gradients + 1
            if dies:
                fail(optimizer, model.embed.bias)
            else:
                optimizer.step()
        if i == 3:
            assert float(pruner.importance.accepted[0]) == gradients == (4 if optimizer_class is PinsAdamW else 6)
            assert torch.equal(pruner.importance.ipt[0], expected)
    assert pruner.step == STEPS
    assert pruner.verify()["zeros"] == exact(pruner)


def test_a_death_in_one_of_several_optimizers_ends_the_step() -> None:
    model, (first, second), pruner = two_optimizers()
    deaths = {4: (first, model.embed.bias), 20: (second, model.classifier.bias), 30: (first, model.embed.bias)}
    for i, (x, y) in enumerate(batches(STEPS)):
        backward(model, x, y)
        dying, p = deaths.get(i, (None, model.embed.bias))
        for optimizer in (first, second):
            if optimizer is dying:
                fail(optimizer, p)
                # Where the first dies, the training loop gives up on the batch.
                break
            optimizer.step()
    assert pruner.step == STEPS - 2
    assert pruner.finalize()["zeros"] == exact(pruner)


@pytest.mark.parametrize("options", [{}, {"beta2": 0}, {"criterion": "movement"}, {"mask_policy": "strict"}], ids=str)
@pytest.mark.parametrize("optimizer_class", [PinsAdamW, torch.optim.AdamW])
def test_an_exception_in_before_mask_leaves_a_gradient_counted_once(
    optimizer_class: Any, options: dict[str, Any]
) -> None:
    config = PruneConfig(**{"sparsity": 0.8, "delta_t": 5, "warmup": 5, "cooldown": 20} | options)

    def stop() -> None:
        raise KeyboardInterrupt

    runs = []
    for dying in ((), (10, 25, 44)):
        model, optimizer, pruner = start(config, optimizer_class)
        generator, counts = torch.Generator().manual_seed(1), []
        for i in range(STEPS):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            pruner.before_mask = stop if i in dying else None
            if i in dying:
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
            else:
                optimizer.step()
            counts.append(float(pruner.importance.accepted[0]))
        assert pruner.finalize()["zeros"] == exact(pruner)
        runs.append((model, pruner, counts))
    (whole, undisturbed, expected), (model, pruner, counts) = runs
    assert pruner.step == undisturbed.step == STEPS
    # A full window ends in the pass that fills it, or, after an interruption, with the next step.
    assert [count % 5 for count in counts] == [count % 5 for count in expected]
    assert same(whole, model)


def rolled_back(told: Any, model: nn.Module, optimizers: list[Any], pruner: Pruner) -> None:
    """Give everything the states that were taken before."""
    for each, state in zip((model, *optimizers, pruner), told, strict=True):
        each.load_state_dict(state)


def states(model: nn.Module, optimizers: list[Any], pruner: Pruner) -> list[Any]:
    """Those of everything, the pruner's first: in the order of `rolled_back`."""
    last = pruner.state_dict()
    return copy.deepcopy([*(each.state_dict() for each in (model, *optimizers)), last])


def alike(one: tuple[nn.Module, Pruner], other: tuple[nn.Module, Pruner]) -> bool:
    """Weights, masks and steps."""
    masks = (torch.equal(one[1].mask(name), other[1].mask(name)) for name in one[1].names)
    return same(one[0], other[0]) and one[1].step == other[1].step and all(masks)


@pytest.mark.parametrize("policy", ["reference", "strict"])
@pytest.mark.parametrize("bad", [13, 14])
def test_a_rollback_forgets_the_step_that_was_not_finite(policy: str, bad: int) -> None:
    """As NonFiniteError says: from the last checkpoint, with the same objects."""
    runs = []
    for rolls in (False, True):
        model = Network(16)
        optimizer = PinsAdamW(model.parameters(), lr=3e-3)
        optimizer.release_gradients()
        config = PruneConfig(sparsity=0.5, delta_t=3, warmup=3, cooldown=6, mask_policy=policy)
        pruner, given = Pruner(model, optimizer, config, 30), list(batches(30))
        for i, (x, y) in enumerate(given):
            if rolls and i == 12:
                before = states(model, [optimizer], pruner)
                for j in range(12, bad + 1):
                    scale = float("nan") if j == bad else 1.0
                    (nn.functional.cross_entropy(model(given[j][0]), given[j][1]) * scale).backward()
                    if j < bad:
                        optimizer.step()
                with pytest.raises(NonFiniteError):
                    optimizer.step()
                rolled_back(before, model, [optimizer], pruner)
                assert pruner.slots.begun == []
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        runs.append((model, pruner))
    assert alike(*runs)


def test_a_rollback_forgets_a_backward_that_died() -> None:
    runs = []
    for rolls in (False, True):
        model = Network(16)
        optimizer = PinsAdamW(model.parameters(), lr=3e-3)
        optimizer.release_gradients()
        pruner = Pruner(model, optimizer, CONFIG, STEPS)
        for i, (x, y) in enumerate(batches(STEPS)):
            if rolls and i == 12:
                before = states(model, [optimizer], pruner)
                hidden: list[torch.Tensor] = []
                seen = model.layers[1].register_forward_pre_hook(lambda _, inputs, into=hidden: into.append(inputs[0]))
                loss = nn.functional.cross_entropy(model(x), y)
                seen.remove()
                hidden[0].register_hook(stop)
                with pytest.raises(KeyboardInterrupt):
                    loss.backward()
                model.zero_grad()
                rolled_back(before, model, [optimizer], pruner)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        runs.append((model, pruner))
    assert alike(*runs)


def stop(_: torch.Tensor) -> None:
    raise KeyboardInterrupt


def test_between_steps_a_step_that_one_optimizer_was_left_out_of_is_over() -> None:
    """A gradient scaler calls no hook of an optimizer that it skips."""

    def trained(skip: int, resumes: int | None, looks: bool) -> tuple[nn.Module, Pruner]:
        made = two_optimizers()
        for i, (x, y) in enumerate(batches(STEPS)):
            model, optimizers, pruner = made
            backward(model, x, y)
            for optimizer in optimizers[:1] if i == skip else optimizers:
                optimizer.step()
            if looks:
                copied = copy.deepcopy(pruner)
                assert copied.step == pruner.step == i + 1
                with pruner.masked_view():
                    assert sum(int((p == 0).sum()) for p in pruner.parameters) == sum(pruner.masks.pruned())
                pruner.verify()
            if i == resumes:
                told = states(model, optimizers, pruner)
                made = two_optimizers()
                rolled_back(told, *made)
        return model, pruner

    for skip in (12, STEPS - 2):
        unbroken = trained(skip, None, False)
        assert alike(unbroken, trained(skip, skip, False))
        assert alike(unbroken, trained(skip, None, True))


def two_optimizers() -> tuple[nn.Module, list[Any], Pruner]:
    model = Network(16, classes=16)
    first = PinsAdamW([*model.embed.parameters(), *model.layers[0].parameters()], lr=3e-3)
    second = torch.optim.AdamW([*model.layers[1].parameters(), *model.classifier.parameters()], lr=3e-3)
    return model, [first, second], Pruner(model, [first, second], CONFIG, STEPS)


def test_what_a_step_calls_at_its_end_may_ask_for_states() -> None:
    model, optimizers, pruner = two_optimizers()
    steps = []

    def ask() -> None:
        steps.append(pruner.state_dict()["step"])
        with pruner.masked_view():
            pass

    pruner.before_mask = ask
    for x, y in batches(STEPS):
        backward(model, x, y)
        for optimizer in optimizers:
            optimizer.step()
    assert pruner.step == STEPS
    assert steps
    assert steps == sorted(set(steps))
