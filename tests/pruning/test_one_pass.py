"""Windows of one step: masks, step and fold in the optimizer's own pass, to the bit what separate passes do."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from drawn_training import STEPS, Training, same, separately, train
from watch import like_a_gpu

from pins_ext import Pruner, ops

pins = torch.ops.pins_ext

pytestmark = pytest.mark.filterwarnings("ignore::pins_ext.pruning.plan.ConflictWarning")


def counted(name: str) -> Any:
    """The operator, and how often it is called."""
    return patch.object(torch.ops.pins_ext, name, wraps=getattr(pins, name))


SETTINGS = [
    {},
    {"mask_policy": "strict"},
    {"mask_policy": "strict", "criterion": "platon"},
    {"mask_optimizer_state": True},
    {"mask_optimizer_state": True, "optimizer": "momentum"},
    {"moment_dtype": "8bit"},
    {"moment_dtype": "bfloat16", "dtype": torch.bfloat16, "mask_optimizer_state": True},
    {"optimizer": "sgd", "dtype": torch.float16},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "8bit"},
    {"state_dtype": "bfloat16", "dtype": torch.bfloat16, "ugly": True},
    {"criterion": "pins-signed"},
    {"criterion": "pins-update", "mask_policy": "strict"},
    {"criterion": "platon"},
    {"beta2": 1.0},
    {"beta1": 0.0},
    {"ugly": True},
    {"schedule": "one-shot"},
    {"schedule": "constant", "sparsity": 0.999},
]

LONGER = [
    {"delta_t": 4},
    {"delta_t": 3, "mask_policy": "strict", "mask_optimizer_state": True, "state_dtype": "bfloat16"},
    {"delta_t": 4, "importance_every": 2, "optimizer": "momentum"},
    {"delta_t": 2, "criterion": "platon", "mask_policy": "strict", "ugly": True},
]


@pytest.mark.parametrize("settings", SETTINGS + LONGER, ids=str)
def test_the_bits_are_those_of_separate_passes(settings: dict[str, Any]) -> None:
    name = "boundary_adamw_" if settings.get("optimizer", "adamw") == "adamw" else "boundary_sgd_"
    with counted(name) as passes:
        one = train(Training(**settings))
    coded = "8bit" in settings.values()
    assert passes.called != coded
    with separately(), counted(name) as passes:
        other = train(Training(**settings))
    assert not passes.called
    if not coded and STEPS % settings.get("delta_t", 1) == 0:
        # The averages are a window ahead.
        other.pruner.importance.fold(STEPS)
        assert not one.pruner.importance.accepted[0]
        other.pruner.importance.ipt[:] = one.pruner.importance.ipt
    same(one, other)


# The threshold leaves every bracket; a single mask has none to look around.
UNSERVED: list[dict[str, Any]] = [
    {"beta1": 0.0},
    {"delta_t": 4, "importance_every": 2, "optimizer": "momentum"},
    {"schedule": "one-shot"},
]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("settings", SETTINGS + LONGER, ids=str)
def test_where_the_host_looks_at_nothing_the_bits_are_the_same(
    settings: dict[str, Any], full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the pass is given a bracket, or the threshold itself where a bin is full or was left."""
    if full:
        monkeypatch.setitem(ops.bin_or_cutoff.__globals__, "CANDIDATES", 0)
    name = "boundary_adamw_" if settings.get("optimizer", "adamw") == "adamw" else "boundary_sgd_"
    with like_a_gpu(), counted(name) as passes:
        one = train(Training(**settings))
    given = [call.kwargs["around"] for call in passes.call_args_list if call.kwargs["around"] is not None]
    assert bool(given) != ("8bit" in settings.values())
    exact = [int(around[3]) < 0 for around in given]
    assert all(exact) == (full or not given or settings in UNSERVED)
    with separately():
        other = train(Training(**settings))
    assert one.told == other.told


