"""Steps that are captured and replayed: equal to eager ones to the last bit."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from recorded import (
    STEPS,
    CapturedTraining,
    Recording,
    compare,
    compare_without_a_pruner,
    differences,
    eager_as_captured,
    record,
    replaying,
)
from torch import nn
from watch import Watch

from pins_ext import StepGraphs, ops
from pins_ext.optim import PinsAdamW
from pins_ext.optim.listener import Batch
from pins_ext.pruning import graphs
from pins_ext.pruning.captured import CapturedSteps

BF16 = {"dtype": torch.bfloat16, "state_dtype": "bfloat16", "moment_dtype": "bfloat16"}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"criterion": name} for name in ("pins", "fisher", "moments", "magnitude", "movement", "pins-update")},
    **{f"{name} in bfloat16": {"criterion": name, **BF16} for name in ("pins", "fisher", "moments", "magnitude")},
    "strict": {"mask_policy": "strict"},
    "strict platon": {"mask_policy": "strict", "criterion": "platon"},
    "windows of one step": {"delta_t": 1},
    "importance every third step": {"importance_every": 3},
    "last deviation": {"beta2": 0.0},
    "no uncertainty": {"beta2": 1.0},
    "two dtypes": {"mixed": True},
    "cleared moments": {"mask_optimizer_state": True},
    "ties of the released code": {"ties": "reference"},
    "8 bits": {"state_dtype": "8bit", "moment_dtype": "8bit"},
    "clipped": {"max_norm": 0.5},
    "scaled": {"scaled": True},
    "scaled in bfloat16": {"scaled": True, **BF16},
    "SGD": {"optimizer": "sgd"},
    "SGD in bfloat16": {"optimizer": "sgd", "dtype": torch.bfloat16, "state_dtype": "bfloat16"},
}


@pytest.fixture(autouse=True)
def branches() -> Iterator[None]:
    """See `eager_as_captured`."""
    with eager_as_captured():
        yield


@pytest.mark.parametrize("case", CASES)
def test_replays_are_eager_steps(case: str) -> None:
    replays = compare("cpu", **CASES[case]).replays
    assert any(kind.chooses for kind in replays)
    assert any(kind.zeroes for kind in replays)


@pytest.mark.parametrize("options", [{"scope": "layer"}, {"pattern": "4x1"}, {"schedule": "one-shot"}], ids=str)
def test_masks_that_the_host_chooses_are_eager(options: dict[str, Any]) -> None:
    """And the steps between them replayed."""
    replays = compare("cpu", **options).replays
    assert replays
    assert options == {"schedule": "one-shot"} or not any(kind.chooses for kind in replays)


@pytest.mark.parametrize("case", ["pins", "moments in bfloat16", "scaled in bfloat16", "SGD"])
def test_eager_steps_are_the_same_with_capturable(case: str) -> None:
    plain, capturable = (CapturedTraining("cpu", on, **CASES[case]) for on in (False, True))
    for t in range(STEPS):
        plain.step(t)
        capturable.give_gradients(t)
        capturable.optimizer.step()
        assert differences(plain.state(), capturable.state()) == [], t


def test_a_run_goes_on_from_a_checkpoint() -> None:
    whole, second = (CapturedTraining("cpu", True, **CASES["moments in bfloat16"]) for _ in range(2))
    for t in range(STEPS):
        if t == STEPS // 2:
            second.model.load_state_dict(whole.model.state_dict())
            second.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
            second.pruner.load_state_dict(whole.pruner.state_dict())
        noise = whole.noise.get_state()
        whole.step(t)
        if t >= STEPS // 2:
            second.noise.set_state(noise)
            second.step(t)
            # A checkpoint leaves out the counts of the last selection.
            assert differences(whole.state(), second.state()) in ([], ["stats"]), t
    assert second.replays


def test_an_optimizer_without_a_pruner() -> None:
    captured = compare_without_a_pruner("cpu")
    copied = copy.deepcopy(captured)
    assert copied.capturable
    assert copied.state_dict()["state"][0]["step"] == 6


@pytest.mark.parametrize("seed", [0, 7, 1 << 63, 123_456_789_012_345])
def test_keys_from_a_count_on_the_device(seed: int) -> None:
    for step in (0, 1, 999, 1 << 40):
        assert ops.fold_keys(torch.tensor(step)).tolist() == [*ops.fold_key(step)]
        for stream in range(3):
            assert ops.rounding_keys(seed, torch.tensor(step), stream).tolist() == [
                *ops.rounding_key(seed, step, stream)
            ]


def test_loaded_optimizer_states_are_captured_anew() -> None:
    """The old ones are replaced without the pruner's doing."""
    plain, captured = CapturedTraining("cpu", False), CapturedTraining("cpu", True)
    for t in range(STEPS):
        if t == STEPS // 2:
            for training in (plain, captured):
                state = copy.deepcopy(training.optimizer.state_dict())
                for moments in state["state"].values():
                    moments["exp_avg"] *= -2
                training.optimizer.load_state_dict(state)
            assert captured.graphs is not None
            replays, old = captured.replays.total(), [*captured.graphs.graphs.values()]
        plain.step(t)
        captured.step(t)
        assert differences(plain.state(), captured.state()) == [], t
    assert captured.replays.total() > replays
    assert not any(graph is replaced for graph in captured.graphs.graphs.values() for replaced in old)


