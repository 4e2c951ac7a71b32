"""SGD in one pass over memory, pruning included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.optim.fused import FusedOptimizer, check_not_negative
from pins_ext.optim.step import host_rate, scalars_on, steps_skipped, steps_taken


class PinsSGD(FusedOptimizer):
    """SGD with momentum, dampening, weight decay and Nesterov, in one pass, with room for importance and a mask.

    In float32 the weights equal those of torch.optim.SGD(foreach=False) on a CPU with FMA to the last bit. A buffer
    begins with the first step that its group takes with momentum; steps that gradient scaling skips don't count.
    bfloat16 weights and their buffers are rounded stochastically, see PinsAdamW; float16 ones to nearest.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: decay of the buffer.
        dampening: share of a gradient that does not enter the buffer.
        weight_decay: L2 penalty.
        nesterov: look ahead along the buffer.
        capturable: see PinsAdamW.

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
        capturable: bool = False,
    ) -> None:
        self.capturable = capturable
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"nesterov": nesterov})

    def _refuse_unsupported(self, group: dict[str, Any]) -> None:
        super()._refuse_unsupported(group)
        check_not_negative(group, "lr", "momentum", "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _storage(self, p: Tensor, moment: str) -> torch.dtype:
        return p.dtype

    def _hyper_on_device(self, parameters: list[Tensor], owners: list[dict[str, Any]]) -> Tensor:
        rows = tuple(
            (0.0, g["weight_decay"], g["momentum"], 1 - g["dampening"], 1.0, float(g["nesterov"]), 0.0, 0.0)
            for g in owners
        )
        device, use = parameters[0].device, id(parameters[0])
        table = self._uploads.of(
            ("hyper", use), rows, device, lambda: torch.tensor(rows, dtype=torch.float32, device="cpu")
        )
        hyper = table.clone()
        hyper[:, 0] = scalars_on([g["lr"] for g in owners], device)
        hyper[:, 6] = -hyper[:, 0]
        if self._moments(owners[0]):
            hyper[:, 4] = steps_taken([self.state[p] for p in parameters], device) <= 1
        return hyper

    def _hyper(self, parameters: list[Tensor], owners: list[dict[str, Any]]) -> Tensor:
        if self.capturable:
            return self._hyper_on_device(parameters, owners)
        states, device = [self.state[p] for p in parameters], parameters[0].device
        steps = [state.get("step", 0.0) for state in states]
        rows = []
        for step, g in zip(steps, owners, strict=True):
            lr, momentum, first = host_rate(g["lr"]) or 0.0, g["momentum"], float(step <= 1)
            rows.append((lr, g["weight_decay"], momentum, 1 - g["dampening"], first, float(g["nesterov"]), -lr, 0.0))
        skipped = steps_skipped(states, device)
        hyper = ops.to_device(torch.tensor(rows, dtype=torch.float32, device="cpu"), device)
        if any(host_rate(g["lr"]) is None for g in owners):
            hyper[:, 0] = scalars_on([g["lr"] for g in owners], device)
            hyper[:, 6] = -hyper[:, 0]
        if skipped is not None:
            hyper[:, 4] = ops.to_device(torch.tensor(steps, dtype=torch.float64, device="cpu"), device) - skipped <= 1
        return hyper

    @property
    def _name(self) -> str:
        return "sgd"

    def _operands(self, moments: dict[str, list[Tensor]]) -> tuple[list[Tensor], ...]:
        return (moments.get("momentum_buffer", []),)
