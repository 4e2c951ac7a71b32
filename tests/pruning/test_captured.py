"""Steps that are captured and replayed: equal to eager ones to the last bit, refused by name where the host decides."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from drawn_training import separately
from recorded import (
    STEPS,
    CapturedTraining,
    Recording,
    compare,
    compare_without_a_pruner,
    differences,
    record,
    recording,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from watch import Watch, like_a_gpu

from pins_ext import PruneConfig, Pruner, StepGraphs, ops
from pins_ext.optim import PinsAdamW, PinsSGD
from pins_ext.pruning import graphs
from pins_ext.pruning.captured import CapturedSteps, hosted
from pins_ext.pruning.importance import Importance

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


class _Nothing(TorchDispatchMode):
    """Operators that write to something don't: as in a capture, nothing has run when it fails."""

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f._schema.is_mutable:
            return args[0] if args and len(f._schema.returns) else None
        return f(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def branches() -> Iterator[None]:
    """Those of a GPU's host; eager steps by the separate passes that captured ones are made of.

    One pass has the window that ends folded a step before, to the same weights and masks (test_one_pass.py).
    """
    with like_a_gpu(), separately():
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
        for stream in range(3):
            assert ops.rounding_keys(seed, torch.tensor(step), stream).tolist() == [
                *ops.rounding_key(seed, step, stream)
            ]


# ---- what a graph can't hold ----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scope": ({"scope": "layer"}, "a scope, densities or a pattern"),
    "densities": ({"min_density": 0.1}, "a scope, densities or a pattern"),
    "pattern": ({"pattern": "4x1"}, "a scope, densities or a pattern"),
    "schedule": ({"schedule": lambda t: 1 - t / 40}, "a function as schedule"),
    "one-shot": ({"schedule": "one-shot"}, "one-shot schedule"),
}


def tried(training: CapturedTraining, match: str) -> None:
    """A capture is refused."""
    with recording(), pytest.raises(RuntimeError, match=match):
        training.optimizer.step()


@pytest.mark.parametrize("option", REFUSED)
def test_what_the_host_decides_is_refused(option: str) -> None:
    """And the step is then taken as if that had not been tried."""
    options, match = REFUSED[option]
    plain, captured = CapturedTraining("cpu", False, **options), CapturedTraining("cpu", True, **options)
    refusals = 0
    for t in range(STEPS):
        plain.step(t)
        captured.give_gradients(t)
        assert captured.graphs is not None
        if hosted(captured.graphs.kind, captured.pruner):
            tried(captured, match)
            refusals += 1
        captured.optimizer.step()
        assert differences(plain.state(), captured.state()) == [], t
    assert refusals


