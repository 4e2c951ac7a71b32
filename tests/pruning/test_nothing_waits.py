"""No step waits for a GPU, and its operator calls don't grow with the model: counted on CPU tensors, without a GPU.

The tensors take the branches of a GPU's; with --ptx so do the operators, in place of which kernels are launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from watch import Watch, like_a_gpu

from pins_ext import PruneConfig, Pruner, ops
from pins_ext.optim import PinsAdamW, PinsSGD

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

STEPS = 24
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "PinsAdamW": PinsAdamW,
    "PinsSGD": lambda p, lr: PinsSGD(p, lr, momentum=0.9),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr, fused=True),
}
SMALL: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "PinsAdamW in 8 bits": lambda p, lr: PinsAdamW(p, lr, moment_dtype="8bit"),
}
MOST_CALLS = {"in a window": 25, "a window's end": 150, "cool-down": 150}
"""Operator calls of a step, the optimizer's included; with --ptx those of the launchers, too."""

MOST_CALLS_OF_REGIONS = {"in a window": 25, "a window's end": 1000, "cool-down": 1000}
"""The same where several cutoffs are looked for."""


@pytest.fixture(
    params=[pytest.param("operators of the CPU", id="cpu"), pytest.param("kernels", id="ptx", marks=pytest.mark.ptx)]
)
def watch(request: pytest.FixtureRequest) -> Iterator[Watch]:
    """Watches what is called inside it, on CPU tensors that take a GPU's branches."""
    found = Watch()
    with ExitStack() as stack:
        if request.param == "kernels":
            from ptx_emulator.plugin import on_emulated_gpu

            stack.enter_context(on_emulated_gpu(request.config, around=found.inside))
        stack.enter_context(like_a_gpu(found))
        yield found


class Steps:
    """A model of `n` layers in training, watched step by step.

    Attributes:
        calls: operator calls of each step, without those of backward.
        tables: of addresses, uploaded up to each step.
    """

    def __init__(self, watch: Watch, optimizer: str, n: int, lr: Any = 1e-3, **config: Any) -> None:
        torch.manual_seed(0)
        self.watch = watch
        self.model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(n)))
        self.optimizer = (OPTIMIZERS | SMALL)[optimizer](self.model.parameters(), lr=lr)
        settings = {"sparsity": 0.7, "warmup": 4, "cooldown": 6, "delta_t": 4, "include": ["*.weight"], **config}
        self.pruner = Pruner(self.model, self.optimizer, PruneConfig(**settings), total_steps=STEPS)
        self.calls: list[int] = []
        self.tables: list[int] = []

    def run(self, set_to_none: bool = True) -> Steps:
        for _ in range(STEPS):
            self.optimizer.zero_grad(set_to_none)
            self.model(torch.randn(4, 16)).square().mean().backward()
            before = sum(self.watch.calls.values())
            with self.watch.on():
                self.optimizer.step()
            self.calls.append(sum(self.watch.calls.values()) - before)
            self.tables.append(self.watch.tables)
        return self

    def kind(self, t: int) -> str:
        if t >= STEPS - 6:
            return "cool-down"
        return "in a window" if t % 4 else "a window's end"


SCOPES: dict[str, Any] = {
    "global": {},
    "layer": {"scope": "layer"},
    "groups": {"scope": {"first": ["0.*", "1.*"]}},
    "densities": {"min_density": 0.1, "max_density": 0.9},
    "densities of layers": {"scope": "layer", "min_density": {"1.*": 0.2}},
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", ["reference", "strict"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_reads_a_device_value(watch: Watch, optimizer: str, policy: str, scope: str) -> None:
    Steps(watch, optimizer, 3, mask_policy=policy, **SCOPES[scope]).run()
    in_pass = {"PinsAdamW": "pins_ext.boundary_adamw_", "PinsSGD": "pins_ext.boundary_sgd_"}
    of_all = in_pass.get(optimizer, "pins_ext.select")
    assert watch.calls[of_all if scope == "global" else "pins_ext.count_regions_"]
    assert not watch.reads


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "config",
    [
        {"criterion": "movement"},
        {"criterion": "platon", "mask_policy": "strict"},
        {"criterion": "pins-update"},
        {"criterion": "magnitude"},
        {"beta2": 0.0},
        {"beta2": 1.0},
        {"mask_optimizer_state": True},
        {"state_dtype": "bfloat16"},
        {"ties": "reference"},
    ],
    ids=str,
)
def test_no_criterion_reads_a_device_value(watch: Watch, optimizer: str, config: dict[str, Any]) -> None:
    Steps(watch, optimizer, 3, **config).run()
    assert not watch.reads


