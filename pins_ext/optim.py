"""AdamW and SGD whose one pass over memory can also take importance and a mask: drop-ins for torch.optim's.

On their own they are ordinary optimizers. A `Pruner` that finds one drives its step instead of following it by hooks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pins_ext import ops

if TYPE_CHECKING:
    from pins_ext.pruner import Pruner


@dataclass(frozen=True)
class FusedPruning:
    """What the pruner adds to the optimizer's pass over some tensors; an empty list means not wanted.

    Attributes:
        layout: of these tensors. masks: packed bits to apply after the update. ipt: window means to advance.
        shadow: unmasked values to keep. accepted, rng, criterion: see the operators. clear_state: zero the moments of
            pruned weights.
    """

    layout: ops.Layout
    masks: list[Tensor]
    ipt: list[Tensor]
    shadow: list[Tensor]
    accepted: Tensor
    rng: Tensor
    criterion: str
    clear_state: bool

    @staticmethod
    def none(layout: ops.Layout) -> FusedPruning:
        """No pruning: a plain optimizer step."""
        device = layout.rows.device
        unused = torch.zeros(2, dtype=torch.int64, device=device)
        return FusedPruning(layout, [], [], [], torch.zeros(1, device=device), unused, "pins", False)


class FusedOptimizer(Optimizer):
    """Base of the two: which tensors take which pass, gradient scaling, and the pruner that may drive the step."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        # torch.amp.GradScaler then leaves grad_scale and found_inf on the optimizer and always calls step.
        self._step_supports_amp_scaling = True
        self.pruner: Pruner | None = None
        self._slot: Any = None
        self._plain: dict[tuple[int, ...], FusedPruning] = {}
        self._skipped: Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        for name in ("pruner", "_slot", "_skipped"):
            self.__dict__.setdefault(name, None)
        self.__dict__.setdefault("_plain", {})

    def attach(self, pruner: Pruner, slot: Any) -> None:
        """Let a pruner take part in every step from now on.

        Raises:
            RuntimeError: another pruner already does.
        """
        if self.pruner is not None:
            raise RuntimeError("this optimizer already belongs to a Pruner: detach() that one first")
        self.pruner, self._slot = pruner, slot

    def detach(self) -> None:
        """Be a plain optimizer again."""
        self.pruner = self._slot = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; with a pruner attached, importance and masks ride along.

        Raises:
            RuntimeError: a closure while pruning: its gradients would come too late for the importance.
        """
        loss = None
        if closure is not None:
            if self.pruner is not None:
                raise RuntimeError("step(closure) computes gradients inside the step, too late for the importance")
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if isinstance(found_inf, Tensor):
            # Counted where it lies: the host's count of steps would need a synchronisation to leave this one out.
            self._skipped = found_inf.double() if self._skipped is None else self._skipped + found_inf
        if self.pruner is not None:
            self.pruner.begin(self._slot)
            self._step_pruned(self.pruner)
        self._step_plain()
        if self.pruner is not None:
            self.pruner.end(self._slot)
        return loss

    def _step_pruned(self, pruner: Pruner) -> None:
        with_grad = [i for i in self._slot.indices if pruner.parameters[i].grad is not None]
        if with_grad:
            groups = dict(zip(self._slot.indices, self._slot.group_of, strict=True))
            owners = [self.param_groups[groups[i]] for i in with_grad]
            self._run([pruner.parameters[i] for i in with_grad], owners, pruner.fused_pruning(self._slot, with_grad))
        pruner.fused_without_grad(self._slot, [i for i in self._slot.indices if pruner.parameters[i].grad is None])

    def _step_plain(self) -> None:
        pruned = {id(self.pruner.parameters[i]) for i in self._slot.indices} if self.pruner is not None else set()
        batches: dict[Any, tuple[list[Tensor], list[dict[str, Any]]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) not in pruned:
                    parameters, owners = batches.setdefault((p.device, p.dtype), ([], []))
                    parameters.append(p)
                    owners.append(group)
        live = {}
        for parameters, owners in batches.values():
            key = tuple(id(p) for p in parameters)
            live[key] = self._plain.get(key) or FusedPruning.none(ops.Layout.of(parameters))
            self._run(parameters, owners, live[key])
        self._plain = live

    def _run(self, parameters: list[Tensor], owners: list[dict[str, Any]], pruning: FusedPruning) -> None:
        """Check gradients, count the step, run the kernel."""
        grads = []
        for p in parameters:
            assert p.grad is not None
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            grads.append(p.grad.contiguous())
        scales = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        grad_scale, found_inf = (s.reshape(1).to(p.device) if isinstance(s, Tensor) else None for s in scales)
        for p in parameters:
            self._initialise(p)
            self.state[p]["step"] += 1
        hyper = self._hyper(
            [self._factors(p, g) for p, g in zip(parameters, owners, strict=True)], parameters[0].device
        )
        self._kernel(parameters, grads, hyper, pruning, {"grad_scale": grad_scale, "found_inf": found_inf})
        # Custom operators don't: a backward through weights saved before this step must fail, as with any optimizer.
        torch.autograd.graph.increment_version(parameters)

    def _initialise(self, p: Tensor) -> None:
        """State of a parameter at its first step."""
        state = self.state[p]
        if "step" not in state:
            if not p.is_contiguous():
                raise ValueError(f"{type(self).__name__} needs contiguous parameters, got strides {p.stride()}")
            # A torch.optim.SGD checkpoint has buffers and no step: its first step is over.
            state["step"] = float(any(name in state for name in self._moments(p)))
            state.update({name: torch.zeros_like(p) for name in self._moments(p) if name not in state})
        elif isinstance(state["step"], Tensor):
            state["step"] = float(state["step"])

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's of the same name, and loadable by it."""
        if self._skipped is not None:
            skipped, self._skipped = float(self._skipped), None
            for state in self.state.values():
                state["step"] -= skipped
        packed = super().state_dict()
        for state in packed["state"].values():
            if "step" in state:
                state["step"] = torch.tensor(float(state["step"]))
        return packed

    @abstractmethod
    def _moments(self, p: Tensor) -> Iterable[str]:
        """Names of the state tensors of a parameter."""

    @abstractmethod
    def _factors(self, p: Tensor, group: dict[str, Any]) -> tuple[float, ...]:
        """Row of numbers from which `_hyper` computes this parameter's hyper row."""

    @abstractmethod
    def _hyper(self, factors: list[tuple[float, ...]], device: torch.device) -> Tensor:
        """The `hyper` argument, float32 [n, 8], every column computed in float64 and rounded once."""

    @abstractmethod
    def _kernel(
        self,
        parameters: list[Tensor],
        grads: list[Tensor],
        hyper: Tensor,
        pruning: FusedPruning,
        scaling: dict[str, Tensor | None],
    ) -> None:
        """Run the operator."""


