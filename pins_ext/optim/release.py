"""Gradient release: each parameter is stepped inside backward as soon as its gradient is there, which is freed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.shards import is_dtensor
from pins_ext.hooks import weakly
from pins_ext.optim.listener import Batch, PruningArguments, StepListener
from pins_ext.optim.rounding import Alike
from pins_ext.optim.step import NonFiniteError, Scaling

Clip = Literal["previous", "tensor"]

PREVIOUS = "released_square_sum"
"""In the first parameter group: float64 [1], the squared norm of the last step's gradients; part of the state_dict."""


class Stepper(Protocol):
    """An optimizer that can step a parameter alone: FusedOptimizer."""

    param_groups: list[dict[str, Any]]
    listener: StepListener | None

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]: ...

    def rounds(self, parameters: Sequence[Tensor]) -> bool: ...

    def kind_of(self, p: Tensor, group: dict[str, Any]) -> Hashable: ...

    def alike(self, kind: Hashable) -> Alike: ...

    def _run(self, batch: Batch, pruning: PruningArguments, released: Scaling | None = None) -> None: ...


class GradientRelease:
    """Takes the steps of an optimizer apart, into one for each parameter; see FusedOptimizer.release_gradients.

    Args:
        optimizer: whose parameters are followed, those that it has by now.
        max_norm: largest norm that gradients keep; None: they are not clipped.
        clip: by which norm.
    """

    def __init__(self, optimizer: Stepper, max_norm: float | None, clip: Clip) -> None:
        self._optimizer, self._max_norm, self._clip = optimizer, max_norm, clip
        self._layouts: dict[int, ops.Layout] = {}
        self._plain: dict[int, PruningArguments] = {}
        self._alike: dict[Hashable, Alike] = {}
        for p in self._groups_in_order():
            self._refuse(p)
        hook = torch.compiler.disable(weakly(self._hook))
        self._handles: list[Any] = [
            p.register_post_accumulate_grad_hook(hook) for p in self._groups_in_order() if p.requires_grad
        ]
        self.reset()

    def reset(self) -> None:
        """No step is under way: a backward that an exception has ended is forgotten."""
        self._begun = False
        self._came: set[int] = set()
        self._groups: dict[int, dict[str, Any]] = {}
        self._factor: Tensor | None = None
        self._squares: list[Tensor] = []
        self._skips: list[Tensor] = []
        self._keys: dict[Hashable, Tensor] = {}

    def detach(self) -> None:
        """Let go of the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- inside backward --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _hook(self, p: Tensor) -> None:
        optimizer = self._optimizer
        if not self._begun:
            self._begin(p)
        if id(p) in self._came:
            raise RuntimeError(
                f"a gradient of shape {tuple(p.shape)} came twice before optimizer.step(), and the first one has been "
                "used: with released gradients there is one backward a step, without accumulation and without "
                "reentrant activation checkpointing (use_reentrant=False)"
            )
        self._came.add(id(p))
        listener = optimizer.listener
        pruned = listener is not None and listener.place_of(p) is not None
        batch = Batch(id(p), [p], [self._groups[id(p)]])
        pruning = listener.arguments(batch) if pruned and listener is not None else self._no_pruning(p)
        optimizer._run(batch, pruning, self._scaling(p))
        p.grad = None

    def _begin(self, p: Tensor) -> None:
        """Everything that a step settles before its gradients are used."""
        self._refuse(p)
        optimizer = self._optimizer
        self._groups = {id(q): group for group in optimizer.param_groups for q in group["params"]}
        before = optimizer.param_groups[0].get(PREVIOUS)
        if self._max_norm is not None and self._clip == "previous" and before is not None:
            self._factor = ops.clip_factor(_on(before, p.device), self._max_norm)[1]
        if optimizer.listener is not None:
            optimizer.listener.check_release()
            optimizer.listener.begin_step()
        self._begun = True

    def _refuse(self, p: Tensor) -> None:
        distributed = torch.distributed
        if is_dtensor(p) or (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        ):
            raise RuntimeError(
                "released gradients are used before DistributedDataParallel or FSDP has reduced them over the ranks: "
                "train in one process, or without release_gradients"
            )

    def _no_pruning(self, p: Tensor) -> PruningArguments:
        """Arguments of a parameter that is not pruned; random bits are those of an ordinary step's pass."""
        optimizer = self._optimizer
        kind = optimizer.kind_of(p, self._groups[id(p)])
        if kind not in self._alike:
            self._alike[kind] = optimizer.alike(kind)
        alike = self._alike[kind]
        if id(p) not in self._plain:
            self._plain[id(p)] = PruningArguments.none(alike.layout([p]))
        if not optimizer.rounds([p]):
            return self._plain[id(p)]
        if kind not in self._keys:  # before any of this kind has counted the step
            self._keys[kind] = alike.keys(optimizer.state)
        return replace(self._plain[id(p)], rng=self._keys[kind])

    def _groups_in_order(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _layout(self, p: Tensor) -> ops.Layout:
        if id(p) not in self._layouts:
            self._layouts[id(p)] = ops.Layout.of([p])
        return self._layouts[id(p)]

    def _scaling(self, p: Tensor) -> Scaling:
        """The factor that clips this gradient, and whether it is not finite: then the tensor is left alone."""
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise RuntimeError(f"{type(self._optimizer).__name__} does not support sparse gradients")
        layout = self._layout(p)
        square_sum = ops.sum_of_squares([grad.contiguous()], layout.places, layout.chunks)
        skip = (~torch.isfinite(square_sum)).float()
        self._skips.append(skip)
        self._squares.append(square_sum)
        factor = self._factor
        if self._max_norm is not None and self._clip == "tensor":
            factor = ops.clip_factor(square_sum, self._max_norm)[1]
        return Scaling(found_inf=skip, clip=None if factor is None else _on(factor, grad.device))

    # ---- at optimizer.step ------------------------------------------------------------------------------------------

    def end(self) -> None:
        """All gradients are used: end the step that the first of them began. One synchronisation.

        Raises:
            RuntimeError: one was not finite, was scaled, or did not come through backward.
        """
        optimizer, begun = self._optimizer, self._begun
        try:
            self._check_all_came()
            if not begun:
                self._begin(optimizer.param_groups[0]["params"][0])
            if optimizer.listener is not None:
                optimizer.listener.end_pass()
            if self._squares:
                device = self._squares[-1].device
                if bool(torch.stack([_on(skip, device) for skip in self._skips]).any()):
                    raise NonFiniteError(
                        "a gradient is not finite: its tensor has not moved, others of this step have, as their "
                        "gradients were used before it came. Start again from the last checkpoint, with a lower "
                        "learning rate or other data"
                    )
                total = torch.stack([_on(s, device) for s in self._squares]).sum(0)
                if self._max_norm is not None and self._clip == "previous":
                    optimizer.param_groups[0][PREVIOUS] = total
            if optimizer.listener is not None:
                optimizer.listener.end_step()
        finally:
            self.reset()

    def _check_all_came(self) -> None:
        optimizer = self._optimizer
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "a GradScaler unscales gradients after backward, and released gradients have been used by then: the "
                "weights have moved by scaled ones. Train in bfloat16, or without release_gradients"
            )
        left = [p for p in self._groups_in_order() if p.grad is not None]
        if left:
            raise RuntimeError(
                f"a gradient of shape {tuple(left[0].shape)} was not released: its parameter joined the optimizer, or "
                "was replaced, after release_gradients(): call it again, with the model as it is trained"
            )


def _on(value: Tensor, device: torch.device) -> Tensor:
    """The value where it is needed: parameters may live on several devices, a checkpoint's norm on the host."""
    return value.to(device)
