"""Training that goes on after an exception inside an optimizer's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, batches, exact, same, start
from torch import nn

from pins_ext import PruneConfig, Pruner, reference
from pins_ext.optim import PinsAdamW


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
    model = Network(16, classes=16)
    first = PinsAdamW([*model.embed.parameters(), *model.layers[0].parameters()], lr=3e-3)
    second = torch.optim.AdamW([*model.layers[1].parameters(), *model.classifier.parameters()], lr=3e-3)
    pruner = Pruner(model, [first, second], CONFIG, STEPS)
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
