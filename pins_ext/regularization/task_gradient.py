"""Gradient of the task loss alone, beside the joint gradient that trains the model: a second backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pins_ext.wrappers import is_sharded, named_parameters


class TaskGradient:
    """Gathers d(task) / d(parameter) while the caller's own backward runs, and hands it over in the units of p.grad.

    The caller does nothing for it. When backward reaches the loss, the upstream gradient brings every factor that the
    loss was multiplied by (loss scale, accumulation), and a backward of the task loss with that same factor is summed
    here. What happens to p.grad afterwards (unscaling, clipping by norm) is one common factor f. It is found from a
    witness w, the last trainable parameter that the loss reaches, whose gradient W is looked at when backward has made
    it, from this loss and whatever others the caller adds.

        f = <W, w.grad> / <W, W>

    Clipping by value, or by groups, is no common factor and is not followed.

    Args:
        model: the model that is trained, on one device or inside DistributedDataParallel.

    Attributes:
        names: gather for these parameters only; None for every trainable one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: frozenset[str] | None = None
        self._sums: dict[str, Tensor] = {}
        self._witness: dict[str, Tensor] = {}  # by name, its gradient as backward left it
        self._follows: tuple[str, nn.Parameter, RemovableHandle] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the witness has no hook.
        return {**self.__dict__, "_witness": {}, "_follows": None}

    def refuse_sharded(self) -> None:
        """Raise RuntimeError unless the parameters are whole and on one device."""
        sharded = is_sharded(self.model)
        devices = {p.device for p in self.model.parameters()}
        if sharded or len(devices) > 1:
            what = "sharded" if sharded else f"on {len(devices)} devices"
            raise RuntimeError(
                f"score_gradient='task' needs whole parameters on one device (or DistributedDataParallel), but they "
                f"are {what}: use score_gradient='joint'"
            )

    def watch(self, task: Tensor, total: Tensor) -> Tensor:
        """Args: the task loss and the joint loss of a batch, scalars. Returns: the joint loss to call backward on."""

        def gather(upstream: Tensor) -> None:
            trainable = self._trainable()
            if all(p.grad is None for p in trainable.values()):
                # Gradients were zeroed: a new step begins.
                self.clear()
            _add_gradient(self._sums, task, self.tracked(), upstream)
            if self._follows is None or trainable.get(self._follows[0]) is not self._follows[1]:
                self._choose_witness(trainable, total, upstream)

        # The hook sits on a node of its own: gathering passes through `total` and must not meet it again.
        watched = total.clone()
        if watched.requires_grad:
            watched.register_hook(gather)
        return watched

    def _choose_witness(self, trainable: dict[str, nn.Parameter], total: Tensor, upstream: Tensor) -> None:
        if self._follows is not None:
            self._follows[2].remove()
            self._follows = None
        for name, p in reversed(trainable.items()):
            if torch.autograd.grad(total, [p], upstream, retain_graph=True, allow_unused=True)[0] is not None:
                # In this backward already: it has not come to the parameters yet.
                handle = p.register_post_accumulate_grad_hook(partial(_keep, self._witness, name))
                self._follows = (name, p, handle)
                return

    @torch.no_grad()
    def take(self) -> dict[str, Tensor] | None:
        """Hand over what was gathered since the last call, and forget it. Every rank of a process group must call.

        Returns:
            Gradients by parameter name, in the dtype and the present units of p.grad; None when there was no backward.
            A parameter that the task loss does not reach is missing.
        """
        sums, witness = dict(self._sums), dict(self._witness)
        self.clear()
        if not sums:
            return None
        if dist.is_available() and dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
            # A parameter may be unused on one rank only; the sums must line up.
            sums = {name: sums.get(name, torch.zeros_like(p)) for name, p in self.tracked().items()}
            gathered = [*sums.values(), *witness.values()]
            for gradient in gathered:
                dist.all_reduce(gradient)
            torch._foreach_div_(gathered, ranks)
        for name, before in witness.items():
            grad = self.model.get_parameter(name).grad
            if grad is not None:
                norm = before.float().square().sum()
                factor = (before.float() * grad.float()).sum() / norm
                torch._foreach_mul_(list(sums.values()), torch.where(norm > 0, factor, 1.0))
        return sums

    def detach(self) -> None:
        """Let go of the witness, which the next backward chooses anew; what was gathered is there to be taken."""
        if self._follows is not None:
            self._follows[2].remove()
            self._follows = None

    def clear(self) -> None:
        """Forget what was gathered."""
        self._sums.clear()
        self._witness.clear()

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in named_parameters(self.model) if p.requires_grad}

    def tracked(self) -> dict[str, nn.Parameter]:
        """The parameters that are gathered, by name."""
        return {name: p for name, p in self._trainable().items() if self.names is None or name in self.names}


@torch.no_grad()
def _keep(witness: dict[str, Tensor], name: str, p: Tensor) -> None:
    if p.grad is not None:
        witness[name] = p.grad.clone()


def _add_gradient(sums: dict[str, Tensor], loss: Tensor, parameters: dict[str, nn.Parameter], upstream: Tensor) -> None:
    if not parameters:
        return
    gradients = torch.autograd.grad(loss, list(parameters.values()), upstream, retain_graph=True, allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if name in sums:
            sums[name] += gradient
        else:
            # autograd may hand out a tensor that somebody else holds, too.
            sums[name] = gradient.clone()
