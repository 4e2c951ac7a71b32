"""AdamW in one pass over memory, pruning included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.optim.bias_corrections import bias_corrections, check_betas
from pins_ext.optim.fused import FusedOptimizer, check_not_negative
from pins_ext.optim.step import host_rate, scalars_on, steps_skipped, steps_taken
from pins_ext.storage import STORAGES

MOMENT_DTYPES = dict(zip(STORAGES, (torch.float32, torch.bfloat16, torch.int8), strict=True))
"""How PinsAdamW can store its moments; the second one, which has no sign, is uint8 in 8 bits."""


class PinsAdamW(FusedOptimizer):
    """AdamW (Loshchilov & Hutter 2019) in one pass, with room for importance and a mask.

    In float32 the weights equal those of torch.optim.AdamW(fused=True) on a CPU with AVX2 or AVX-512 to the last bit,
    except in a tensor's last, partial vector, where torch leaves out the fused multiply-add. Against the unfused path
    they differ by an ulp of the square root per step: torch takes it from MKL, which does not round it correctly there.
    In 16 bits each step is computed in float32 and rounded once. bfloat16 weights are rounded stochastically: rounding
    to nearest, as torch.optim's does, drops every update below 2^-9 of its weight, and so stops learning at the rates
    that fine-tuning takes. float16 weights are rounded to nearest.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, as a share of the learning rate.
        moment_dtype: storage of both moments, whatever that of the weights: "float32", or "bfloat16" with stochastic
            rounding, half of its memory, or "8bit": a byte each, rounded stochastically,
            and a scale for every 32 weights. A loaded state is converted to it.
        capturable: count steps on the parameters' device, so that a CUDA graph can hold a step, see `StepGraphs`;
            to the same bits. Then lr must be a tensor on that device; other hyperparameters are those of the capture.

    Raises:
        ValueError: a hyperparameter out of range; with capturable, betas beyond 0.99999.
    """

    moment_dtype: str = "float32"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        moment_dtype: str = "float32",
        capturable: bool = False,
    ) -> None:
        if moment_dtype not in MOMENT_DTYPES:
            raise ValueError(f"moment_dtype must be one of {', '.join(MOMENT_DTYPES)}; got {moment_dtype!r}")
        self.moment_dtype, self.capturable = moment_dtype, capturable
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _refuse_unsupported(self, group: dict[str, Any]) -> None:
        super()._refuse_unsupported(group)
        check_not_negative(group, "lr", "eps", "weight_decay")
        if "betas" not in group:
            raise ValueError("a parameter group has no betas: it is that of another optimizer")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
        if self.capturable:
            check_betas(group["betas"])

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _storage(self, p: Tensor, moment: str) -> torch.dtype:
        if self.moment_dtype == "8bit" and moment == "exp_avg_sq":
            return torch.uint8
        return MOMENT_DTYPES[self.moment_dtype]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"moment_dtype": self.moment_dtype}

    def _hyper_on_device(self, parameters: list[Tensor], owners: list[dict[str, Any]]) -> Tensor:
        device, use = parameters[0].device, id(parameters[0])
        rows = tuple((g["weight_decay"], *g["betas"], g["eps"]) for g in owners)
        table = self._uploads.of(
            ("hyper", use), rows, device, lambda: torch.tensor(rows, dtype=torch.float64, device="cpu")
        )
        decay, beta1, beta2, eps = table.unbind(1)
        taken = steps_taken([self.state[p] for p in parameters], device).clamp(min=1)
        first, second = (
            bias_corrections([g["betas"][i] for g in owners], taken, self._uploads, (i, use)) for i in (0, 1)
        )
        lr = scalars_on([g["lr"] for g in owners], device)
        columns = [lr, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, -(lr / first), second.sqrt(), eps]
        return torch.stack(columns, 1).float()

    def _hyper(self, parameters: list[Tensor], owners: list[dict[str, Any]]) -> Tensor:
        if self.capturable:
            return self._hyper_on_device(parameters, owners)
        groups = {id(group): group for group in owners}
        rates = {key: host_rate(group["lr"]) for key, group in groups.items()}
        of_groups = {
            key: (rates[key] or 0.0, group["weight_decay"], *group["betas"], group["eps"])
            for key, group in groups.items()
        }
        states, device = [self.state[p] for p in parameters], parameters[0].device
        steps = [state["step"] for state in states]
        skipped = steps_skipped(states, device)
        if skipped is None and all(rate is not None for rate in rates.values()):
            # Few rows differ, of thousands that torch would read number by number.
            uses = [(id(group), step) for group, step in zip(owners, steps, strict=True)]
            places = {use: i for i, use in enumerate(dict.fromkeys(uses))}
            rows = torch.tensor(
                [_adamw_row(*(*of_groups[key], step)) for key, step in places], dtype=torch.float32, device="cpu"
            )
            return ops.to_device(rows[torch.tensor([places[use] for use in uses], device="cpu")], device)
        factors = [(*of_groups[id(group)], step) for group, step in zip(owners, steps, strict=True)]
        table = ops.to_device(torch.tensor(factors, dtype=torch.float64, device="cpu"), device)
        _, decay, beta1, beta2, eps, step = table.unbind(1)
        lr = scalars_on([group["lr"] for group in owners], device)
        if skipped is not None:
            step = (step - skipped).clamp(min=1)
        step_size, bias_sqrt = lr / (1 - beta1**step), (1 - beta2**step).sqrt()
        columns = [lr, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, -step_size, bias_sqrt, eps]
        return torch.stack(columns, 1).float()

    @property
    def _name(self) -> str:
        return "adamw"

    def _operands(self, moments: dict[str, list[Tensor]]) -> tuple[list[Tensor], ...]:
        return (moments["exp_avg"], moments["exp_avg_sq"])


def _adamw_row(lr: float, decay: float, beta1: float, beta2: float, eps: float, step: float) -> tuple[float, ...]:
    step_size, bias_sqrt = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    return lr, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, -step_size, bias_sqrt, eps