def test_graphs_of_other_states_are_let_go() -> None:
    captured = replaying()
    captured.pruner.load_state_dict(captured.pruner.state_dict())
    captured.step(STEPS // 2)
    assert captured.graphs is not None
    assert not captured.graphs.graphs


def test_a_replay_changes_the_versions_of_the_weights() -> None:
    """A backward through weights saved before it must fail."""
    captured = replaying()
    versions = [p._version for p in captured.model.parameters()]
    with patch.object(Recording, "replay"):
        captured.graphs()  # type: ignore[misc]
    assert all(p._version > v for p, v in zip(captured.model.parameters(), versions, strict=True))


def test_a_step_that_is_wrapped_later_is_called() -> None:
    """As a scheduler wraps it, to warn of steps in the wrong order."""
    captured, called = CapturedTraining("cpu", True), []
    captured.graphs = StepGraphs(captured.pruner, capture=record)
    step = captured.optimizer.step
    captured.optimizer.step = lambda: (called.append(1), step())  # type: ignore[assignment, method-assign]
    captured.step(0)
    assert called


def test_steps_without_a_choice_ask_for_no_target() -> None:
    captured = CapturedTraining("cpu", True)
    asked = []
    with patch.object(CapturedSteps, "target", lambda *_: asked.append(1)):
        captured.step(0)
        captured.step(1)
    assert not asked


def test_layouts_that_a_graph_reads_are_kept() -> None:
    """Of tensors without a gradient, which not every step asks for."""
    captured, asked = CapturedTraining("cpu", True, criterion="magnitude"), []
    of = ops.Subsets.of

    def noted(subsets: ops.Subsets, indices: Any) -> ops.Layout:
        layout = of(subsets, indices)
        if ops.capturing(layout.places.device):
            asked.append(weakref.ref(layout))
        return layout

    weight = captured.model[1].weight
    with patch.object(ops.Subsets, "of", noted):
        for t in range(STEPS):
            captured.give_gradients(t)
            grad, weight.grad = weight.grad, None
            assert captured.graphs is not None
            (captured.graphs if captured.graphs.kind.zeroes else captured.optimizer.step)()
            weight.grad = grad
    assert asked
    assert all(layout() is not None for layout in asked)


def test_what_a_graph_reads_of_tensors_that_are_not_pruned_is_kept() -> None:
    """Whatever has no gradient in later, eager steps."""
    weights = [nn.Parameter(torch.ones(8)) for _ in range(3)]
    optimizer = PinsAdamW(weights, lr=torch.tensor(0.1), capturable=True)
    made: list[weakref.ref[Any]] = []
    without_pruning = optimizer._without_pruning

    def noted(batch: Batch) -> Any:
        arguments, alike = without_pruning(batch)
        made.append(weakref.ref(arguments.layout))
        return arguments, alike

    grads = [torch.ones(8) for _ in weights]
    with patch.object(optimizer, "_without_pruning", noted):
        for t, gone in enumerate((None, None, 0, 1, 2, None)):
            for i, p in enumerate(weights):
                p.grad = None if i == gone else grads[i]
            (record(optimizer.step).replay if t == 1 else optimizer.step)()
    assert len(made) == 4
    assert made[0]() is not None


def test_a_graph_is_captured_on_the_device_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the current one."""
    now, second = [0], torch.device("cuda", 1)

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, now[0] = now[0], device.index
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[0] == 1)
    assert ops.capturing(second)
    assert not ops.capturing(torch.device("cuda", 0))

    streams: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: f"a stream on {now[0]}")
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream=None: nullcontext(streams.append(stream)))
    with ops.on_device(second):
        graphs.cuda_graph(lambda: None)
    assert streams == ["a stream on 1"]


@pytest.mark.parametrize("case", ["pins", "moments in bfloat16", "scaled in bfloat16", "SGD"])
def test_eager_steps_with_capturable_read_nothing(case: str) -> None:
    training, watch = CapturedTraining("cpu", True, **CASES[case]), Watch()
    for t in range(STEPS):
        training.give_gradients(t)
        with watch.on():
            training.optimizer.step()
    assert not watch.reads


def test_a_checkpoint_of_either_serves_the_other() -> None:
    plain, capturable = (CapturedTraining("cpu", on, **BF16) for on in (False, True))
    for t in range(STEPS):
        if t == STEPS // 3 or t == STEPS // 2:
            first, second = (plain, capturable) if t == STEPS // 2 else (capturable, plain)
            second.model.load_state_dict(first.model.state_dict())
            second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
            second.pruner.load_state_dict(first.pruner.state_dict())
            rate = torch.tensor(0.0, dtype=torch.float64)
            for group in second.optimizer.param_groups:
                group["lr"] = rate if second is capturable else 0.0
        plain.step(t)
        capturable.step(t)
        # A checkpoint leaves out the counts of the last selection.
        assert differences(plain.state(), capturable.state()) in ([], ["stats"]), t
    assert capturable.replays
