"""Predicted against measured changes of the loss: losses whose answer is known, and a training that notices nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, batches, same, start, train
from torch import Tensor, nn

from pins_ext import ops, reference
from pins_ext.optim import PinsAdamW, PinsSGD
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.pruner import Pruner
from pins_ext.studies.diagnosis.changes import Diagnosis, spread
from pins_ext.studies.diagnosis.exchanges import Exchanger, draw
from pins_ext.studies.diagnosis.fixed_loss import FixedLoss
from pins_ext.studies.diagnosis.summary import _share

FIXED = list(batches(2, seed=7))


def entropy(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])


def linear(pruner: Pruner) -> Callable[[Any], Tensor]:
    """A loss that first order describes exactly; in double precision, so that rounding is no excuse."""
    generator = torch.Generator().manual_seed(5)
    slopes = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in pruner.parameters]
    return lambda batch: sum(((s * p).sum() for s, p in zip(slopes, pruner.parameters, strict=True)), batch)


def quadratic(pruner: Pruner) -> Callable[[Any], Tensor]:
    """Half the sum of squares: weights are independent, yet first order predicts twice the change."""
    return lambda batch: sum((0.5 * p.double().square().sum() for p in pruner.parameters), batch)


def diagnosed(loss: Callable[[Pruner], Callable[[Any], Tensor]], config: PruneConfig = CONFIG, **kw: Any) -> Diagnosis:
    model, optimizer, pruner = start(config)
    found = Diagnosis(pruner, loss(pruner), [torch.zeros(()), torch.ones(())], masks=4, random_masks=2, **kw)
    train(model, optimizer, STEPS)
    return found


def test_a_linear_loss_is_predicted_exactly() -> None:
    found = diagnosed(linear, exchanges=4)
    assert {(c.kind, c.extent) for c in found.changes} == {
        (kind, extent) for kind in ("criterion", "random") for extent in ("new", "whole", "step")
    }
    assert len(found.changes) == 4 * (3 + 2 * 3)
    for change in found.changes:
        assert change.weights > 0
        assert change.predicted == pytest.approx(change.measured, rel=1e-5, abs=1e-6)
        for part, measured in (change.fractions or {}).items():
            assert measured == pytest.approx(part * change.predicted, rel=1e-4, abs=1e-6)
    assert any(abs(c.predicted) > 0.1 for c in found.changes)
    (tried,) = found.exchanges
    for stratum in tried.strata:
        assert stratum.together == pytest.approx(stratum.total, abs=1e-6)
        assert stratum.together == pytest.approx(sum(g.predicted for g in stratum.groups), abs=1e-6)
        gains = [g.measured for g in stratum.lowering]
        assert gains
        assert stratum.lowering_together == pytest.approx(sum(gains), abs=1e-6)
        assert stratum.best == min(gains)


def test_a_quadratic_loss_changes_by_half_of_what_is_predicted() -> None:
    for change in diagnosed(quadratic, exchange_masks=0).changes:
        if change.extent != "step":
            assert change.predicted == pytest.approx(2 * change.measured, rel=1e-5)
            assert change.measured < 0


def test_the_step_is_predicted_from_the_weights_before_it() -> None:
    """Plain SGD along the gradient of the same linear loss: the general formula and that of SGD agree."""
    _, optimizer, pruner = start(optimizer_class=PinsSGD, lr=0.01)
    loss = linear(pruner)
    found = Diagnosis(pruner, loss, [torch.zeros(())], masks=3, random_masks=1, exchange_masks=0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(torch.zeros(())).backward()
        optimizer.step()
    steps = [c for c in found.changes if c.extent == "step"]
    assert len(steps) == 6
    for change in steps:
        whole = next(c for c in found.changes if (c.step, c.kind, c.extent) == (change.step, change.kind, "whole"))
        assert change.predicted_sgd == pytest.approx(change.predicted, rel=1e-5)
        assert change.measured == pytest.approx(change.predicted, rel=1e-5)
        assert abs(change.predicted - whole.predicted) > 0.1


class Dropping(Network):
    """A network that draws random numbers in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.3, self.training))


UNNOTICED: dict[str, tuple[Any, PruneConfig]] = {
    "fused": (PinsAdamW, CONFIG),
    "hooks": (torch.optim.AdamW, CONFIG),
    "momentum": (lambda params, lr: PinsSGD(params, lr=lr, momentum=0.9), CONFIG),
    "strict": (PinsAdamW, PruneConfig(0.8, mask_policy="strict", delta_t=5, warmup=5, cooldown=20)),
    "clears moments": (PinsAdamW, PruneConfig(0.8, mask_optimizer_state=True, delta_t=5, warmup=5, cooldown=20)),
    "magnitude": (PinsAdamW, PruneConfig(0.8, criterion="magnitude", delta_t=5, warmup=5, cooldown=20)),
    "shadow": (PinsAdamW, PruneConfig(0.8, criterion="platon", mask_policy="strict", delta_t=5, warmup=5, cooldown=20)),
    "update": (PinsAdamW, PruneConfig(0.8, criterion="pins-update", delta_t=5, warmup=5, cooldown=20)),
    "movement by layer": (PinsAdamW, PruneConfig(0.8, criterion="movement", scope="layer", delta_t=5, cooldown=20)),
    "last deviation": (PinsAdamW, PruneConfig(0.8, beta2=0, delta_t=5, warmup=5, cooldown=20)),
    "one shot": (PinsAdamW, PruneConfig(0.8, schedule="one-shot", delta_t=5, warmup=5, cooldown=20)),
}


