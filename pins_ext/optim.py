"""AdamW and SGD whose one pass over memory can also take importance and a mask: drop-ins for torch.optim's.

On their own they are ordinary optimizers. A `Pruner` that finds one drives its step instead of following it by hooks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pins_ext import ops

if TYPE_CHECKING:
    from pins_ext.pruning.pruner import Pruner


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
        device = layout.places.device
        unused = torch.zeros(2, dtype=torch.int64, device=device)
        return FusedPruning(layout, [], [], [], torch.zeros(1, device=device), unused, "pins", False)


class FusedOptimizer(Optimizer):
    """Base of the two: which tensors take which pass, gradient scaling, and the pruner that may drive the step.

    Raises:
        ValueError: a parameter group, given or loaded, asks for something of torch.optim's that is not there.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        # torch.amp.GradScaler then leaves grad_scale and found_inf on the optimizer and always calls step.
        self._step_supports_amp_scaling = True
        self.pruner: Pruner | None = None
        self._slot: Any = None
        self._plain: dict[tuple[int, ...], FusedPruning] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's. Raises ValueError for an unsupported option."""
        super().add_param_group(param_group)
        try:
            self._refuse_unsupported(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _refuse_unsupported(self, group: dict[str, Any]) -> None:
        for option in ("amsgrad", "maximize", "differentiable"):
            if group.get(option):
                name = type(self).__name__
                raise ValueError(f"{name} has no {option}: set it to False in the parameter group or use torch.optim's")

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict ends here too: a refused checkpoint changes nothing.
        for group in state["param_groups"]:
            self._refuse_unsupported(group)
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        for name in ("pruner", "_slot"):
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
        if self.pruner is not None:
            self.pruner.begin(self._slot)
            self._step_pruned(self.pruner)
        self._step_plain()
        if self.pruner is not None:
            self.pruner.end(self._slot)
        return loss

    def _step_pruned(self, pruner: Pruner) -> None:
        group_of = dict(zip(self._slot.indices, self._slot.group_of, strict=True))
        batches: dict[tuple[str, ...], list[int]] = {}
        for i, group in group_of.items():
            if pruner.parameters[i].grad is not None:
                batches.setdefault(self._moments(self.param_groups[group]), []).append(i)
        for with_grad in batches.values():
            owners = [self.param_groups[group_of[i]] for i in with_grad]
            self._run([pruner.parameters[i] for i in with_grad], owners, pruner.fused_pruning(self._slot, with_grad))
        pruner.fused_without_grad(self._slot, [i for i in self._slot.indices if pruner.parameters[i].grad is None])

    def _step_plain(self) -> None:
        pruned = {id(self.pruner.parameters[i]) for i in self._slot.indices} if self.pruner is not None else set()
        batches: dict[Any, tuple[list[Tensor], list[dict[str, Any]]]] = {}
        for group in self.param_groups:
            moments = self._moments(group)
            for p in group["params"]:
                if p.grad is not None and id(p) not in pruned:
                    parameters, owners = batches.setdefault((p.device, p.dtype, moments), ([], []))
                    parameters.append(p)
                    owners.append(group)
        live = {}
        for parameters, owners in batches.values():
            key = tuple(id(p) for p in parameters)
            live[key] = self._plain.get(key) or FusedPruning.none(ops.Layout.of(parameters))
            self._run(parameters, owners, live[key])
        self._plain = live

    def _run(self, parameters: list[Tensor], owners: list[dict[str, Any]], pruning: FusedPruning) -> None:
        """Check tensors, count the step, run the kernel; the owners agree on their moments."""
        name, device = type(self).__name__, parameters[0].device
        grads = []
        for p in parameters:
            assert p.grad is not None
            if not p.is_contiguous():
                raise ValueError(f"{name} needs contiguous parameters, got strides {p.stride()}")
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"{name} does not support sparse gradients")
            grads.append(p.grad.contiguous())
        scalars = {key: getattr(self, key, None) for key in ("grad_scale", "found_inf")}
        scaling = {key: s.reshape(1).to(device) if isinstance(s, Tensor) else None for key, s in scalars.items()}
        names = self._moments(owners[0])
        if names:
            for p in parameters:
                self._initialise(p, names)
            self._count(parameters, scaling["found_inf"])
        moments = {key: [self.state[p][key] for p in parameters] for key in names}
        self._kernel(parameters, moments, grads, self._hyper(parameters, owners), pruning, scaling)
        # Custom operators don't: a backward through weights saved before this step must fail, as with any optimizer.
        torch.autograd.graph.increment_version(parameters)

    def _initialise(self, p: Tensor, names: tuple[str, ...]) -> None:
        """State of a parameter at the first step that needs its moments."""
        state = self.state[p]
        if state.get(names[0]) is None:  # they come together
            state.pop("skipped", None)
            state.update({"step": 0.0, **{name: torch.zeros_like(p) for name in names}})
        # A torch.optim.SGD checkpoint has buffers and no step: its first step is over.
        state["step"] = float(state.get("step", 1))

    def _count(self, parameters: list[Tensor], found_inf: Tensor | None) -> None:
        """Count a step of these parameters, and on their device whether the kernel skips it.

        Leaving a skipped step out of the host's count would need a synchronisation. Parameters that took part in the
        same steps share one counter; it is replaced, never written to.
        """
        skips = None if found_inf is None else (found_inf != 0).double().reshape(())
        counters: dict[Tensor | None, Tensor] = {}
        for p in parameters:
            state = self.state[p]
            state["step"] += 1
            if skips is not None:
                before = state.get("skipped")
                if before not in counters:
                    counters[before] = skips if before is None else before + skips
                state["skipped"] = counters[before]

    def _skipped(self, parameters: list[Tensor]) -> Tensor | None:
        """How many of each parameter's steps were skipped, float64 [n], or [] where they agree; None: none was."""
        counters = [self.state[p].get("skipped") for p in parameters]
        if all(counter is counters[0] for counter in counters):
            return counters[0]
        none = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        return torch.stack([none if counter is None else counter for counter in counters])

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's of the same name, and loadable by it."""
        packed = super().state_dict()
        exported = {key: _exported(state) for key, state in packed["state"].items()}
        packed["state"] = {key: state for key, state in exported.items() if state}
        return packed

    @abstractmethod
    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors that a step of this group needs."""

    @abstractmethod
    def _hyper(self, parameters: list[Tensor], owners: list[dict[str, Any]]) -> Tensor:
        """The `hyper` argument, float32 [n, 8], every column computed in float64 and rounded once."""

    @abstractmethod
    def _kernel(
        self,
        parameters: list[Tensor],
        moments: dict[str, list[Tensor]],
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

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _hyper(self, parameters: list[Tensor], owners: list[dict[str, Any]]) -> Tensor:
        factors = [
            (float(group["lr"]), group["weight_decay"], *group["betas"], group["eps"], self.state[p]["step"])
            for p, group in zip(parameters, owners, strict=True)
        ]
        device, skipped = parameters[0].device, self._skipped(parameters)
        if skipped is None:
            rows = {f: _adamw_row(*f) for f in set(factors)}
            return torch.tensor([rows[f] for f in factors]).to(device, non_blocking=True)
        table = torch.tensor(factors, dtype=torch.float64).to(device, non_blocking=True)
        lr, decay, beta1, beta2, eps, step = table.unbind(1)
        step = (step - skipped).clamp(min=1)
        step_size, bias_sqrt = lr / (1 - beta1**step), (1 - beta2**step).sqrt()
        columns = [lr, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, -step_size, bias_sqrt, eps]
        return torch.stack(columns, 1).float()

    def _kernel(
        self,
        parameters: list[Tensor],
        moments: dict[str, list[Tensor]],
        grads: list[Tensor],
        hyper: Tensor,
        pruning: FusedPruning,
        scaling: dict[str, Tensor | None],
    ) -> None:
        torch.ops.pins_ext.masked_adamw_(
            parameters,
            moments["exp_avg"],
            moments["exp_avg_sq"],
            pruning.ipt,
            pruning.shadow,
            grads,
            pruning.masks,
            pruning.layout.places,
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

    In float32 the weights equal those of torch.optim.SGD(foreach=False) on a CPU with FMA to the last bit. A buffer
    begins with the first step that its group takes with momentum; steps that gradient scaling skips don't count.

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

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _hyper(self, parameters: list[Tensor], owners: list[dict[str, Any]]) -> Tensor:
        steps = [self.state[p].get("step", 0.0) for p in parameters]
        rows = []
        for step, g in zip(steps, owners, strict=True):
            lr, momentum, first = float(g["lr"]), g["momentum"], float(step <= 1)
            rows.append((lr, g["weight_decay"], momentum, 1 - g["dampening"], first, float(g["nesterov"]), -lr, 0.0))
        device, skipped = parameters[0].device, self._skipped(parameters)
        hyper = torch.tensor(rows).to(device, non_blocking=True)
        if skipped is not None:
            hyper[:, 4] = torch.tensor(steps, dtype=torch.float64).to(device, non_blocking=True) - skipped <= 1
        return hyper

    def _kernel(
        self,
        parameters: list[Tensor],
        moments: dict[str, list[Tensor]],
        grads: list[Tensor],
        hyper: Tensor,
        pruning: FusedPruning,
        scaling: dict[str, Tensor | None],
    ) -> None:
        torch.ops.pins_ext.masked_sgd_(
            parameters,
            moments.get("momentum_buffer", []),
            pruning.ipt,
            pruning.shadow,
            grads,
            pruning.masks,
            pruning.layout.places,
            pruning.layout.chunks,
            hyper,
            pruning.accepted,
            pruning.rng,
            pruning.criterion,
            pruning.clear_state,
            **scaling,
        )


def _exported(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as torch.optim writes it: without its skipped steps, and none if there was no other."""
    if "step" not in state:
        return state
    step = float(state["step"]) - float(state.get("skipped", 0))
    moments = {name: value for name, value in state.items() if name not in ("step", "skipped")}
    return {"step": torch.tensor(step), **moments} if step > 0 else {}


def _adamw_row(lr: float, decay: float, beta1: float, beta2: float, eps: float, step: float) -> tuple[float, ...]:
    step_size, bias_sqrt = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    return lr, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, -step_size, bias_sqrt, eps


def _check(**values: Any) -> None:
    for name, value in values.items():
        if not float(value) >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
