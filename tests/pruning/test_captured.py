"""Steps that are captured and replayed: equal to eager ones to the last bit, refused by name where the host decides."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drawn_training import separately
from recorded import STEPS, CapturedTraining, compare, compare_without_a_pruner, differences, recording
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from watch import Watch, like_a_gpu

from pins_ext import PruneConfig, Pruner, StepGraphs, ops
from pins_ext.optim import PinsAdamW, PinsSGD
from pins_ext.optim.bias_corrections import bias_corrections
from pins_ext.pruning.captured import hosted

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


def test_bias_corrections_are_those_of_the_host() -> None:
    """To the last bit, and to the end, where they are 1."""
    betas = [0.9, 0.999, 0.0, 0.95, 0.999, 0.9]
    for t in (1, 2, 3, 99, 350, 354, 355, 356, 357, 37_000, 37_400, 1 << 24):
        steps = torch.full((len(betas),), t, dtype=torch.float64)
        found = bias_corrections(betas, steps, ops.Uploads(), "test").tolist()
        assert found == [1 - beta ** float(t) for beta in betas]
    with pytest.raises(ValueError, match=r"betas up to 0\.99999"):
        bias_corrections([1 - 1e-9], torch.ones(1), ops.Uploads(), "test")


# ---- what a graph can't hold ----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scope": ({"scope": "layer"}, "a scope, densities or a pattern"),
    "densities": ({"min_density": 0.1}, "a scope, densities or a pattern"),
    "pattern": ({"pattern": "4x1"}, "a scope, densities or a pattern"),
    "criterion": ({"criterion": lambda p, g, lr: p.abs()}, "a function as criterion"),
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
        kind, pruner = captured.graphs.kind, captured.pruner
        if option == "criterion" or hosted(kind, t, pruner.schedule, pruner.masks):
            tried(captured, match)
            refusals += 1
        captured.optimizer.step()
        assert differences(plain.state(), captured.state()) == [], t
    assert refusals


def test_hooks_of_the_pruner_are_refused() -> None:
    captured = CapturedTraining("cpu", True)
    captured.step(0)
    captured.give_gradients(1)
    for name in ("score_gradients", "before_mask"):
        setattr(captured.pruner, name, dict)
        tried(captured, name)
        setattr(captured.pruner, name, None)


def test_released_gradients_are_refused() -> None:
    captured = CapturedTraining("cpu", True)
    captured.optimizer.release_gradients()
    tried(captured, r"keep_gradients\(\)")


def test_several_optimizers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    rate = torch.tensor(0.1)
    optimizers = [PinsAdamW(layer.parameters(), lr=rate, capturable=True) for layer in model]
    Pruner(model, optimizers, PruneConfig(include=("*.weight",)), 10)
    model(torch.ones(1, 8)).sum().backward()
    with recording(), pytest.raises(RuntimeError, match="several optimizers"):
        optimizers[0].step()


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
