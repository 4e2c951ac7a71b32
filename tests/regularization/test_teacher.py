"""Self-regularization: what the teacher is at each step, and what it is made of."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from regularized import Net, batches, same, train, weights
from torch import Tensor, nn
from torch.nn import functional as F

from pins_ext.regularization.self_regularizer import SelfRegularizer


def test_latest_is_the_last_multiple() -> None:
    model = Net()
    reg = SelfRegularizer(model, "latest", every=3)
    history = []
    for step in range(1, 11):
        history += train(model, reg, 1, step)
        due = step - step % 3
        assert reg.teacher.snapshot_step == (due or None)
        assert (reg.teacher.module is None) == (due == 0)
        if reg.teacher.module is not None:
            assert same(weights(reg.teacher.module), history[due - 1])


def test_snapshots_come_every_twentieth_of_training() -> None:
    reg = SelfRegularizer(Net(), total_steps=100)
    assert reg.teacher.every == 5
    reg.set_total_steps(1000)
    assert reg.teacher.every == 5
    assert SelfRegularizer(Net(), total_steps=7).teacher.every == 1


def test_steps_that_are_told_may_jump_and_repeat() -> None:
    model = Net()
    reg = SelfRegularizer(model, every=4)
    reg.step(3)
    assert reg.teacher.module is None
    reg.step(5)
    assert reg.teacher.snapshot_step == 5
    with torch.no_grad():
        model.first.weight.zero_()
    reg.step(5)
    assert reg.teacher.module is not None
    assert reg.teacher.module.first.weight.abs().sum() > 0
    with pytest.raises(ValueError, match="went back from 5 to 4"):
        reg.step(4)


def test_best_is_the_model_of_the_best_score() -> None:
    model = Net()
    reg = SelfRegularizer(model, "best")
    history, best = [], None
    for step, score in enumerate([float("nan"), 0.4, 0.4, 0.3, 0.6, 0.5]):
        history += train(model, reg, 1, step)
        assert reg.evaluated(score) == (step in (1, 4))
        best = {1: 1, 4: 4}.get(step, best)
        assert (reg.teacher.module is None) == (best is None)
        if best is not None and reg.teacher.module is not None:
            assert same(weights(reg.teacher.module), history[best])
    assert reg.teacher.best_score == 0.6
    assert reg.plan()["reads_dev"] is True
    assert SelfRegularizer(model, "latest", every=1).evaluated(1.0) is False


@pytest.mark.parametrize("decay", [None, 0.9])
def test_ema_starts_at_the_first_snapshot_and_averages_every_step(decay: float | None) -> None:
    model = Net()
    reg = SelfRegularizer(model, "ema", every=4, ema_decay=decay)
    history = train(model, reg, 9)
    parameters = dict(model.named_parameters())
    d = decay or 1 - 1 / 4
    average = history[3]
    for state in history[4:]:
        average = {n: d * average[n] + (1 - d) * state[n] if n in parameters else state[n] for n in average}
    # The tied name is no parameter of its own.
    average["again.weight"] = average["first.weight"]
    assert reg.teacher.module is not None
    # lerp rounds in another order
    torch.testing.assert_close(weights(reg.teacher.module), average, rtol=1e-5, atol=1e-6)


def test_ema_of_sixteen_bit_weights_averages_in_float32() -> None:
    model = Net(dtype=torch.bfloat16)
    reg = SelfRegularizer(model, "ema", every=1, ema_decay=0.999)
    reg.step()
    with torch.no_grad():
        model.first.weight.add_(0.5)
    start = copy.deepcopy(reg.teacher.module.first.weight).float()  # type: ignore[union-attr]
    for _ in range(200):
        reg.step()
    teacher = reg.teacher.module
    assert teacher is not None
    assert teacher.first.weight.dtype == torch.bfloat16
    expected = start + (1 - 0.999**200) * (model.first.weight.float() - start)
    assert torch.equal(teacher.first.weight, reg.state_dict()["tensors"]["first.weight"].bfloat16())
    torch.testing.assert_close(reg.state_dict()["tensors"]["first.weight"], expected, rtol=1e-4, atol=1e-5)


def test_none_is_the_task_loss() -> None:
    model = Net()
    reg = SelfRegularizer(model, "none")
    inputs = batches(1)[0]
    outputs = model(**inputs)
    torch.testing.assert_close(reg(outputs, inputs), outputs["loss"])
    reg.step(100)
    assert reg.teacher.module is None
    assert reg.plan()["memory"] == {}


def test_teacher_init_is_there_from_the_start() -> None:
    torch.manual_seed(5)
    start = Net()
    with torch.no_grad():
        start.classifier.weight.normal_()
    kept = weights(start)
    model = Net()
    reg = SelfRegularizer(model, "latest", every=2, teacher_init=start)
    assert reg.teacher.module is not start
    assert same(weights(reg.teacher.module), kept)  # type: ignore[arg-type]
    train(model, reg, 2)
    assert same(weights(reg.teacher.module), weights(model))  # type: ignore[arg-type]
    assert same(weights(start), kept)


def test_teacher_shares_nothing_keeps_ties_and_needs_no_gradient() -> None:
    model = Net()
    reg = SelfRegularizer(model, every=1)
    train(model, reg, 1)
    teacher = reg.teacher.module
    assert isinstance(teacher, Net)
    own = {t.data_ptr() for t in itertools.chain(teacher.parameters(), teacher.buffers())}
    assert own.isdisjoint(t.data_ptr() for t in itertools.chain(model.parameters(), model.buffers()))
    assert teacher.again.weight is teacher.first.weight
    assert not teacher.training
    assert model.training
    assert not any(p.requires_grad for p in teacher.parameters())
    train(model, reg, 2)
    assert {t.data_ptr() for t in itertools.chain(teacher.parameters(), teacher.buffers())} == own
    assert teacher.again.weight is teacher.first.weight


class Noisy(nn.Module):
    """Draws random numbers in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, training=True)


@pytest.mark.parametrize("kind", [Net, Noisy])
def test_teacher_leaves_the_random_stream_alone(kind: type[nn.Module]) -> None:
    model = kind()
    reg = SelfRegularizer(model, every=1)
    reg.step()
    inputs = batches(1)[0]
    torch.manual_seed(7)
    outputs = model(inputs["x"])
    after_forward = torch.get_rng_state()
    again = model(inputs["x"])
    torch.manual_seed(7)
    assert torch.equal(_logits(model(inputs["x"])), _logits(outputs))
    reg(outputs, inputs).backward()
    assert torch.equal(torch.get_rng_state(), after_forward)
    assert torch.equal(_logits(model(inputs["x"])), _logits(again))


def _logits(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, dict) else outputs


def test_zero_weight_trains_as_without_a_teacher_to_the_last_bit() -> None:
    plain, regular = Net(), Net()
    torch.manual_seed(1)
    without = train(plain, SelfRegularizer(plain, "none"), 6)
    torch.manual_seed(1)
    with_teacher = train(regular, SelfRegularizer(regular, every=2, weight=0.0), 6)
    assert same(without[-1], with_teacher[-1])


def test_a_bare_tensor_of_logits_will_do() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    reg = SelfRegularizer(model, every=1, weight=1.0)
    reg.step()
    inputs = batches(1)[0]
    with torch.no_grad():
        model[0].weight.mul_(3)
    loss = reg(model(inputs["x"]), {"input": inputs["x"], "labels": inputs["labels"]})
    assert reg.stats()["divergence"] > 0
    assert loss.item() == pytest.approx(reg.stats()["task"] + reg.stats()["divergence"])
    assert reg.stats()["weight"] == 1.0