def test_every_mask_step_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second mask on the counts are there already: nothing else reads the averages."""
    around = ops.bracket_around
    monkeypatch.setattr(ops, "bracket_around", lambda threshold: around(threshold, octaves=4))
    run = train(Training(schedule="constant"), range(16))
    names = ("fold_", "sample", "count_", "pack_", "pack_around_", "masked_adamw_", "boundary_adamw_")
    calls = {name: counted(name) for name in names}
    made = {name: patched.start() for name, patched in calls.items()}
    try:
        train(run, range(16, 24))
    finally:
        for patched in calls.values():
            patched.stop()
    # masked_adamw_ also steps the biases; they are not pruned.
    assert {name: mock.call_count for name, mock in made.items()} == {
        **dict.fromkeys(names, 0),
        "boundary_adamw_": 8,
        "masked_adamw_": 8,
    }


@pytest.mark.parametrize("constant", ["CANDIDATES", "reach"])
def test_a_full_bin_and_a_threshold_that_left_are_read_for_first(
    monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    if constant == "CANDIDATES":
        monkeypatch.setitem(ops.bin_of.__globals__, "CANDIDATES", 0)
    else:
        around = ops.bracket_around
        monkeypatch.setattr(ops, "bracket_around", lambda threshold: around(threshold, octaves=1e-6))
    with counted("boundary_adamw_") as passes, counted("sample") as samples:
        one = train(Training())
    assert passes.called
    assert samples.call_count > 2
    if constant == "CANDIDATES":
        assert all(call.kwargs["around"] is None for call in passes.call_args_list)
    monkeypatch.undo()
    with separately():
        other = train(Training())
    assert one.told == other.told


def test_finalize_where_a_window_has_ended_keeps_the_last_mask() -> None:
    """At the final ratio: that window was not to decide anything yet."""
    run = train(Training(), range(24))
    assert run.pruner.importance.ahead
    assert run.pruner.masks.chosen_at(run.pruner.schedule.final_ratio)
    before, cutoff = [bits.clone() for bits in run.pruner.masks.bits], run.pruner.masks.cutoff.clone()
    run.pruner.finalize()
    assert torch.equal(run.pruner.masks.cutoff, cutoff)
    assert all(map(torch.equal, run.pruner.masks.bits, before))
    with separately():
        other = train(Training(), range(24))
        other.pruner.finalize()
    assert run.weights() == other.weights()


@pytest.mark.parametrize("at", [8, 12, 13, 24])
def test_a_checkpoint_between_windows_goes_on_to_the_same_bits(tmp_path: Path, at: int) -> None:
    one = train(Training(), range(at))
    one.pruner.save(tmp_path / "pruner.safetensors")
    for resumes in (nullcontext, separately):
        again = Training()
        again.model.load_state_dict(one.model.state_dict())
        again.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
        again.pruner.load(tmp_path / "pruner.safetensors")
        whole = train(Training())
        with resumes():
            train(again, range(at, STEPS))
        # Counts of the last mask are not kept.
        assert [told[1:] for told in again.told] == [told[1:] for told in whole.told[at:]]


@pytest.mark.parametrize("at", [12, 13, 15, 16, 24])
def test_longer_windows_as_on_a_gpu_resume_and_finalize_to_the_same_bits(tmp_path: Path, at: int) -> None:
    settings: dict[str, Any] = {"delta_t": 4}
    with like_a_gpu():
        one = train(Training(**settings), range(at))
        one.pruner.save(tmp_path / "pruner.safetensors")
        again = Training(**settings)
        again.model.load_state_dict(one.model.state_dict())
        again.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
        again.pruner.load(tmp_path / "pruner.safetensors")
        train(again, range(at, STEPS))
    with separately():
        whole, stopped = train(Training(**settings)), train(Training(**settings), range(at))
    assert [told[1:] for told in again.told] == [told[1:] for told in whole.told[at:]]
    for run in (one, stopped, again, whole):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ended early
            run.pruner.finalize()
    assert again.weights() == whole.weights()
    assert one.weights() == stopped.weights()


@pytest.mark.parametrize("criterion", ["fisher", "magnitude", "movement", "moments"])
@pytest.mark.parametrize("at", [8, 16, 24])
def test_criteria_without_a_window_end_early_too(criterion: str, at: int) -> None:
    run = train(Training(criterion=criterion, delta_t=4), range(at))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run.pruner.finalize()["sparsity"] == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"delta_t": 4}, {"delta_t": 4, "beta2": 1.0, "optimizer": "sgd"}], ids=str)
@pytest.mark.parametrize("at", [5, 8, 11, 16, 24])
def test_training_that_ends_early_counts_the_window_that_has_just_ended(settings: dict[str, Any], at: int) -> None:
    """As the next step's mask would have, whichever pass ended it; and no window that has not."""
    one, other = train(Training(**settings), range(at)), Training(**settings)
    with separately():
        train(other, range(at))
    before = [x.clone() for x in other.pruner.importance.exp_avg_ipt]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one.pruner.finalize()
        other.pruner.finalize()
    assert one.weights() == other.weights()
    ended = at % other.config.delta_t == 0 and at < STEPS - other.config.cooldown
    assert ended == any(not torch.equal(a, b) for a, b in zip(before, other.pruner.importance.exp_avg_ipt, strict=True))