@pytest.mark.parametrize("variant", UNNOTICED)
def test_training_does_not_notice(variant: str) -> None:
    optimizer_class, config = UNNOTICED[variant]
    ends = []
    for watched in (False, True):
        model = Dropping(16, classes=16)
        optimizer = optimizer_class(model.parameters(), lr=3e-3)
        pruner = Pruner(model, optimizer, config, STEPS)
        torch.manual_seed(11)
        if watched:
            found = Diagnosis(pruner, entropy(model), FIXED, masks=5, random_masks=1, exchanges=3, exchange_masks=2)
        train(model, optimizer, STEPS)
        assert model.training
        pruner.finalize()
        states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        ends.append((model, pruner.masks.bits, states, torch.get_rng_state(), [p.grad for p in model.parameters()]))
    (plain, *before), (diagnosed_model, *after) = ends
    assert same(plain, diagnosed_model)
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert found.observations
    assert found.exchanges
    assert found.loss.kept == []


def test_what_is_observed_is_the_mask_that_comes() -> None:
    """The measured change is that between the model as it was stepped and as training goes on with it."""
    model, optimizer, pruner = start()
    found = Diagnosis(pruner, entropy(model), FIXED, masks=3, random_masks=1, exchange_masks=0)
    after: dict[int, float] = {}

    def note() -> None:
        if pruner.step - 1 in found.steps:
            after[pruner.step] = found.loss.value()

    train(model, optimizer, STEPS, after=note)
    assert sorted(after) == [o.step for o in found.observations] == [t + 1 for t in found.steps]
    for seen in found.observations:
        whole = next(c for c in found.changes if (c.step, c.kind, c.extent) == (seen.step, "criterion", "whole"))
        assert after[seen.step] == seen.loss + whole.measured
        assert whole.weights == round(seen.sparsity * pruner.n_weights)
        new = next(c for c in found.changes if (c.step, c.kind, c.extent) == (seen.step, "criterion", "new"))
        assert 0 < new.weights <= whole.weights
    assert found.loss.evaluations > 0


def test_draws_are_exact_and_among_the_live() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(n, generator=generator) < share for n, share in ((70, 0.3), (1, 1.0), (129, 0.9), (5, 0.0))]
    bits, sizes = [reference.pack_bits(m) for m in masks], [len(m) for m in masks]
    live = sum(int(m.sum()) for m in masks)
    for n in range(live + 1):
        drawn = list(draw(bits, sizes, n, generator))
        assert sum(map(len, drawn)) == n
        for mask, at in zip(masks, drawn, strict=True):
            assert mask[at].all()
            assert len(at.unique()) == len(at)


def test_the_nearest_weights_are_the_nearest() -> None:
    _, optimizer, pruner = start(PruneConfig(0.5, criterion="magnitude", delta_t=5, warmup=0, cooldown=50))
    train(pruner.model, optimizer, 30)
    loss = FixedLoss(pruner.model, pruner.parameters, entropy(pruner.model), FIXED)
    loss.keep()
    exchanger = Exchanger(pruner, loss, 0.0, torch.Generator())
    kept, pruned = exchanger._nearest(20)
    values = torch.cat([p.detach().flatten() for p in pruner.parameters]).abs()
    keep = torch.cat([pruner.mask(name).flatten() for name in pruner.names])
    assert keep[kept].all()
    assert not keep[pruned].any()
    distance = (values.double() - ops.score_of_key(pruner.masks.cutoff).double()).abs()
    for places, side in ((kept, keep), (pruned, ~keep)):
        assert distance[places].max() <= distance[side].sort().values[19]


def test_noise_is_that_of_rounding() -> None:
    model = Network()
    parameters = [p for p in model.parameters() if p.dim() == 2]
    with torch.no_grad():
        parameters[0][0, 0] = 0
    loss = FixedLoss(model, parameters, entropy(model), FIXED)
    before = [p.detach().clone() for p in parameters]
    loss.keep()
    noise = loss.noise(torch.Generator().manual_seed(1), repeats=8)
    assert 0 < noise < 1e-6 * loss.value()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    exact = FixedLoss(model.double(), parameters, entropy(model), [(x.double(), y) for x, y in FIXED])
    exact.keep()
    assert exact.noise(torch.Generator().manual_seed(1)) < 1e-6 * noise


def test_steps_are_spread() -> None:
    assert spread(range(10), 100) == list(range(10))
    assert spread(range(9), 1) == [4]
    assert spread(range(100), 4) == [12, 37, 62, 87]
    assert spread([], 3) == []
    assert spread(range(5), 0) == []


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (0.0000001, "less than 0.001 %"),
        (0.0123, "1.2 %"),
        (0.994, "99 %"),
        (0.996, "100 %"),
        (1.0, "100 %"),
        (12, "1,200 %"),
    ],
)
def test_a_share_has_no_exponent(part: float, text: str) -> None:
    assert _share(part) == text


def test_batches_are_needed() -> None:
    *_, pruner = start()
    with pytest.raises(ValueError, match="at least one batch"):
        Diagnosis(pruner, entropy(pruner.model), [])
    assert pruner.before_mask is None


def test_it_lets_go() -> None:
    model, optimizer, pruner = start()
    found = Diagnosis(pruner, entropy(model), FIXED)
    found.detach()
    train(model, optimizer, STEPS)
    assert found.changes == []
    assert math.isfinite(pruner.stats()["sparsity"])
