"""What a graph can't hold, and what it would not see: refused by name, and no step is lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from recorded import (
    STEPS,
    CapturedTraining,
    differences,
    eager_as_captured,
    record,
    recording,
    replaying,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pins_ext import PruneConfig, Pruner, StepGraphs
from pins_ext.optim import PinsAdamW, PinsSGD
from pins_ext.pruning.captured import hosted
from pins_ext.pruning.importance import Importance

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scope": ({"scope": "layer"}, "a scope, densities or a pattern"),
    "densities": ({"min_density": 0.1}, "a scope, densities or a pattern"),
    "pattern": ({"pattern": "4x1"}, "a scope, densities or a pattern"),
    "schedule": ({"schedule": lambda t: 1 - t / 40}, "a function as schedule"),
    "one-shot": ({"schedule": "one-shot"}, "one-shot schedule"),
}


class _Nothing(TorchDispatchMode):
    """Operators that write to something don't: as in a capture, nothing has run when it fails."""

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f._schema.is_mutable:
            return args[0] if args and len(f._schema.returns) else None
        return f(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def branches() -> Iterator[None]:
    """See `eager_as_captured`."""
    with eager_as_captured():
        yield


def tried(training: CapturedTraining, match: str) -> None:
    """A capture is refused."""
    with recording(), pytest.raises(RuntimeError, match=match):
        training.optimizer.step()


def refused(captured: CapturedTraining, match: str) -> None:
    """A replay is refused, and no step lost."""
    before = captured.state()
    assert captured.graphs is not None
    with pytest.raises(RuntimeError, match=match):
        captured.graphs()
    assert differences(before, captured.state()) == []


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