def replaying(**options: Any) -> CapturedTraining:
    """A training whose next step is a replay."""
    captured = CapturedTraining("cpu", True, **options)
    for t in range(STEPS // 2):
        captured.step(t)
    assert captured.graphs is not None
    assert captured.graphs.kind in captured.graphs.graphs
    captured.give_gradients(STEPS // 2)
    return captured


def refused(captured: CapturedTraining, match: str) -> None:
    """A replay is refused, and no step lost."""
    before = captured.state()
    assert captured.graphs is not None
    with pytest.raises(RuntimeError, match=match):
        captured.graphs()
    assert differences(before, captured.state()) == []


@pytest.mark.parametrize("name", ["score_gradients", "before_mask"])
def test_hooks_of_the_pruner_are_refused(name: str) -> None:
    captured = replaying()
    setattr(captured.pruner, name, dict)
    tried(captured, name)
    refused(captured, name)


def test_step_hooks_are_refused() -> None:
    captured, called = replaying(), []
    for register in (captured.optimizer.register_step_pre_hook, captured.optimizer.register_step_post_hook):
        handle = register(lambda *_: called.append(1))
        refused(captured, r"SelfRegularizer\.attach\(model, optimizer\)")
        tried(captured, "step hooks")
        handle.remove()
    assert captured.graphs is not None
    captured.graphs()


def test_gradients_that_were_clipped_before_are_refused() -> None:
    captured = replaying()
    captured.optimizer.clip_grad_norm_(1.0)
    refused(captured, "clip inside the step")


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_other_scaling_than_the_captured_one_is_refused(name: str) -> None:
    captured = replaying(scaled=True)
    setattr(captured.optimizer, name, torch.ones(1))
    refused(captured, f"{name} is another one now.*GradScaler")


def test_another_rate_than_the_captured_one_is_refused() -> None:
    captured = replaying()
    captured.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    refused(captured, "lr of group 0")


def test_scaling_that_is_set_within_the_step_is_refused() -> None:
    """As a GradScaler sets it, and takes it away again."""
    captured = CapturedTraining("cpu", True, warmup=9)

    def step() -> None:
        captured.optimizer.found_inf = torch.zeros(1)  # type: ignore[attr-defined]
        captured.optimizer.step()
        del captured.optimizer.found_inf  # type: ignore[attr-defined]

    captured.graphs = StepGraphs(captured.pruner, step, record)
    for t in range(2):
        captured.step(t)
    with pytest.raises(RuntimeError, match="found_inf is another one now"):
        captured.step(2)


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
            replays, old = captured.replays.total(), set(map(id, captured.graphs.graphs.values()))
        plain.step(t)
        captured.step(t)
        assert differences(plain.state(), captured.state()) == [], t
    assert captured.replays.total() > replays
    assert old.isdisjoint(map(id, captured.graphs.graphs.values()))


def test_graphs_of_other_states_are_let_go() -> None:
    captured = replaying()
    captured.pruner.load_state_dict(captured.pruner.state_dict())
    captured.step(STEPS // 2)
    assert captured.graphs is not None
    assert not captured.graphs.graphs


def test_a_replay_inside_a_view_is_refused() -> None:
    captured = replaying()
    captured.pruner.masks.applied = False
    with captured.pruner.masked_view():
        refused(captured, "inside masked_view")


def test_a_detached_pruner_is_refused() -> None:
    captured = replaying()
    captured.pruner.detach()
    refused(captured, "detached")
    Pruner(captured.model, captured.optimizer, PruneConfig(include=("*.weight",)), 100)
    refused(captured, "detached")


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

    def noted(parameters: list[torch.Tensor]) -> Any:
        arguments = without_pruning(parameters)
        made.append(weakref.ref(arguments.layout))
        return arguments

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


def test_released_gradients_are_refused() -> None:
    captured = CapturedTraining("cpu", True)
    captured.optimizer.release_gradients()
    tried(captured, r"keep_gradients\(\)")
    with pytest.raises(RuntimeError, match=r"keep_gradients\(\)"):
        StepGraphs(captured.pruner, capture=record)


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)])
def test_several_optimizers_are_refused(which: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    rate = torch.tensor(0.1)
    optimizers = [PinsAdamW(layer.parameters(), lr=rate, capturable=i in which) for i, layer in enumerate(model)]
    pruner = Pruner(model, optimizers, PruneConfig(include=("*.weight",)), 10)
    with pytest.raises(RuntimeError, match="several optimizers"):
        StepGraphs(pruner, capture=record)
    model(torch.ones(1, 8)).sum().backward()
    with recording(), pytest.raises(RuntimeError, match="several optimizers"):
        optimizers[which[0]].step()


def test_what_no_step_is_without_is_refused_at_once() -> None:
    model = nn.Linear(8, 8)
    optimizer = PinsAdamW(model.parameters(), lr=torch.tensor(0.1), capturable=True)
    config = PruneConfig(include=("*",), criterion=lambda p, g, lr: p.abs())
    pruner = Pruner(model, optimizer, config, 10)
    with pytest.raises(RuntimeError, match="a function as criterion"):
        StepGraphs(pruner, capture=record)
    model(torch.ones(1, 8)).sum().backward()
    with recording(), pytest.raises(RuntimeError, match="a function as criterion"):
        optimizer.step()
    pruner.detach()
    with patch.object(Importance, "on_host", True), pytest.raises(RuntimeError, match="state_device='cpu'"):
        StepGraphs(Pruner(model, optimizer, PruneConfig(include=("*",)), 10), capture=record)
    optimizer.listener = None
    pruner = Pruner(model, optimizer, PruneConfig(include=("*",)), 10)
    pruner.importance.ranks.alone = False
    with pytest.raises(RuntimeError, match="several ranks"):
        StepGraphs(pruner, capture=record)


def test_a_frozen_base_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    optimizer = PinsAdamW(model[1].parameters(), lr=torch.tensor(0.1), capturable=True)
    pruner = Pruner(model, optimizer, PruneConfig(include=("0.weight",)), 100, frozen_base=True)
    model(torch.ones(1, 8)).sum().backward()
    with recording(), pytest.raises(RuntimeError, match="a frozen base"):
        optimizer.step()
    assert pruner.step == 0


@pytest.mark.parametrize("make", [PinsAdamW, PinsSGD])
def test_a_rate_of_the_hosts_is_refused(make: Any) -> None:
    p = nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    optimizer = make([p], lr=0.1, capturable=True)
    optimizer.step()
    with recording(), pytest.raises(RuntimeError, match=r"learning rate 0\.1: make lr a tensor"):
        optimizer.step()


@pytest.mark.parametrize("make", [PinsAdamW, PinsSGD])
def test_without_the_option_a_capture_is_refused(make: Any) -> None:
    p = nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    with recording(), pytest.raises(RuntimeError, match="with capturable=True"):
        make([p], lr=torch.tensor(0.1)).step()


def test_an_optimizer_without_its_state_is_refused() -> None:
    p = nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    optimizer = PinsAdamW([p], lr=torch.tensor(0.1), capturable=True)
    with recording(), pytest.raises(RuntimeError, match="take a step"):
        optimizer.step()
    assert not optimizer.state[p]
    optimizer.step()


def test_a_kind_of_step_that_was_not_taken_is_refused() -> None:
    captured = CapturedTraining("cpu", True)
    tried(captured, "none was of StepKind")
    for t in range(2):
        captured.step(t)
    captured.pruner.load_state_dict(captured.pruner.state_dict())
    tried(captured, "none was of StepKind")


def test_graphs_need_a_capturable_optimizer() -> None:
    with pytest.raises(ValueError, match="capturable=True"):
        StepGraphs(CapturedTraining("cpu", False).pruner)


def test_graphs_need_weights_on_a_gpu() -> None:
    model = nn.Linear(8, 8)
    optimizer = PinsAdamW(model.parameters(), capturable=True)
    pruner = Pruner(model, optimizer, PruneConfig(include=("*",)), 10)
    with pytest.raises(ValueError, match=r"CUDA graphs, and the weights are on cpu: call optimizer\.step\(\)"):
        StepGraphs(pruner)


def test_a_gradient_that_moved_is_refused_and_no_step_is_lost() -> None:
    """The capture fails after its window has ended on the host: the eager step ends it on the device."""
    plain, captured = CapturedTraining("cpu", False), CapturedTraining("cpu", True)
    refusals = 0
    for t in range(STEPS):
        plain.step(t)
        captured.give_gradients(t)
        assert captured.graphs is not None
        assert captured.pruner.slots.captured is not None
        if captured.graphs.kind in captured.pruner.slots.captured.taken:
            for p in captured.model.parameters():
                p.grad = p.grad.clone()  # type: ignore[union-attr]
            # Nothing runs in a capture; here what is launched before the upload does.
            with recording(), pytest.raises(RuntimeError, match="leave gradients where they are"), _Nothing():
                captured.optimizer.step()
            refusals += 1
        captured.optimizer.step()
        assert differences(plain.state(), captured.state()) == [], t
    assert refusals


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
