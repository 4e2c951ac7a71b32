"""Settings of self-regularization: what they cost, and which are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from regularized import Net, batches

from pins_ext.regularization.self_regularizer import SelfRegularizer


def test_plan_counts_memory() -> None:
    model = Net(dtype=torch.bfloat16)
    reg = SelfRegularizer(model, "ema", score_gradient="task", total_steps=40)
    parameters = sum(p.numel() for p in model.parameters())
    plan = reg.plan()
    assert plan["memory"] == {
        "teacher": 2 * parameters + sum(b.nbytes for b in model.buffers()),
        "running average": 4 * parameters,
        "task gradient": 2 * parameters,
    }
    assert (plan["every"], plan["reads_dev"], plan["teacher"]) == (2, False, "ema")
    reg.track_task_gradients(["first.weight"])
    assert reg.plan()["memory"]["task gradient"] == 2 * 36


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": "strong"}, "weight must be 'adaptive' or a number"),
        ({"weight": -1.0}, "weight must be"),
        ({"weight": float("nan")}, "weight must be"),
        ({"temperature": 0.0}, "temperature must be a number > 0"),
        ({"score_gradient": "both"}, "score_gradient must be one of joint, task"),
        ({"every": 0}, "every is a number of steps"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"head": "seq2seq"}, "head must be 'auto' or one of"),
        ({"teacher": "lastest"}, "'lastest' is none of latest, best, ema, none, and Net has no from_pretrained"),
        ({"teacher": "none", "teacher_init": Net()}, "has no use for it"),
        ({"teacher_init": Net(classes=5)}, "does not fit the model.*classifier.weight first"),
        ({"head": "regression"}, "weight='adaptive' needs class probabilities"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SelfRegularizer(Net(), **settings)


def test_adaptive_is_refused_for_one_output() -> None:
    model = Net(classes=1)
    reg = SelfRegularizer(model, every=1)
    inputs = {"x": batches(1)[0]["x"], "labels": torch.randn(8)}
    with pytest.raises(ValueError, match="weight='adaptive' needs class probabilities"):
        reg(model(inputs["x"]), inputs)
    token = SelfRegularizer(model, Net(classes=1), head="classification")
    with pytest.raises(ValueError, match="at least two classes"):
        token(model(inputs["x"]), {"x": inputs["x"], "labels": torch.zeros(8, dtype=torch.long)})


def test_a_teacher_of_another_task_and_the_model_as_its_own_teacher_are_refused() -> None:
    model = Net()
    with pytest.raises(ValueError, match="the model itself"):
        SelfRegularizer(model, model)
    reg = SelfRegularizer(model, Net(classes=4))
    inputs = batches(1)[0]
    with pytest.raises(ValueError, match=r"the teacher's logits are \[8, 4\] and the model's \[8, 3\]"):
        reg(model(**inputs), inputs)


def test_snapshots_need_to_know_when() -> None:
    with pytest.raises(ValueError, match="give every or total_steps"):
        SelfRegularizer(Net()).step()


@pytest.mark.parametrize("told", [False, True])
def test_batches_without_a_step_are_noticed(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pins_ext.regularization.self_regularizer._BATCHES_BEFORE_A_WARNING", 3)
    model = Net()
    reg = SelfRegularizer(model, every=100)
    (inputs,) = batches(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(8):
            reg(model(**inputs), inputs)
            if told:
                reg.step()
    assert [str(w.message).startswith("3 batches and no SelfRegularizer.step()") for w in seen] == [True] * (not told)


def test_a_replaced_forward_is_not_shared_by_a_copy() -> None:
    model = Net()
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)  # type: ignore[method-assign]
    reg = SelfRegularizer(model, every=1)
    with pytest.raises(RuntimeError, match=r"Net.forward was replaced by a function"):
        reg.step()