@pytest.mark.parametrize("config", [{}, {"scope": "layer"}, {"criterion": "moments"}, {"beta2": 0.0}], ids=str)
@pytest.mark.parametrize("optimizer", SMALL)
def test_no_step_in_8_bits_reads_a_device_value(watch: Watch, optimizer: str, config: dict[str, Any]) -> None:
    """Nor asks the device how many weights there are, which 8-bit storage doesn't tell."""
    Steps(watch, optimizer, 3, state_dtype="8bit", **config).run()
    assert not watch.reads


PATTERNS: list[tuple[float, Any]] = [
    (0.5, "2:4"),
    (0.5, "4x4"),
    (0.55, {"0.*": "4:8", "1.*": "4x1"}),
]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("sparsity", "pattern"), PATTERNS, ids=str)
@pytest.mark.parametrize("optimizer", ["PinsAdamW", "AdamW"])
def test_no_pattern_reads_a_device_value(
    watch: Watch, optimizer: str, sparsity: float, pattern: Any, scope: str
) -> None:
    sparsity = 0.5 if scope == "layer" else sparsity
    Steps(watch, optimizer, 3, scope=scope, sparsity=sparsity, pattern=pattern).run()
    assert bool(watch.calls["pins_ext.eligible_"]) == (pattern != "4x4")
    assert not watch.reads


def test_operator_calls_do_not_grow_with_groups(watch: Watch) -> None:
    small = Steps(watch, "PinsAdamW", 2, sparsity=0.5, pattern="2:4").run(set_to_none=False)
    large = Steps(watch, "PinsAdamW", 30, sparsity=0.5, pattern="2:4").run(set_to_none=False)
    assert small.calls[1:] == large.calls[1:]