def test_a_state_from_a_separate_pass_goes_on_in_one() -> None:
    with separately():
        one = train(Training(), range(12))
    state = copy.deepcopy(one.pruner.state_dict())
    train(one, range(12, STEPS))
    two = Training()
    with separately():
        train(two, range(12))
    two.pruner.load_state_dict(state)
    train(two, range(12, STEPS))
    same(one, two)


@pytest.mark.parametrize("where", ["before", "after"])
def test_an_interrupted_step_is_taken_again(where: str) -> None:
    """An exception between the pass over pruned tensors and the end of the step, or before that pass."""
    run, t = train(Training(), range(12)), 12
    while not run.pruner.schedule.mask_due(t):
        t += 1
    name = "boundary_adamw_" if where == "before" else "masked_adamw_"
    run.gradients(t)
    with patch.object(torch.ops.pins_ext, name, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run.optimizer.step()
    train(run, range(t, STEPS))
    report = run.pruner.finalize()
    assert report["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert run.pruner.step == STEPS - 12 + t
    if where == "before":
        for p, state in run.optimizer.state.items():
            state["step"] = STEPS  # counted twice
            assert p.isfinite().all()


def test_skipped_steps_and_missing_gradients_take_separate_passes() -> None:
    def training() -> Training:
        run = Training()
        for t in range(STEPS):
            run.gradients(t)
            run.optimizer.found_inf = torch.tensor([float(t in (11, 12))]) if 9 < t < 14 else None
            if t in (16, 19, 20):
                run.model[1].weight.grad = None
            run.optimizer.step()
            run.told.append((run.pruner.masks.counts(), run.pruner.masks.cutoff.tolist(), run.weights()))
        return run

    with counted("boundary_adamw_") as passes:
        one = training()
    assert passes.called
    with separately():
        other = training()
    assert one.told == other.told


@pytest.mark.parametrize("way", ["score_gradients", "before_mask", "scope", "fixed", "momentum of some", "callable"])
def test_other_ways_to_prune_choose_before(way: str) -> None:
    def training() -> Training:
        settings: dict[str, Any] = {"scope": "layer"} if way == "scope" else {}
        if way == "callable":
            settings["criterion"] = lambda p, g, lr: (p * g).abs()
        run = Training("sgd" if way == "momentum of some" else "adamw", **settings)
        if way == "momentum of some":
            first = run.optimizer.param_groups[0]
            run.optimizer.add_param_group({"params": [first["params"].pop(0)], "momentum": 0.9})
        if way == "fixed":
            with torch.no_grad():
                run.model[0].weight[:7] = 0
            run.pruner.detach()
            run.pruner = Pruner.from_sparse(run.model, run.optimizer, run.config, STEPS)
        if way == "score_gradients":
            named = dict(run.model.named_parameters())
            run.pruner.score_gradients = lambda: {name: p.grad for name, p in named.items() if p.grad is not None}
        if way == "before_mask":
            run.pruner.before_mask = lambda: None
        return train(run)

    name = "boundary_sgd_" if way == "momentum of some" else "boundary_adamw_"
    with counted(name) as passes:
        one = training()
    chosen = [call for call in passes.call_args_list if call.kwargs["around"] is not None]
    assert not chosen
    with separately():
        other = training()
    assert one.told == other.told
