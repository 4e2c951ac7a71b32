"""A self-regularizer attached to a model: the same losses as without, evaluation and copies left alone, refusals."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from regularized import Net, batches, same, train, weights
from torch import Tensor, nn
from torch.nn import functional as F

from pins_ext.regularization.self_regularizer import SelfRegularizer


@pytest.mark.parametrize("positional", [False, True])
def test_attached_equals_explicit(positional: bool) -> None:
    explicit, attached = Net(), Net()
    torch.manual_seed(1)
    expected = train(explicit, SelfRegularizer(explicit, every=2), 7)
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(attached.parameters(), lr=0.05)
    reg = SelfRegularizer(attached, every=2)
    reg.attach(attached, optimizer)
    for i, inputs in enumerate(batches(7)):
        outputs = attached(*inputs.values()) if positional else attached(**inputs)
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        assert same(weights(attached), expected[i])
    reg.detach()
    inputs = batches(1)[0]
    outputs = attached(**inputs)
    assert torch.equal(outputs["loss"], F.cross_entropy(outputs["logits"], inputs["labels"]))
    assert not attached._forward_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_attached_leaves_evaluation_and_copies_alone() -> None:
    model = Net()
    reg = SelfRegularizer(model, every=1, weight=1.0)
    reg.attach(model)
    reg.step()
    with torch.no_grad():
        model.classifier.weight.mul_(3)
    inputs = batches(1)[0]
    model.eval()
    outputs = model(**inputs)
    assert torch.equal(outputs["loss"], F.cross_entropy(outputs["logits"], inputs["labels"]))
    model.train()
    copied = copy.deepcopy(model)
    outputs = copied(**inputs)
    assert torch.equal(outputs["loss"], F.cross_entropy(outputs["logits"], inputs["labels"]))
    assert model(**inputs)["loss"] > outputs["loss"]


def test_attached_under_torch_compile() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    reg = SelfRegularizer(compiled, every=1, weight=1.0)
    reg.attach(compiled)
    reg.step()
    with torch.no_grad():
        model.classifier.weight.mul_(3)
    inputs = batches(1)[0]
    torch.manual_seed(0)
    loss = compiled(**inputs)["loss"]
    torch.manual_seed(0)
    assert torch.equal(loss, model(**inputs)["loss"])
    assert reg.stats()["divergence"] > 0


class Scaled(Net):
    """Computes some other loss than the plain mean."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(x)["logits"]
        return SimpleNamespace(logits=logits, loss=None if labels is None else self.loss(logits, labels))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.cross_entropy(x, y, weight=torch.tensor([1.0, 5.0, 1.0])),
        lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
        lambda x, y: F.cross_entropy(x, y) + 0.1,
    ],
)
@pytest.mark.parametrize("uniform", [False, True])
def test_attach_notices_another_loss(loss: Any, uniform: bool) -> None:
    model = Scaled(loss)
    if uniform:
        # All classes equally likely: smoothing and weights leave the value as it is, but not the gradient.
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
    SelfRegularizer(model, every=1).attach(model)
    with pytest.raises(ValueError, match="class weights, label smoothing or an auxiliary loss"):
        model(**batches(1)[0])


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(weight=torch.ones(3)), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_attach_refuses_loss_modules_with_weights_or_smoothing(loss: nn.Module) -> None:
    model = Scaled(loss)
    with pytest.raises(ValueError, match=r"loss \(CrossEntropyLoss\) has class weights or label smoothing"):
        SelfRegularizer(model, every=1).attach(model)


def test_attach_refuses_what_it_cannot_serve() -> None:
    model = Net()
    reg = SelfRegularizer(model, every=1)
    with pytest.raises(ValueError, match="another model"):
        reg.attach(Net())
    reg.attach(model)
    reg.attach(model)
    assert len(model._forward_hooks) == 1
    with pytest.raises(ValueError, match=r"no 'labels'.*label_smoothing_factor and compute_loss_func"):
        model(batches(1)[0]["x"])


class Bare(Net):
    """Returns logits alone: there is no loss to replace."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(x)["logits"]


def test_attach_refuses_outputs_without_room_for_a_loss() -> None:
    model = Bare()
    reg = SelfRegularizer(model, every=1)
    reg.attach(model)
    with pytest.raises(TypeError, match="a Tensor has no loss that could be replaced"):
        model(**batches(1)[0])


def test_a_copy_of_an_attached_one_says_that_it_is_not(recwarn: pytest.WarningsRecorder) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = SelfRegularizer(model, every=1, score_gradient="task")
    reg.attach(model, optimizer)
    other, copied = copy.deepcopy((model, reg))
    with torch.no_grad():
        other(**batches(1)[0])
    other.eval()(**batches(1)[0])
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match="copy of one that a SelfRegularizer is attached to.*its loss is the plain one"
    ):
        other.train()(**batches(1)[0])
    with pytest.raises(RuntimeError, match=r"the copy has none attached: attach\(model, optimizer\)"):
        copied.take_task_gradients()
    copied.attach(other)
    assert copied.take_task_gradients() is None
    assert reg.take_task_gradients() is None


def test_outputs_that_hold_no_other_loss_are_refused_in_words() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, **inputs: Tensor) -> Any:
            kind = dataclasses.make_dataclass("Answer", ["loss", "logits"], frozen=True)
            return kind(**self.net(**inputs))

    model = Frozen()
    reg = SelfRegularizer(model, every=1, head="classification")
    reg.attach(model)
    with pytest.raises(
        TypeError, match=r"the loss of a Answer can't be replaced: call reg\(outputs, inputs\) yourself"
    ):
        model(**batches(1)[0])
