"""Steps whose lists of tensors are kept from step to step: to the bit what steps do whose lists cross anew."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from drawn_training import STEPS, Training, same, train
from torch.utils._python_dispatch import TorchDispatchMode

from pins_ext.optim import PinsAdamW

pytestmark = pytest.mark.filterwarnings("ignore::pins_ext.pruning.plan.ConflictWarning")


@pytest.fixture
def all_kept(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lists of one tensor are worth keeping; undone, none of such a model is."""
    monkeypatch.setattr("pins_ext.ops.transfer.MANY", 1)
    return monkeypatch


class Crossings(TorchDispatchMode):
    """Operators that got a list, and whether one tensor stood for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, bool]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("pins_ext::") and not name.endswith("_list"):
            for arg in (x for x in args if isinstance(x, list) and x):
                self.seen[name.removeprefix("pins_ext::"), arg[0].dtype == torch.int64] += 1
        return func(*args, **(kwargs or {}))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"delta_t": 4},
    {"delta_t": 3, "criterion": "moments"},
    {"delta_t": 4, "criterion": "fisher", "mask_optimizer_state": True},
    {"mask_policy": "strict", "criterion": "platon", "optimizer": "momentum"},
    {"delta_t": 2, "state_dtype": "8bit", "moment_dtype": "8bit"},
    {"delta_t": 3, "dtype": torch.bfloat16, "state_dtype": "bfloat16", "ugly": True},
    {"delta_t": 3, "beta2": 0.0, "optimizer": "sgd"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_bits_are_those_of_lists_that_cross_anew(settings: dict[str, Any], all_kept: pytest.MonkeyPatch) -> None:
    with Crossings() as crossings:
        one = train(Training(**settings))
    passes = sum(n for (name, kept), n in crossings.seen.items() if kept and name.startswith(("masked_", "boundary_")))
    assert passes > 2 * STEPS
    all_kept.undo()
    with Crossings() as crossings:
        other = train(Training(**settings))
    assert not any(kept for _, kept in crossings.seen)
    same(one, other)


def test_gradients_are_not_kept(all_kept: pytest.MonkeyPatch) -> None:
    """They are other tensors in every step: keeping them would cost, not save."""
    kept = torch.ops.pins_ext.keep_list
    lists: list[list[torch.Tensor]] = []
    all_kept.setattr(torch.ops.pins_ext, "keep_list", lambda tensors: lists.append(tensors) or kept(tensors))
    run = train(Training(delta_t=4))
    first_steps = len(lists)
    train(run, range(STEPS, STEPS + 8))
    assert 0 < first_steps == len(lists)


def test_what_changes_between_steps_is_seen(all_kept: pytest.MonkeyPatch) -> None:
    def changed() -> Training:
        run = train(Training(delta_t=2), range(6))
        saved = copy.deepcopy(run.optimizer.state_dict())
        train(run, range(6, 9))
        run.optimizer.load_state_dict(saved)  # other moments
        train(run, range(9, 12))
        for p in run.model.parameters():  # other memory
            p.data = p.data.clone()
        run.gradients(12)
        run.model[1].weight.grad = None  # fewer tensors
        run.optimizer.step()
        return train(run, range(13, 20))

    one = changed()
    all_kept.undo()
    same(one, changed())


def test_copies_keep_lists_of_their_own(all_kept: pytest.MonkeyPatch) -> None:
    one = train(Training(delta_t=2), range(8))
    other = copy.deepcopy(one)
    same(train(one, range(8, 14)), train(other, range(8, 14)))


def test_tensors_of_other_steps_are_given_up(all_kept: pytest.MonkeyPatch) -> None:
    """Also where a step begins with another parameter, as when a model is unfrozen layer by layer."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(6)]
    optimizer = PinsAdamW(weights)

    def steps() -> None:
        for _ in range(2):
            optimizer.step()

    for p in reversed(weights):
        p.grad = torch.ones(3)
        steps()
    first = weakref.ref(weights[0])
    optimizer.param_groups.clear()
    optimizer.state.clear()
    weights.clear()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    del p
    steps()
    gc.collect()
    assert first() is None


def test_nothing_is_kept_of_modules_that_swap_their_parameters(all_kept: pytest.MonkeyPatch) -> None:
    net = torch.nn.Linear(3, 3)
    optimizer = PinsAdamW(net.parameters())
    before = torch.__future__.get_swap_module_params_on_conversion()

    def steps() -> None:
        for _ in range(3):
            net(torch.ones(3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    steps()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        steps()
        saved = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        net.load_state_dict(saved)  # refused where anything else holds a parameter
        steps()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert all(p.any() for p in net.parameters())
