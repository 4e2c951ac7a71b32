"""Steps that are recorded once and repeated, as a CUDA graph repeats them; and a training that takes its steps so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from drawn_training import separately
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from watch import READS, like_a_gpu

from pins_ext import PruneConfig, Pruner, StepGraphs, ops
from pins_ext.optim import FusedOptimizer, PinsAdamW, PinsSGD
from pins_ext.pruning import graphs
from pins_ext.pruning.captured import StepKind

TRANSFER = import_module("pins_ext.ops.transfer")
STEPS, WARMUP, COOLDOWN, DELTA_T = 20, 2, 7, 3
SHAPES = ((24, 17), (40, 24), (8, 40))


class Recording(TorchDispatchMode):
    """Stands for one where there is no GPU: repeats every operator call with the arguments and results it had.

    What a graph can't hold is refused: a read of a value, and a number of the host's that becomes a tensor. Operators
    run while they are recorded, and so the first replay does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._ran = False

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(f.overloadpacket).removeprefix("aten.")
        if name in (*READS, "lift_fresh"):
            raise AssertionError(f"{name}: a graph does not hold what the host reads or knows")
        result = f(*args, **(kwargs or {}))
        self._calls.append((f, args, kwargs or {}, _tensors(result)))
        return result

    def capture(self, f: Callable[[], Any]) -> None:
        with recording(), self:
            f()
        self._ran = True

    @torch.no_grad()
    def replay(self) -> None:
        if self._ran:
            self._ran = False
            return
        for f, args, kwargs, results in self._calls:
            for old, new in zip(results, _tensors(f(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def record(f: Callable[[], Any]) -> Recording:
    """What stands for `graphs.cuda_graph`."""
    made = Recording()
    made.capture(f)
    return made


def capture_on(device: str) -> Callable[[Callable[[], Any]], graphs.Graph]:
    """How a step is captured there."""
    return graphs.cuda_graph if device == "cuda" else record


def _tensors(result: Any) -> list[Tensor]:
    return [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]


@contextmanager
def recording() -> Iterator[None]:
    """The package takes it that a CUDA graph is captured."""
    homes = (ops, TRANSFER)
    before = [home.capturing for home in homes]
    for home in homes:
        home.capturing = lambda device: True
    try:
        yield
    finally:
        for home, function in zip(homes, before, strict=True):
            home.capturing = function


def rate(t: int) -> float:
    return 1e-2 * (1 + 0.3 * math.sin(t))


class CapturedTraining:
    """A model whose gradients are noise and the weights themselves; all that a step reads besides stays in its place.

    Attributes:
        replays: of each kind of step.
    """

    def __init__(
        self,
        device: str,
        capturable: bool,
        optimizer: str = "adamw",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(m, n) for n, m in SHAPES)).to(device, dtype)
        if options.pop("mixed", False):
            self.model[1].bias.data = self.model[1].bias.data.bfloat16()
        self.device, self.capturable = device, capturable
        self.max_norm, self.scaled = options.pop("max_norm", None), options.pop("scaled", False)
        moments = {"moment_dtype": options.pop("moment_dtype", "float32")} if optimizer == "adamw" else {}
        make: Any = PinsAdamW if optimizer == "adamw" else PinsSGD
        settings = {"weight_decay": 0.1, **moments} | ({} if optimizer == "adamw" else {"momentum": 0.9})
        lr: Any = torch.tensor(0.0, dtype=torch.float64, device=device) if capturable else 0.0
        self.optimizer: FusedOptimizer = make(self.model.parameters(), lr=lr, capturable=capturable, **settings)
        config = {"sparsity": 0.7, "warmup": WARMUP, "cooldown": COOLDOWN, "delta_t": DELTA_T, "include": ["*.weight"]}
        self.pruner = Pruner(self.model, self.optimizer, PruneConfig(**(config | options)), STEPS)
        self.noise = torch.Generator().manual_seed(1)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        if self.scaled:
            self.found_inf = torch.zeros(1, device=device)
            self.optimizer.grad_scale = torch.full((1,), 8.0, device=device)  # type: ignore[attr-defined]
            self.optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.replays: Counter[StepKind] = Counter()
        self.graphs = StepGraphs(self.pruner, self._step, capture_on(device)) if capturable else None

    @torch.no_grad()
    def give_gradients(self, t: int) -> None:
        for p in self.model.parameters():
            noise = torch.randn(p.shape, generator=self.noise)
            p.grad.copy_(0.01 * noise.to(p) + 0.1 * p)  # type: ignore[union-attr]
        if self.scaled:
            self.found_inf.fill_(float(t % 7 == 3))
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(rate(t)) if self.capturable else rate(t)

    def _step(self) -> None:
        if self.max_norm is not None:
            self.optimizer.clip_grad_norm_(self.max_norm)
        self.optimizer.step()

    def step(self, t: int) -> None:
        """One step: by StepGraphs where the optimizer is capturable."""
        self.give_gradients(t)
        if self.graphs is None:
            self._step()
            return
        kind = self.graphs.kind
        self.graphs()
        if kind in self.graphs.graphs:
            self.replays[kind] += 1

    def state(self) -> dict[str, Any]:
        """All that a step leaves behind, copied to the host."""
        tensors: dict[str, Any] = dict(self.model.state_dict())
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{i}/{name}": value for name, value in state.items()}
        state = self.pruner.state_dict()
        tensors |= {f"pruner/{name}": value for name, value in state.pop("tensors").items()}
        tensors["stats"] = self.pruner.masks.stats
        return {name: value.detach().cpu().clone() for name, value in tensors.items()} | {"pruner": state}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What is not the same to the last bit."""
    assert a.keys() == b.keys()
    return [n for n in a if not (a[n].equal(b[n]) if isinstance(a[n], Tensor) else a[n] == b[n])]


def compare(device: str, **options: Any) -> CapturedTraining:
    """Hold captured training against eager training without capturable=True, step by step; returns the captured one."""
    eager, captured = (CapturedTraining(device, capturable, **options) for capturable in (False, True))
    for t in range(STEPS):
        eager.step(t)
        captured.step(t)
        assert differences(eager.state(), captured.state()) == [], t
    assert sum(captured.replays.values()) >= STEPS // 3
    assert captured.pruner.finalize() == eager.pruner.finalize()
    return captured


def compare_without_a_pruner(device: str) -> PinsAdamW:
    """The same of an optimizer alone, over weights that round by random bits; returns the captured one."""
    weights = [nn.Parameter(torch.ones(70, dtype=torch.bfloat16, device=device)) for _ in range(2)]
    lr = torch.tensor(0.0, dtype=torch.float64, device=device)
    plain, captured = PinsAdamW(weights[:1]), PinsAdamW(weights[1:], lr=lr, capturable=True)
    for p in weights:
        p.grad = torch.linspace(-1, 1, 70).to(p)
    graph: graphs.Graph | None = None
    for t in range(6):
        lr.fill_(rate(t))
        plain.param_groups[0]["lr"] = rate(t)
        plain.step()
        if t == 0:
            captured.step()
            continue
        graph = graph or capture_on(device)(captured.step)
        graph.replay()
        assert torch.equal(*weights), t
    return captured


def replaying(**options: Any) -> CapturedTraining:
    """A training whose next step is a replay."""
    captured = CapturedTraining("cpu", True, **options)
    for t in range(STEPS // 2):
        captured.step(t)
    assert captured.graphs is not None
    assert captured.graphs.kind in captured.graphs.graphs
    captured.give_gradients(STEPS // 2)
    return captured


@contextmanager
def eager_as_captured() -> Iterator[None]:
    """Branches of a GPU's host, and eager steps by the separate passes that captured ones are made of.

    One pass has the window that ends folded a step before, to the same weights and masks (test_one_pass.py).
    """
    with like_a_gpu(), separately():
        yield
