"""The norm of all gradients of an optimizer, for clipping: one read of each, and no wait for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import local_gradient


class GradientNorm:
    """Sums the squares of gradients, and keeps what doesn't change from step to step: layouts, and who holds what."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[int, ...], ops.Layout] = {}
        self._captured: list[ops.Layout] = []  # which CUDA graphs read again
        self._pointers = ops.PointerTables()
        self._ranks: tuple[tuple[int, ...], Ranks] | None = None

    def squared(self, parameters: Sequence[Tensor], owner: str) -> Tensor:
        """The square of the norm of the gradients of these parameters, on all ranks; every rank asks.

        Args:
            parameters: DTensors or plain; those without a gradient count nothing.
            owner: the optimizer's name, for the message of an error.

        Returns:
            float64 [1], on the device of the last gradient.

        Raises:
            RuntimeError: a sparse gradient.
        """
        ranks = self._ranks_of(parameters)
        batches: dict[Any, list[Tensor]] = {}
        for i, p in enumerate(parameters):
            if (grad := local_gradient(p)) is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(f"{owner} does not support sparse gradients")
            # Of replicas one counts; the others keep the same device and dtype, so that every rank sums alike.
            part = grad.contiguous() if ranks.counts(i) else grad.new_empty(0)
            batches.setdefault((grad.device, grad.dtype), []).append(part)
        sums, layouts = [], {}
        for kind, grads in batches.items():
            key = tuple(g.numel() for g in grads)
            layout = layouts[key] = self._layouts.get(key) or ops.Layout.of(grads)
            pointers = self._pointers.of(kind, layout.places, grads)
            sums.append(torch.ops.pins_ext.sum_of_squares(grads, layout.places, layout.chunks, pointers=pointers))
        self._layouts = layouts
        if any(ops.capturing(device) for device, _ in batches):
            self._captured += layouts.values()
        if not sums:
            return ranks.sum(torch.zeros(1, dtype=torch.float64, device="cpu"))
        device = sums[-1].device
        return ranks.sum(torch.stack([s.to(device) for s in sums]).sum(0))

    def _ranks_of(self, parameters: Sequence[Tensor]) -> Ranks:
        """The processes that hold the parameters; asked anew where those are new."""
        key = tuple(id(p) for p in parameters)
        if self._ranks is None or self._ranks[0] != key:
            self._ranks = (key, Ranks(parameters))
        return self._ranks[1]
