"""Runs whose statistics are on the host, beside the same runs without.

    python state_device_job.py second|cuda [CASE ...]

Prints, a line of JSON for each case, its name and what went wrong, empty where all is well.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW, PinsSGD, fused
from pins_ext.pruning import attachment, importance, moments, staging
from pins_ext.pruning.memory import memory
from pins_ext.pruning.offload import HostImportance

warnings.simplefilter("ignore")
STEPS = 25  # within a window: at its end one pass is a window ahead of separate ones
FIXED: dict[str, Any] = {"sparsity": 0.7, "warmup": 4, "cooldown": 6, "delta_t": 4, "include": ["*.weight"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "pins": {},
    "platon strict": {"criterion": "platon", "mask_policy": "strict"},
    "movement": {"criterion": "movement"},
    "pins-update": {"criterion": "pins-update"},
    "a function": {"criterion": lambda p, g, lr: (p * g).abs() + lr * g * g},
    "beta2=0": {"beta2": 0.0},
    "beta2=1": {"beta2": 1.0},
    "bfloat16": {"state_dtype": "bfloat16"},
    "8bit": {"state_dtype": "8bit"},
    "reference ties": {"ties": "reference"},
    "layer": {"scope": "layer"},
    "densities": {"min_density": 0.1, "max_density": 0.9},
    "2:4": {"pattern": "2:4", "sparsity": 0.5},
    "4x4": {"pattern": "4x4", "sparsity": 0.5},
    "every other step": {"importance_every": 2},
    "windows of one step": {"delta_t": 1},
    "strict, states cleared": {"mask_policy": "strict", "mask_optimizer_state": True},
    "moments": {"criterion": "moments"},
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "PinsAdamW": lambda p: PinsAdamW(p, lr=1e-2),
    "PinsAdamW in 8 bits": lambda p: PinsAdamW(p, lr=1e-2, moment_dtype="8bit"),
    "capturable PinsAdamW": lambda p: PinsAdamW(p, lr=1e-2, capturable=True),
    "PinsSGD": lambda p: PinsSGD(p, lr=1e-2, momentum=0.9),
}
CASES: dict[str, Callable[[torch.device], None]] = {}


def case(f: Callable[[torch.device], None]) -> Callable[[torch.device], None]:
    CASES[f.__name__] = f
    return f


class Job:
    """A model in training on a device; after each step, what its masks and weights are."""

    def __init__(
        self,
        device: torch.device,
        optimizer: str = "PinsAdamW",
        dtype: torch.dtype = torch.float32,
        zeros: float = 0.0,
        frozen: bool = False,
        scaled: bool = False,
        **config: Any,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.dtype, self.scaled = device, dtype, scaled
        model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 68), nn.ReLU(), nn.Linear(68, 64))
        with torch.no_grad():
            for p in model.parameters():
                p[torch.rand(p.shape) < zeros] = 0
        self.model = model.to(device, dtype)
        learning = list(self.model.parameters())
        if frozen:
            for p in learning:
                p.requires_grad_(p.dim() == 1)
            learning = [p for p in learning if p.requires_grad]
        self.optimizer = OPTIMIZERS[optimizer](learning)
        settings = PruneConfig(**FIXED | config)
        make = Pruner.from_sparse if zeros else Pruner
        self.pruner = make(self.model, self.optimizer, settings, STEPS, **({"frozen_base": True} if frozen else {}))
        self.seen: list[list[Tensor]] = []
        self.t = 0

    def run(
        self,
        until: int = STEPS,
        before_step: Callable[[], Any] = lambda: None,
        after_step: Callable[[], Any] = lambda: None,
    ) -> Job:
        while self.t < until:
            torch.manual_seed(self.t)
            self.optimizer.zero_grad()
            x = torch.randn(8, 40).to(self.device, self.dtype)
            scale = 1024.0 if self.scaled else 1.0
            (self.model(x).square().mean() * scale).backward()
            if self.scaled:
                self.optimizer.grad_scale = torch.tensor(scale).to(self.device)
                self.optimizer.found_inf = torch.tensor(float(self.t in (2, 9))).to(self.device)
            before_step()
            self.optimizer.step()
            after_step()
            self.t += 1
            self.seen.append([x.detach().cpu().clone() for x in (*self.model.parameters(), *self.pruner.masks.bits)])
        return self

    def states(self) -> dict[str, Tensor]:
        return {name: x.cpu() for name, x in self.pruner.state_dict()["tensors"].items()}

    def end(self) -> Job:
        self.report = self.pruner.finalize()
        self.stats = {name: value for name, value in self.pruner.stats().items() if name != "ms"}
        return self


def on_host(job: Job) -> bool:
    """Whether its states are there, and its masks and weights are not."""
    held, masks = job.pruner.importance, job.pruner.masks
    tensors = [x for name, kind in held.tensors().items() if name != "shadow" for x in kind]
    there = [*masks.bits, *job.model.parameters(), *held.shadow]
    return isinstance(held, HostImportance) and all(
        (x.device.type == "cpu") == near for near, kind in ((True, tensors), (False, there)) for x in kind
    )


def check_states(a: Job, b: Job) -> None:
    """But where a pass has ended the window already, for the mask of the next step, and left ipt as it was."""
    if any(job.pruner.importance.ahead for job in (a, b)):
        return
    x, y = a.states(), b.states()
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x), [n for n in x if not torch.equal(x[n], y[n])]


def check_same(a: Job, b: Job) -> None:
    """Of two runs, one with its states on the host."""
    assert on_host(a)
    assert not on_host(b)
    assert len(a.seen) == len(b.seen)
    for t, (x, y) in enumerate(zip(a.seen, b.seen, strict=True)):
        assert all(map(torch.equal, x, y)), f"step {t}: weights or masks differ"
    assert any(bool((bits != bits[0]).any()) for bits in a.seen[-1][-3:]), "nothing was pruned"
    check_states(a, b)
    ahead = b.pruner.importance.ahead
    assert a.end().report == b.end().report
    if ahead:
        a.stats["churn"] = b.stats["churn"]  # the last mask is not chosen once more
    assert str(a.stats) == str(b.stats), (a.stats, b.stats)  # a threshold may be NaN


def pair(device: torch.device, *args: Any, **options: Any) -> tuple[Job, Job]:
    return Job(device, *args, state_device="cpu", **options), Job(device, *args, **options)


def compare(device: torch.device, *args: Any, **options: Any) -> None:
    check_same(*(job.run() for job in pair(device, *args, **options)))


for _name, _config in CONFIGS.items():
    for _optimizer in OPTIMIZERS:
        if (_name == "moments" and _optimizer == "PinsSGD") or (
            (" in " in _optimizer or "capturable" in _optimizer) and _name not in ("pins", "moments", "bfloat16")
        ):
            continue
        CASES[f"{_name}, {_optimizer}"] = lambda device, o=_optimizer, c=_config: compare(device, o, **c)
for _dtype in ("float32", "bfloat16", "8bit"):
    CASES[f"bfloat16 weights, {_dtype}"] = lambda device, s=_dtype: compare(device, dtype=torch.bfloat16, state_dtype=s)
    CASES[f"sparse start, {_dtype}"] = lambda device, s=_dtype: compare(device, zeros=0.3, state_dtype=s)
    for _delta_t in (1, 4):
        CASES[f"frozen base, {_dtype}, {_delta_t}"] = lambda device, s=_dtype, n=_delta_t: compare(
            device, "AdamW", frozen=True, criterion="platon", state_dtype=s, delta_t=n
        )
for _criterion in ("pins", "pins-update", "movement", "moments", "a function"):
    CASES[f"scaled, {_criterion}"] = lambda device, c=_criterion: compare(
        device, scaled=True, **CONFIGS.get(c, {"criterion": c})
    )


@case
def clipped(device: torch.device) -> None:
    a, b = pair(device)
    for job in (a, b):
        job.run(before_step=lambda job=job: job.optimizer.clip_grad_norm_(1e-3))
    check_same(a, b)


@case
def rates_on_the_device(device: torch.device) -> None:
    a, b = pair(device)
    for job in (a, b):
        for group in job.optimizer.param_groups:
            group["lr"] = torch.tensor(1e-2).to(device)
        job.run()
    check_same(a, b)


@case
def task_gradients(device: torch.device) -> None:
    a, b = pair(device)
    for job in (a, b):
        job.pruner.score_gradients = lambda job=job: {
            name: p.grad * 0.5 for name, p in job.model.named_parameters() if p.dim() > 1
        }
        job.run()
    check_same(a, b)


def check_saved_and_loaded(device: torch.device, **options: Any) -> None:
    """From each place of the states into each, within a window, after the first mask."""
    whole = Job(device, **options).run()
    for there in ("cpu", None):
        first = Job(device, state_device=there, **options).run(11)
        for here in ("cpu", None):
            second = Job(device, state_device=here, **options)
            with tempfile.TemporaryDirectory() as folder:
                first.pruner.save(Path(folder) / "pruner")
                second.pruner.load(Path(folder) / "pruner")
            second.model.load_state_dict(first.model.state_dict())
            second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
            second.t = 11
            second.run()
            check_states(whole, second)
            assert all(map(torch.equal, whole.seen[-1], second.seen[-1])), (there, here, options)
            assert on_host(second) == (here == "cpu")


@case
def saved_and_loaded(device: torch.device) -> None:
    check_saved_and_loaded(device, zeros=0.3, state_dtype="8bit")


@case
def saved_and_loaded_otherwise(device: torch.device) -> None:
    for options in ({}, {"criterion": "moments"}, {"delta_t": 1}):
        check_saved_and_loaded(device, **options)


@case
def copied(device: torch.device) -> None:
    a, b = Job(device, "AdamW", state_device="cpu").run(11), Job(device, "AdamW").run()
    a.model, a.optimizer, a.pruner = copy.deepcopy((a.model, a.optimizer, a.pruner))
    a.run()
    check_same(a, b)


@case
def released_gradients_are_refused(device: torch.device) -> None:
    job = Job(device, state_device="cpu")
    job.optimizer.release_gradients()
    with pytest.raises(RuntimeError, match=r"state_device='cpu'.*without release_gradients"):
        job.pruner.slots[0].check_release()


@case
def only_what_is_needed_is_copied(device: torch.device) -> None:
    """Tensors that come down in each step, by whether it takes importance; masks go up when one was chosen."""
    kinds = {"second": staging.BlockingCopies, "cuda": staging.StreamCopies}[device.type]
    start, down, up = kinds.start, 0, 0
    read = sys.modules["second_device"].READ if device.type == "second" else []

    def counting(self: Any, pairs: Any, to_host: bool) -> Any:
        nonlocal down, up
        down, up = down + to_host, up + (not to_host)
        return start(self, pairs, to_host)

    kinds.start = counting  # type: ignore[method-assign]
    try:
        seen: list[list[str]] = []
        for config, taken in (({}, 1), ({"importance_every": 2}, 2), ({"criterion": "moments"}, 4)):
            job = Job(device, state_device="cpu", **config)
            for t in range(STEPS):
                down = up = 0
                job.run(t + 1, before_step=read.clear, after_step=lambda: seen.append(list(read)))
                (found,) = seen
                seen.clear()
                waited = [name for name in found if "copy" not in name] + (found if t % taken else [])
                assert not waited, (config, t, waited)
                assert down == (3 if t % taken == 0 else 0), (config, t, down)
                # A mask at every window's end of the schedule, and where its last part begins.
                chosen = (t >= 8 and t % 4 == 0) or t == STEPS - 5
                assert up == chosen, (config, t, up)
    finally:
        kinds.start = start  # type: ignore[method-assign]


@case
def nothing_to_move(device: torch.device) -> None:
    """Criteria without states run where the weights are, and the pruner says so."""
    for criterion in ("fisher", "magnitude"):
        a, b = pair(device, criterion=criterion)
        assert not on_host(a)
        assert any("state_device" in text for text in a.pruner.plan()["conflicts"])
        assert all(map(torch.equal, a.run().seen[-1], b.run().seen[-1]))


@case
def planned_bytes(device: torch.device) -> None:
    """Those of the states, of the buffers and of the masks that are on the host, and none of them on the device."""
    narrow = {"state_dtype": "8bit", "dtype": torch.bfloat16}
    for options in ({}, narrow, {"criterion": "platon", "mask_policy": "strict"}):
        job = Job(device, state_device="cpu", **options).run()
        held, masks = job.pruner.importance, job.pruner.masks
        assert isinstance(held, HostImportance)
        kinds = held.tensors()
        shadow = sum(x.nbytes for x in kinds.pop("shadow", []))
        states = sum(x.nbytes for kind in kinds.values() for x in kind)
        packed = sum(x.nbytes for x in masks.packed)
        planned = memory(job.model, set(job.pruner.names), job.pruner.config)
        beside = dataclasses.replace(job.pruner.config, state_device=None)
        elsewhere = memory(job.model, set(job.pruner.names), beside)
        assert planned.statistics == shadow
        assert elsewhere.host == 0
        assert elsewhere.statistics == states + shadow
        found = states + packed + held._staging.nbytes
        made = job.pruner.plan()
        assert 0.98 * found - 4096 <= made["host_bytes"] <= 1.02 * found + 4096, (found, made["host_bytes"])
        assert planned.host == made["host_bytes"] + elsewhere.selection
        assert planned.total == elsewhere.total - states - elsewhere.selection + planned.selection
        assert made["state_bytes"] == shadow
        assert "on the host" in str(made)


def outcome(check: Callable[[torch.device], None], device: torch.device) -> str:
    """What went wrong."""
    try:
        check(device)
    except Exception:
        return traceback.format_exc()
    return ""


QUICK = (
    "pins, AdamW",
    "pins-update, PinsAdamW",
    "8bit, PinsAdamW",
    "moments, PinsAdamW",
    "sparse start, 8bit",
    "frozen base, 8bit, 1",
    "saved_and_loaded",
    "released_gradients_are_refused",
    "only_what_is_needed_is_copied",
    "nothing_to_move",
    "planned_bytes",
)
"""Those of every test run."""


def main() -> None:
    if sys.argv[1] == "second":
        import second_device

        device = second_device.DEVICE
        # What they would refuse there is a device or a class of tensors by its name.
        for module in (importance, fused, attachment, moments):
            for name in {"check_codes", "check_moments"} & vars(module).keys():
                setattr(module, name, lambda *anything: None)
    else:
        device = torch.device(sys.argv[1])
    for name in sys.argv[2:] or CASES:
        print(json.dumps([name, outcome(CASES[name], device)]), flush=True)


if __name__ == "__main__":
    main()
