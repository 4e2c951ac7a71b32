"""AdamW's two moments as a source of scores: what criteria that keep no window of their own read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from pins_ext import ops
from pins_ext.distributed.shards import is_dtensor, local, shard_of
from pins_ext.optim.step import scalars_on
from pins_ext.pruning.config import PruneConfig

_KINDS = ("exp_avg", "exp_avg_sq")


class Moments(NamedTuple):
    """The moments of the pruned tensors as they stand before a step.

    Attributes:
        exp_avg: first moment of this rank's parts, a tensor for each parameter; zeros where one was never stepped.
        exp_avg_sq: second moment, likewise.
        factors: float32 [n, 3]: learning rate of the coming step, 1 / (1 - beta1^t), 1 / (1 - beta2^t), with t the
            steps of that parameter.
    """

    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    factors: Tensor


def reader(
    config: PruneConfig,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    owned: Sequence[tuple[Optimizer, Sequence[int]]],
) -> Callable[[], Moments]:
    """What reads the moments of the pruned tensors.

    Args:
        config: with the criterion.
        names: of the pruned tensors.
        parameters: the pruned tensors.
        owned: each optimizer and the places of its tensors.

    Raises:
        ValueError: an optimizer that keeps no moments at all, such as SGD: every score would be 0.
    """
    if config.rule.reads_moments:
        for optimizer, indices in owned:
            _refuse_stateless(config.rule.name, optimizer, {id(parameters[i]): names[i] for i in indices})
    owners = {i: optimizer for optimizer, indices in owned for i in indices}
    in_order = [owners[i] for i in range(len(names))]
    return partial(read_moments, config.rule.name, names, parameters, in_order, ops.Uploads())


def _refuse_stateless(criterion: str, optimizer: Optimizer, names: Mapping[int, str]) -> None:
    # Before a first step there is no state to look at.
    without = (p for group in optimizer.param_groups if "betas" not in group for p in group["params"])
    if name := next((names[id(p)] for p in without if id(p) in names), None):
        raise ValueError(
            f"criterion={criterion!r} reads AdamW's moments, and {type(optimizer).__name__}, which steps {name}, has "
            "none: use PinsAdamW or torch.optim.AdamW, or another criterion"
        )


def read_moments(
    criterion: str,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    owners: Sequence[Optimizer],
    uploads: ops.Uploads,
) -> Moments:
    """Find the moments, without waiting for a device that counts steps itself.

    Args:
        criterion: for the message of an error.
        names: of the pruned tensors.
        parameters: the pruned tensors.
        owners: the optimizer of each.
        uploads: keeps what most steps have in common.

    Raises:
        ValueError: an optimizer whose state is not a plain exp_avg and exp_avg_sq of the parameter's shape.
    """
    groups: dict[int, dict[str, Any]] = {}
    for optimizer in {id(o): o for o in owners}.values():
        groups |= {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    stored = (optimizer.state.get(p) for p, optimizer in zip(parameters, owners, strict=True))
    known: dict[str, Any] = next((state for state in stored if state and set(_KINDS) <= set(state)), {})
    rows: list[tuple[Any, ...]] = []
    betas: list[tuple[float, float]] = []
    for name, p, optimizer in zip(names, parameters, owners, strict=True):
        check_moments(criterion, name, p, optimizer)
        state, group = optimizer.state.get(p, {}), groups.get(id(p), {})
        for moment, kind in zip(found, _KINDS, strict=True):
            if state:
                moment.append(local(state[kind]))
            else:
                moment.append(ops.new_state(local(p), known[kind].dtype if known else p.dtype, shard_of(name, p)))
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        betas.append((beta1, beta2))
        rows.append((group.get("lr", 0.0), state.get("step", 0.0), state.get("skipped", 0.0)))
    device = parameters[0].device
    lr, step, skipped = (scalars_on(column, device) for column in zip(*rows, strict=True))
    table = uploads.of("betas", betas, device, lambda: torch.tensor(betas, dtype=torch.float64, device="cpu"))
    beta1, beta2 = table.unbind(1)
    taken = (step - skipped).clamp(min=1)
    factors = torch.stack([lr, 1 / (1 - beta1**taken), 1 / (1 - beta2**taken)], 1)
    return Moments(*found, factors.float())


def check_moments(criterion: str, name: str, p: Tensor, optimizer: Optimizer) -> None:
    """Raise ValueError for a parameter whose optimizer has a state, but no plain moments in it; see `read_moments`."""
    state = optimizer.state.get(p)
    if not state:
        return
    for kind in _KINDS:
        moment = state.get(kind)
        alike = isinstance(moment, Tensor) and is_dtensor(moment) == is_dtensor(p) and type(local(moment)) is Tensor
        plain = alike and moment.shape == p.shape and moment.is_floating_point()
        if not plain and not (alike and ops.is_coded(moment, p.shape)):
            got = "none" if moment is None else f"a {type(moment).__name__} of shape {tuple(moment.shape)}"
            raise ValueError(
                f"criterion={criterion!r} reads AdamW's moments, a plain {kind} of the parameter's shape "
                f"{tuple(p.shape)}; {type(optimizer).__name__} has {got} for {name}: use PinsAdamW or torch.optim.AdamW"
            )
