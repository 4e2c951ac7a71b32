"""Self-regularization: what the teacher is at each step, attachment, resuming, and what is refused."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pins_ext.teacher import SelfRegularizer


class Net(nn.Module):
    """A classifier with dropout, tied weights, a batch norm's buffers; it returns a dict and computes its own loss."""

    def __init__(self, classes: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6, dtype=dtype)
        self.again = nn.Linear(6, 6, bias=False, dtype=dtype)
        self.again.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6, dtype=dtype)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.dropout = nn.Dropout(0.3)
        self.classifier = nn.Linear(6, classes, dtype=dtype)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(self.dropout(torch.tanh(self.norm(self.again(torch.tanh(self.first(x)))))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def batches(steps: int, start: int = 0) -> list[dict[str, Tensor]]:
    result = []
    for i in range(start, start + steps):
        generator = torch.Generator().manual_seed(i)
        x, labels = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        result.append({"x": x, "labels": labels})
    return result


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(
    model: nn.Module, reg: SelfRegularizer | None, steps: int, start: int = 0, optimizer: Any = None
) -> list[Any]:
    """Train with an explicit regularizer; the model's weights after each step."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.05)
    history = []
    for inputs in batches(steps, start):
        outputs = model(**inputs)
        loss = outputs["loss"] if reg is None else reg(outputs, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if reg is not None:
            reg.step()
        history.append(weights(model))
    return history


# ---- when the teacher changes ---------------------------------------------------------------------------------------


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


# ---- what the teacher is --------------------------------------------------------------------------------------------


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


# ---- attachment -----------------------------------------------------------------------------------------------------


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


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["latest", "best", "ema"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 5])
def test_resuming_is_bitwise(policy: str, dtype: torch.dtype, at: int, tmp_path: Path) -> None:
    def run(model: nn.Module, reg: SelfRegularizer, optimizer: Any, first: int, last: int) -> None:
        for i in range(first, last):
            torch.manual_seed(i)
            inputs = batches(1, i)[0]
            inputs["x"] = inputs["x"].to(dtype)
            optimizer.zero_grad()
            reg(model(**inputs), inputs).backward()
            optimizer.step()
            reg.step()
            reg.evaluated((0.5, 0.2, 0.7, 0.6, 0.8, 0.1)[i % 6])

    def fresh() -> tuple[nn.Module, SelfRegularizer, Any]:
        model = Net(dtype=dtype)
        return model, SelfRegularizer(model, policy, every=2), torch.optim.AdamW(model.parameters(), lr=0.02)

    unbroken, reg, optimizer = fresh()
    run(unbroken, reg, optimizer, 0, at)
    reg.save(tmp_path / "teacher.safetensors")
    kept = weights(unbroken), copy.deepcopy(optimizer.state_dict())
    run(unbroken, reg, optimizer, at, 9)

    resumed, again, second = fresh()
    resumed.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    again.load(tmp_path / "teacher.safetensors")
    run(resumed, again, second, at, 9)
    assert same(weights(resumed), weights(unbroken))
    assert same(again.state_dict()["tensors"], reg.state_dict()["tensors"])
    assert again.state_dict()["meta"] == reg.state_dict()["meta"]


def test_state_has_tied_tensors_once_and_no_passing_buffers() -> None:
    model = Net()
    reg = SelfRegularizer(model, every=1)
    assert reg.state_dict()["tensors"] == {}
    reg.step()
    names = reg.state_dict()["tensors"].keys()
    assert "first.weight" in names
    assert "norm.running_mean" in names
    assert "again.weight" not in names
    assert "scratch" not in names


def test_foreign_state_is_refused() -> None:
    reg = SelfRegularizer(Net(), every=1)
    reg.step()
    state = reg.state_dict()
    with pytest.raises(ValueError, match=r"teacher='latest' \(now 'best'\), temperature=2.0 \(now 3.0\)"):
        SelfRegularizer(Net(), "best", temperature=3.0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"2 of another shape, classifier\.weight first"):
        SelfRegularizer(Net(classes=4), every=1).load_state_dict(state)
    del state["tensors"]["first.bias"]
    with pytest.raises(ValueError, match=r"1 tensors missing, 0 foreign, 0 of another shape, first\.bias first"):
        SelfRegularizer(Net(), every=1).load_state_dict(state)


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    reg = SelfRegularizer(Net(), every=1)
    reg.step()
    path = tmp_path / "teacher.safetensors"
    reg.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match="is damaged"):
        reg.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        reg.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        reg.load(tmp_path / "nothing")
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"is no pins_ext\.teacher file"):
        reg.load(path)


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


# ---- refusals -------------------------------------------------------------------------------------------------------


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


def test_a_replaced_forward_is_not_shared_by_a_copy() -> None:
    model = Net()
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)  # type: ignore[method-assign]
    reg = SelfRegularizer(model, every=1)
    with pytest.raises(RuntimeError, match=r"Net.forward was replaced by a function"):
        reg.step()
