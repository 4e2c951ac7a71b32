"""The task loss and the distance from a teacher of every head, against formulas written out row by row in doubles."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pins_ext.regularization import heads
from pins_ext.regularization.self_regularizer import SelfRegularizer

T = 2.0


class Fixed(nn.Module):
    """Answers every input with the same outputs."""

    def __init__(self, **outputs: Tensor) -> None:
        super().__init__()
        self.names = list(outputs)
        for name, value in outputs.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(**{name: getattr(self, name) for name in self.names})


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in logits]
    return [power / sum(powers) for power in powers]


def row_loss(student: list[float], teacher: list[float], label: int, weight: str | float) -> float:
    """One row's joint loss, literally."""
    cross_entropy = -math.log(softmax(student)[label])
    p, q = softmax(teacher, T), softmax(student, T)
    distance = T * T * sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    if weight == "adaptive":
        entropy = -sum(x * math.log(x) for x in softmax(student))
        a = 1 - entropy / math.log(len(student))
        return a * distance + (1 - a) * cross_entropy
    return cross_entropy + float(weight) * distance


def mean_loss(student: Tensor, teacher: Tensor, labels: list[int], weight: str | float, items: int | None) -> float:
    triples = zip(student.tolist(), teacher.tolist(), labels, strict=True)
    losses = [row_loss(s, t, label, weight) for s, t, label in triples if label != -100]
    return sum(losses) / (items or len(losses))


def case(head: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[Any]]:
    """Student and teacher outputs, inputs, and per list of rows (name, selection of rows, labels)."""
    torch.manual_seed(3)
    draw = lambda *shape: 2 * torch.randn(shape)  # noqa: E731
    if head == "classification":
        labels = torch.tensor([0, 2, 1, -100])
        return {"logits": draw(4, 3)}, {"logits": draw(4, 3)}, {"labels": labels}, [("logits", labels.tolist())]
    if head == "token":
        labels = torch.tensor([[0, -100, 4], [-100, 2, 1]])
        rows = labels.flatten().tolist()
        return {"logits": draw(2, 3, 5)}, {"logits": draw(2, 3, 5)}, {"labels": labels}, [("logits", rows)]
    if head == "lm":
        labels = torch.tensor([[5, 0, -100, 3], [1, 2, 4, -100]])
        shifted = [0, -100, 3, -100, 2, 4, -100, -100]
        return {"logits": draw(2, 4, 6)}, {"logits": draw(2, 4, 6)}, {"labels": labels}, [("logits", shifted)]
    names = ("start_logits", "end_logits")
    inputs = {"start_positions": torch.tensor([0, 3, -2]), "end_positions": torch.tensor([4, 6, 99])}
    # Below the first position counts as the first; past the last is ignored.
    rows = [("start_logits", [0, 3, 0]), ("end_logits", [4, -100, -100])]
    return {n: draw(3, 6) for n in names}, {n: draw(3, 6) for n in names}, inputs, rows