class PinsAdamW(FusedOptimizer):
    """AdamW (Loshchilov & Hutter 2019) in one pass, with room for importance and a mask.

    In float32 the weights equal those of torch.optim.AdamW(fused=True) on a CPU with AVX2 or AVX-512 to the last bit,
    except in a tensor's last, partial vector, where torch leaves out the fused multiply-add. Against the unfused path
    they differ by an ulp of the square root per step: torch takes it from MKL, which does not round it correctly there.
    In 16 bits each step is computed in float32 and rounded once.

    Args:
        params: parameters or groups. lr: learning rate. betas: decay of the two moments. eps: added to the root of the
            second moment. weight_decay: decoupled decay, as a share of the learning rate.

    Raises:
        ValueError: a hyperparameter out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        _check(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _moments(self, p: Tensor) -> Iterable[str]:
        return ("exp_avg", "exp_avg_sq")

    def _factors(self, p: Tensor, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(group["lr"]), group["weight_decay"], beta1, beta2, group["eps"], self.state[p]["step"]

    def _hyper(self, factors: list[tuple[float, ...]], device: torch.device) -> Tensor:
        if self._skipped is None:
            rows = {f: _adamw_row(*f) for f in set(factors)}
            return torch.tensor([rows[f] for f in factors]).to(device, non_blocking=True)
        lr, decay, beta1, beta2, eps, step = torch.tensor(factors, dtype=torch.float64).to(device).unbind(1)
        step = (step - self._skipped.reshape(()).to(device)).clamp(min=1)
        step_size, bias_sqrt = lr / (1 - beta1**step), (1 - beta2**step).sqrt()
        columns = [lr, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, -step_size, bias_sqrt, eps]
        return torch.stack(columns, 1).float()

    def _kernel(
        self,
        parameters: list[Tensor],
        grads: list[Tensor],
        hyper: Tensor,
        pruning: FusedPruning,
        scaling: dict[str, Tensor | None],
    ) -> None:
        torch.ops.pins_ext.masked_adamw_(
            parameters,
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            pruning.ipt,
            pruning.shadow,
            grads,
            pruning.masks,
            pruning.layout.rows,
            pruning.layout.chunks,
            hyper,
            pruning.accepted,
            pruning.rng,
            pruning.criterion,
            pruning.clear_state,
            **scaling,
        )


class PinsSGD(FusedOptimizer):
    """SGD with momentum, dampening, weight decay and Nesterov, in one pass, with room for importance and a mask.

    In float32 the weights equal those of torch.optim.SGD(foreach=False) on a CPU with FMA to the last bit.

    Args:
        params: parameters or groups. lr: learning rate. momentum: decay of the buffer. dampening: share of a gradient
            that does not enter the buffer. weight_decay: L2 penalty. nesterov: look ahead along the buffer.

    Raises:
        ValueError: a hyperparameter out of range, or Nesterov without momentum or with dampening.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        _check(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"nesterov": nesterov})

    def _moments(self, p: Tensor) -> Iterable[str]:
        return ("momentum_buffer",) if any(g["momentum"] for g in self.param_groups) else ()

    def _factors(self, p: Tensor, group: dict[str, Any]) -> tuple[float, ...]:
        first, nesterov = self.state[p]["step"] <= 1, group["nesterov"]
        return float(group["lr"]), group["weight_decay"], group["momentum"], group["dampening"], first, nesterov

    def _hyper(self, factors: list[tuple[float, ...]], device: torch.device) -> Tensor:
        rows = [(lr, wd, m, 1 - damp, float(first), float(nest), -lr, 0.0) for lr, wd, m, damp, first, nest in factors]
        return torch.tensor(rows).to(device, non_blocking=True)

    def _kernel(
        self,
        parameters: list[Tensor],
        grads: list[Tensor],
        hyper: Tensor,
        pruning: FusedPruning,
        scaling: dict[str, Tensor | None],
    ) -> None:
        torch.ops.pins_ext.masked_sgd_(
            parameters,
            [self.state[p]["momentum_buffer"] for p in parameters if "momentum_buffer" in self.state[p]],
            pruning.ipt,
            pruning.shadow,
            grads,
            pruning.masks,
            pruning.layout.rows,
            pruning.layout.chunks,
            hyper,
            pruning.accepted,
            pruning.rng,
            pruning.criterion,
            pruning.clear_state,
            **scaling,
        )


def _adamw_row(lr: float, decay: float, beta1: float, beta2: float, eps: float, step: float) -> tuple[float, ...]:
    step_size, bias_sqrt = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    return lr, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, -step_size, bias_sqrt, eps


def _check(**values: Any) -> None:
    for name, value in values.items():
        if not float(value) >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
