"""What an optimizer's step is taken with: learning rates, gradient scaling, clipping, counts; and steps that are none.

A parameter's state counts its steps, on the host or, for CUDA graphs, on its device: "step" counts every one, "skipped"
those that gradient scaling left out, which the host can't know without waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import is_dtensor, local

Rate = float | Tensor
State = dict[str, Any]


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a weight is NaN or infinite; the message says which."""


@dataclass(frozen=True)
class Scaling:
    """Device scalars, float32 [1], that make the gradient to use of the stored one; None where there is none.

    Attributes:
        grad_scale: torch.amp.GradScaler's: what gradients are divided by.
        found_inf: torch.amp.GradScaler's: when it is not 0, every kernel leaves weights and states alone.
        clip: FusedOptimizer.clip_grad_norm_'s: what gradients are multiplied by after that.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip: Tensor | None = None

    @staticmethod
    def of(optimizer: torch.optim.Optimizer, device: torch.device | None = None) -> Scaling:
        """What was set on this optimizer, on this device if one is named."""
        names = ("grad_scale", "found_inf", "grad_clip")
        values = (_whole(getattr(optimizer, name, None)) for name in names)
        return Scaling(*(v.reshape(1).to(device or v.device) if isinstance(v, Tensor) else None for v in values))


def host_rate(lr: Any) -> float | None:
    """The rate as a number; None for a tensor on another device, which reading would wait for."""
    return None if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def scalars_on(scalars: Sequence[Rate], device: torch.device) -> Tensor:
    """Learning rates or counts of steps as one tensor, without waiting for any device.

    Args:
        scalars: numbers, or scalar tensors on any device.
        device: where they are needed.

    Returns:
        float64 [n].
    """
    known = [host_rate(x) for x in scalars]
    there = [x for x in scalars if isinstance(x, Tensor) and x.device == device]
    if there and all(number is None for number in known) and len(there) == len(scalars):
        if all(x is there[0] for x in there):
            return there[0].double().reshape(1).repeat(len(scalars))
        return torch.stack([x.reshape(()) if x.dim() else x for x in there]).double()
    column = ops.to_device(torch.tensor([number or 0.0 for number in known], dtype=torch.float64, device="cpu"), device)
    for tensor in {id(x): x for x, number in zip(scalars, known, strict=True) if number is None}.values():
        assert isinstance(tensor, Tensor)
        its_own = ops.to_device(torch.tensor([x is tensor for x in scalars], device="cpu"), device)
        column = torch.where(its_own, tensor.to(device, torch.float64), column)
    return column


def begin_on_host(state: State) -> None:
    """Let a state count steps as a number; a torch.optim.SGD checkpoint has none: its first step is over."""
    state["step"] = float(state.get("step", 1))


def begin_on_device(state: State, device: torch.device) -> None:
    """Let a state count steps, and those that are skipped, in scalars on this device, which are written in place."""
    step = state.setdefault("step", 1.0)
    if isinstance(step, Tensor) and step.device == device and "skipped" in state:
        return
    state["step"] = torch.full((), float(step), dtype=torch.float32, device=device)
    state["skipped"] = torch.zeros((), dtype=torch.float32, device=device)


def count_on_host(states: Sequence[State], found_inf: Tensor | None) -> None:
    """Count a step, and on the device whether it is skipped.

    Parameters that took part in the same steps share one tensor of skipped ones; it is replaced, never written to.

    Args:
        states: of the parameters that are stepped together.
        found_inf: float32 [1], not 0 where the step is skipped; None: it is not.
    """
    skips = None if found_inf is None else (found_inf != 0).double().reshape(())
    counters: dict[Tensor | None, Tensor] = {}
    for state in states:
        state["step"] += 1
        if skips is not None:
            before = state.get("skipped")
            if before not in counters:
                counters[before] = skips if before is None else before + skips
            state["skipped"] = counters[before]


def count_on_device(states: Sequence[State], found_inf: Tensor | None) -> None:
    """As `count_on_host`, of states that `begin_on_device` has seen."""
    torch._foreach_add_([state["step"] for state in states], 1)
    if found_inf is not None:
        # With one tensor for all of them torch reads it on the CPU.
        skip = (found_inf != 0).float().reshape(())
        torch._foreach_add_([state["skipped"] for state in states], [skip] * len(states))


def steps_skipped(states: Sequence[State], device: torch.device) -> Tensor | None:
    """How many steps were skipped, float64 [n], or [] where all agree; None: none was. Of states counted on the host.

    Args:
        states: of n parameters.
        device: of the parameters.
    """
    counters = [state.get("skipped") for state in states]
    if all(counter is counters[0] for counter in counters):
        return counters[0]
    none = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([none if counter is None else counter for counter in counters])


def steps_taken(states: Sequence[State], device: torch.device) -> Tensor:
    """Steps that were not skipped, float64 [n]. Of states counted on the device.

    Args:
        states: of n parameters.
        device: of the parameters.
    """
    steps, left_out = ([state[name] for state in states] for name in ("step", "skipped"))
    return scalars_on(steps, device) - scalars_on(left_out, device)


@torch.no_grad()
def is_rehearsal(optimizer: Optimizer) -> bool:
    """Whether this step is taken for the sake of the state alone.

    `torch.distributed.checkpoint.state_dict` steps an optimizer without state with gradients of zero and a learning
    rate of 0, to know what its state will be. Such a step is not one of training. One synchronisation and, with
    several ranks, one collective where the learning rate is 0 and there is no state yet.
    """
    if optimizer.state or any(host_rate(group.get("lr", 1)) != 0 for group in optimizer.param_groups):
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    moved = any(bool(torch.count_nonzero(grad.coalesce().values() if grad.is_sparse else grad)) for grad in grads)
    # A rank whose shards get no gradient must not think otherwise than the others.
    return not Ranks(parameters).any(moved)


def given_tensors(optimizer: Optimizer) -> dict[str, object]:
    """What a step reads that its user sets and writes to, by name: replays read the same memory again."""
    given = {name: getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")}
    return given | {f"lr of group {i}": group["lr"] for i, group in enumerate(optimizer.param_groups)}


def refuse_capture(optimizer: Optimizer) -> None:
    """Raise RuntimeError where a step would become part of a CUDA graph, whose replays would repeat it."""
    if not is_captured(optimizer):
        return
    if getattr(optimizer, "capturable", False):
        raise RuntimeError(
            "a CUDA graph can't hold a step that a Pruner follows by hooks, as over a frozen base: capture forward, "
            "and call step() after the replay"
        )
    raise RuntimeError(
        "a CUDA graph of this step would repeat its learning rate, its count of steps, its masks and its rounding, "
        "which the host decides anew in every step: use PinsAdamW or PinsSGD with capturable=True, or capture "
        "forward and backward, and call step() after the replay"
    )


def is_captured(optimizer: Optimizer) -> bool:
    """Whether this optimizer's step is to become part of a CUDA graph."""
    return any(ops.capturing(p.device) for group in optimizer.param_groups for p in group["params"][:1])


def check_capturable(optimizer: Optimizer) -> None:
    """Raise RuntimeError where replays of a captured step would repeat a number of the host's.

    What else the host decides, a capturable optimizer keeps on the device.
    """
    for group in optimizer.param_groups:
        if group["params"] and host_rate(group["lr"]) is not None:
            raise RuntimeError(
                f"a CUDA graph would repeat the learning rate {float(group['lr'])!r}: make lr a tensor on the "
                "parameters' device, lr=torch.tensor(1e-3, device='cuda'); schedulers of torch write to it in place"
            )


def _whole(value: Any) -> Any:
    """A DTensor's value, summed over the ranks where that is pending; anything else as it is."""
    return value.full_tensor() if is_dtensor(value) else value