@pytest.mark.parametrize("head", ["classification", "token", "lm", "span"])
@pytest.mark.parametrize("weight", ["adaptive", 0.0, 0.7])
@pytest.mark.parametrize("items", [None, 11])
def test_loss_is_the_formula(head: str, weight: str | float, items: int | None) -> None:
    student, teacher, inputs, rows = case(head)
    model = Fixed(**student)
    reg = SelfRegularizer(model, Fixed(**teacher), weight, T, head=head)
    num_items = None if items is None else torch.tensor(items)
    loss = reg(model(), inputs, num_items_in_batch=num_items)
    parts = [
        mean_loss(student[n].flatten(0, -2), teacher[n].flatten(0, -2), labels, weight, items) for n, labels in rows
    ]
    assert loss.dtype == torch.float32
    # float32 against doubles
    assert loss.item() == pytest.approx(sum(parts) / len(parts), rel=2e-6)


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2)])
def test_regression_is_the_squared_error(weight: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    model = Fixed(logits=student)
    reg = SelfRegularizer(model, Fixed(logits=teacher), weight, T, head="regression")
    expected = ((student - labels) ** 2 + weight * (student - teacher) ** 2).double().mean()
    assert reg(model(), {"labels": labels}).item() == pytest.approx(expected.item(), rel=2e-6)
    assert reg(model(), {"labels": labels.double()}).dtype == torch.float32


def test_divergence_has_the_gradient_it_states() -> None:
    torch.manual_seed(1)
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: heads.divergence("token", s, teacher, 3.0), student)
    log_p, log_q = (torch.log_softmax(x / 3.0, -1) for x in (teacher, student))
    plain = 9 * (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(heads.divergence("token", student, teacher, 3.0), plain)


class LargestMade(TorchDispatchMode):
    """Watches how many numbers the largest new tensor has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.numbers = max(self.numbers, made.numel())
        return made


def test_a_few_rows_at_a_time_give_the_same_bits_and_nothing_as_large_as_the_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(4)
    student, teacher = torch.randn(37, 11, requires_grad=True), torch.randn(37, 11)
    results = []
    for at_once in (1 << 18, 25, 1):
        monkeypatch.setitem(heads._AT_ONCE, "cpu", at_once)
        with LargestMade() as made:
            parts = heads.divergence("lm", student, teacher, T), heads.confidence(student)
        (parts[0] * parts[1]).sum().backward()
        results.append((*parts, student.grad))
        student.grad = None
        assert made.numbers == (37 * 11 if at_once > 25 else 37)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_divergence_is_zero_for_equal_logits_and_counts_impossible_classes_as_nothing() -> None:
    logits = torch.tensor([[1.0, -math.inf, 2.0]], requires_grad=True)
    distance = heads.divergence("lm", logits, logits.detach(), T)
    distance.sum().backward()
    assert distance.tolist() == [0.0]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_confidence_at_its_ends() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [200.0, 0.0, 0.0], [5.0, -math.inf, -math.inf]])
    torch.testing.assert_close(heads.confidence(logits), torch.tensor([0.0, 1.0, 1.0]), atol=1e-6, rtol=0)


def test_sixteen_bit_logits_are_compared_in_float32() -> None:
    torch.manual_seed(2)
    student, teacher = torch.randn(6, 5).bfloat16(), torch.randn(6, 5).bfloat16()
    narrow = heads.divergence("classification", student, teacher, T)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, heads.divergence("classification", student.float(), teacher.float(), T))


def test_nothing_to_count_is_zero_and_not_nan() -> None:
    model = Fixed(logits=torch.randn(2, 3))
    reg = SelfRegularizer(model, Fixed(logits=torch.randn(2, 3)), head="classification")
    loss = reg(model(), {"labels": torch.tensor([-100, -100])})
    loss.backward()
    assert loss.item() == 0
    assert model.logits.grad is not None
    assert model.logits.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("outputs", "inputs", "head"),
    [
        ({"logits": torch.zeros(2, 3)}, {"labels": torch.zeros(2, dtype=torch.long)}, "classification"),
        ({"logits": torch.zeros(2, 1)}, {"labels": torch.zeros(2)}, "regression"),
        ({"logits": torch.zeros(2)}, {"labels": torch.zeros(2)}, "regression"),
        ({"start_logits": torch.zeros(2, 3), "end_logits": torch.zeros(2, 3)}, {}, "span"),
    ],
)
def test_head_of_a_plain_module(outputs: dict[str, Tensor], inputs: dict[str, Tensor], head: str) -> None:
    assert heads.head_of_outputs(outputs, inputs) == head
    assert heads.head_of_outputs(SimpleNamespace(**outputs), inputs) == head


@pytest.mark.parametrize(
    ("outputs", "inputs", "error", "words"),
    [
        ({"logits": torch.zeros(2, 4, 3)}, {"labels": torch.zeros(2, 4)}, ValueError, "head='token'.*head='lm'"),
        ({"logits": torch.zeros(2, 3)}, {"labels": torch.zeros(2, 3)}, ValueError, "multi-label"),
        ({"logits": torch.zeros(2, 3)}, {}, ValueError, "no 'labels'.*label_smoothing_factor"),
        ((torch.zeros(2, 3),), {"labels": torch.zeros(2)}, TypeError, "tuple have no .logits"),
    ],
)
def test_what_no_head_can_take(outputs: Any, inputs: dict[str, Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        heads.head_of_outputs(outputs, inputs)


def test_rows_refuse_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 labels for 2 rows"):
        heads.rows("classification", {"logits": torch.zeros(2, 3)}, {"labels": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(ValueError, match="multi-label"):
        heads.rows("classification", {"logits": torch.zeros(2, 3)}, {"labels": torch.zeros(2)})
    with pytest.raises(TypeError, match="start_logits and end_logits"):
        heads.rows("span", {"logits": torch.zeros(2, 3)}, {})


def test_shifted_labels_that_come_with_the_batch_are_used() -> None:
    logits = torch.randn(1, 4, 5)
    shifted = torch.tensor([[1, 2, 3, -100]])
    (own,) = heads.rows("lm", {"logits": logits}, {"labels": torch.tensor([[0, 1, 2, 3]])})
    (given,) = heads.rows("lm", {"logits": logits}, {"shift_labels": shifted})
    assert own.labels.tolist() == given.labels.tolist() == [1, 2, 3, -100]