@pytest.mark.parametrize(
    "config", [{}, {"scope": "layer"}, {"criterion": "moments"}, {"mask_optimizer_state": True}], ids=str
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tables_of_addresses_are_uploaded_once(watch: Watch, optimizer: str, config: dict[str, Any]) -> None:
    """As long as gradients keep their addresses; a gradient that moved brings the table of its operator alone."""
    if optimizer == "PinsSGD" and "criterion" in config:
        pytest.skip("it has no moments to make a score of")
    steps = Steps(watch, optimizer, 3, **config)
    steps.run(set_to_none=False)
    assert watch.unaddressed == {}
    assert watch.tables
    # Every kind of step has been by then.
    assert steps.tables[-1] == steps.tables[-3]
    for p in steps.model.parameters():
        p.grad = torch.ones_like(p)
    before = watch.tables
    with watch.on():
        steps.optimizer.step()
    # A fused optimizer has one table of the pruned weights and one of the biases.
    assert watch.tables - before == ("criterion" not in config if optimizer == "AdamW" else 2)


def test_the_norm_of_gradients_uploads_their_addresses_once(watch: Watch) -> None:
    steps = Steps(watch, "PinsAdamW", 3).run(set_to_none=False)
    assert isinstance(steps.optimizer, PinsAdamW)
    tables = []
    for _ in range(3):
        with watch.on():
            steps.optimizer.clip_grad_norm_(1.0)
            steps.optimizer.step()
        tables.append(watch.tables)
    assert watch.unaddressed == {}
    assert tables == [steps.tables[-1] + 1] * 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_learning_rate_on_the_device_is_not_read(watch: Watch, optimizer: str) -> None:
    Steps(watch, optimizer, 3, lr=torch.tensor(1e-3)).run()
    assert not watch.reads


@pytest.mark.parametrize("optimizer", ["PinsAdamW", "PinsSGD"])
def test_a_gradient_scaler_is_not_read(watch: Watch, optimizer: str) -> None:
    steps = Steps(watch, optimizer, 3)
    for attribute, value in (("grad_scale", 1024.0), ("found_inf", 0.0)):
        setattr(steps.optimizer, attribute, torch.tensor(value))
    steps.run()
    assert not watch.reads


@pytest.mark.parametrize("policy", ["reference", "strict"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_operator_calls_do_not_grow_with_the_model(watch: Watch, optimizer: str, policy: str) -> None:
    # Gradients that move bring a new table of their addresses, whatever their number; these stay.
    small = Steps(watch, optimizer, 2, mask_policy=policy).run(set_to_none=False)
    large = Steps(watch, optimizer, 30, mask_policy=policy).run(set_to_none=False)
    # In the first step the optimizer makes its states.
    assert small.calls[1:] == large.calls[1:]
    for t, calls in enumerate(large.calls):
        if t:
            assert calls <= MOST_CALLS[large.kind(t)], (t, large.kind(t), calls)


@pytest.mark.parametrize("policy", ["reference", "strict"])
@pytest.mark.parametrize("scope", [name for name in SCOPES if name != "global"])
def test_operator_calls_do_not_grow_with_the_regions(watch: Watch, scope: str, policy: str) -> None:
    small = Steps(watch, "PinsAdamW", 4, mask_policy=policy, **SCOPES[scope]).run(set_to_none=False)
    large = Steps(watch, "PinsAdamW", 40, mask_policy=policy, **SCOPES[scope]).run(set_to_none=False)
    assert small.calls[1:] == large.calls[1:]
    for t, calls in enumerate(large.calls):
        if t:
            assert calls <= MOST_CALLS_OF_REGIONS[large.kind(t)], (t, large.kind(t), calls)
    assert not watch.reads


ONE_PASS: list[dict[str, Any]] = [
    {},
    {"mask_policy": "strict", "criterion": "platon", "mask_optimizer_state": True},
    {"state_dtype": "bfloat16"},
    {"beta2": 1.0},
]


@pytest.mark.parametrize("config", ONE_PASS, ids=str)
@pytest.mark.parametrize("optimizer", ["PinsAdamW", "PinsSGD"])
def test_windows_of_one_step_take_one_pass_that_reads_nothing(
    watch: Watch, optimizer: str, config: dict[str, Any]
) -> None:
    """From the second mask on fold, pack and update are one call, whose operator calls don't grow with the model."""
    settings = {"schedule": "constant", "delta_t": 1, **config}
    small, large = (Steps(watch, optimizer, n, **settings).run(set_to_none=False) for n in (2, 30))
    assert not watch.reads
    assert not watch.unaddressed
    name = "pins_ext.boundary_adamw_" if optimizer == "PinsAdamW" else "pins_ext.boundary_sgd_"
    # The first step makes the states and knows no score; the window of the last warm-up step ends in its own pass.
    assert watch.calls[name] >= 2 * (STEPS - 5)
    assert not watch.calls["pins_ext.pack_"]
    assert small.calls[1:] == large.calls[1:]
    assert max(large.calls[1:]) <= MOST_CALLS["a window's end"]
    assert large.tables[-1] == large.tables[STEPS // 2]


def test_the_watch_sees_a_read(watch: Watch) -> None:
    """Each way by which a value gets to the host."""
    x = torch.ones(3)
    reads: list[Callable[[], Any]] = [
        lambda: x[0].item(),
        lambda: bool(x[0] > 0),
        lambda: float(x[1]),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x[x > 0],
        lambda: x[torch.tensor(1)],
        lambda: torch.equal(x, x),
        lambda: x.nonzero(),
        lambda: range(5)[x.long()[0]],
    ]
    for n, read in enumerate(reads, 1):
        with watch.on():
            read()
        assert sum(watch.reads.values()) == n


def test_a_selection_takes_few_calls(watch: Watch) -> None:
    """Thresholds as on the CPU; as many calls for two tensors as for forty."""
    calls = []
    for n in (2, 40):
        a, b = ([torch.randn(500) for _ in range(n)] for _ in range(2))
        layout, n_prune = ops.Layout.of(a), torch.tensor(400 * n)
        work = (layout.places, layout.chunks)
        expected = ops.select(a, b, *work, "product", n_prune)
        counted: dict[str, Tensor] = {"bracket": ops.bracket_around(expected)}
        counted["counts"] = torch.zeros(1 + ops.BINS, dtype=torch.int64)
        torch.ops.pins_ext.count_(counted["counts"], a, b, *work, "product", counted["bracket"])
        for given in ({}, counted):
            before = sum(watch.calls.values())
            with watch.on():
                chosen = torch.ops.pins_ext.select(a, b, *work, "product", n_prune, **given)
            calls.append(sum(watch.calls.values()) - before)
            assert torch.equal(chosen, expected)
    assert not watch.reads
    assert calls[:2] == calls[2:]
    assert max(calls) <= 100
