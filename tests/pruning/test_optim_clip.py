"""Clipping in the optimizer's pass: the norm of torch's clip_grad_norm_, and the bits of gradients scaled by hand."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, batches, same
from torch import nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import FusedOptimizer, PinsAdamW, PinsSGD

MAX_NORM = 0.1  # below every norm here
CONFIGS = [
    CONFIG,
    PruneConfig(**(vars(CONFIG) | {"criterion": "pins-update"})),
    PruneConfig(**(vars(CONFIG) | {"criterion": lambda p, g, lr: (p * g).abs()})),
]
OPTIMIZERS: list[tuple[type[FusedOptimizer], dict[str, Any]]] = [
    (PinsAdamW, {"lr": 3e-3}),
    (PinsSGD, {"lr": 0.05, "momentum": 0.9}),
]


def backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("optimizer_class", "options"), OPTIMIZERS)
def test_a_pruned_run_has_the_bits_of_scaled_gradients(
    optimizer_class: Any, options: dict[str, Any], config: PruneConfig
) -> None:
    models = [Network(16, classes=16) for _ in range(2)]
    optimizers = [optimizer_class(m.parameters(), **options) for m in models]
    pruners = [Pruner(m, o, config, STEPS) for m, o in zip(models, optimizers, strict=True)]
    for x, y in batches(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, x, y)
            before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            norm = optimizer.clip_grad_norm_(MAX_NORM)
            assert all(map(torch.equal, before, [p.grad for p in model.parameters() if p.grad is not None]))
            torch.testing.assert_close(norm, nn.utils.get_total_norm(before))
            if optimizer is optimizers[1]:
                factor, optimizer.grad_clip = optimizer.grad_clip, None
                assert factor < 1
                for p in model.parameters():
                    p.grad.mul_(factor)
            optimizer.step()
    assert same(*models)
    assert all(map(torch.equal, pruners[0].importance.ipt, pruners[1].importance.ipt))
    assert pruners[0].finalize()["zeros"] == pruners[1].finalize()["zeros"] > 0


@pytest.mark.parametrize(("optimizer_class", "options"), OPTIMIZERS)
def test_it_trains_as_torch_clips(optimizer_class: Any, options: dict[str, Any]) -> None:
    models = [Network(16, classes=16) for _ in range(2)]
    optimizers = [optimizer_class(m.parameters(), **options) for m in models]
    for x, y in batches(20):
        for model in models:
            backward(model, x, y)
        optimizers[0].clip_grad_norm_(MAX_NORM)
        nn.utils.clip_grad_norm_(models[1].parameters(), MAX_NORM)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        # The norms differ by a rounding, and AdamW's first steps magnify it.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def small() -> tuple[nn.Parameter, PinsSGD]:
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 3.0)
    return p, PinsSGD([p], lr=1.0)


def test_the_factor_serves_one_step() -> None:
    p, optimizer = small()
    assert float(optimizer.clip_grad_norm_(3.0)) == 6
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), -0.5))
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), -3.5))


def test_zero_grad_drops_it_and_a_second_call_replaces_it() -> None:
    p, optimizer = small()
    optimizer.clip_grad_norm_(3.0)
    optimizer.zero_grad()
    p.grad = torch.full((4,), 3.0)
    optimizer.clip_grad_norm_(1.0)
    optimizer.clip_grad_norm_(3.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), -0.5))


def test_a_skipped_step_drops_it() -> None:
    p, optimizer = small()
    optimizer.clip_grad_norm_(3.0)
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(4))
    del optimizer.found_inf
    assert optimizer.grad_clip is None


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_is_torchs(bad: float) -> None:
    ours, optimizer = small()
    ours.grad[1] = bad
    theirs = nn.Parameter(torch.ones(4))
    theirs.grad = ours.grad.clone()
    norm = nn.utils.clip_grad_norm_([theirs], 3.0)
    torch.testing.assert_close(optimizer.clip_grad_norm_(3.0), norm, equal_nan=True)
    optimizer.step()
    torch.testing.assert_close(ours.detach(), (theirs - theirs.grad).detach(), equal_nan=True)


def test_a_wrong_max_norm_is_named() -> None:
    _, optimizer = small()
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.clip_grad_norm_(float("nan"))


@pytest.mark.parametrize("pruned", [False, True])
def test_a_refused_step_has_moved_nothing_and_keeps_its_clip(pruned: bool) -> None:
    """What a batch behind the first refuses is refused before that steps; the retry is clipped as that was to be."""
    model, other = Network(), Network()
    models = [nn.ModuleList([m, nn.Embedding(4, 4), nn.Linear(2, 2).bfloat16()]) for m in (model, other)]
    optimizers = [PinsAdamW(m.parameters(), lr=1e-2) for m in models]
    if pruned:
        for m, o in zip(models, optimizers, strict=True):
            Pruner(m, o, PruneConfig(**(vars(CONFIG) | {"exclude": ("2.*",)})), STEPS)
    for m, o in zip(models, optimizers, strict=True):
        m.load_state_dict(models[0].state_dict())
        for i, p in enumerate(m.parameters()):
            p.grad = torch.full_like(p, 3.0 + i)
        o.clip_grad_norm_(MAX_NORM)
    last = list(models[0].parameters())[-1]
    before, good = [p.detach().clone() for p in models[0].parameters()], last.grad
    for wrong, message in (
        (good.to_sparse(), "does not support sparse gradients"),
        (good, "needs contiguous parameters"),
    ):
        last.grad = wrong
        if wrong is good:
            last = list(models[0].parameters())[-2]
            last.data = last.data.t()
        with pytest.raises((RuntimeError, ValueError), match=message):
            optimizers[0].step()
        assert all(map(torch.equal, before[:-2], list(models[0].parameters())[:-2]))
    last.data = last.data.t()
    for o in optimizers:
        o.step()
    assert same(*models)


def test_what_a_cuda_graph_reads_is_kept_when_other_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (nn.Parameter(torch.ones(n)) for n in (3, 5))
    optimizer = PinsAdamW([one, other])

    def layout(p: nn.Parameter, captured: bool) -> weakref.ref[object]:
        optimizer.zero_grad()
        p.grad = torch.ones_like(p)
        with monkeypatch.context() as patched:
            patched.setattr("pins_ext.ops.capturing", lambda _: captured)
            optimizer.clip_grad_norm_(1.0)
        (found,) = optimizer._norm._layouts.values()
        return weakref.ref(found)

    eager, captured = layout(one, False), layout(other, True)
    layout(one, False)
    gc.collect()
    assert eager() is None
    assert captured() is not None
