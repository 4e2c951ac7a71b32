"""The importance states of the pruned weights: window mean, running averages, and the score they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pins_ext import ops, reference
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.scopes import subset

_ACCUMULATE, _FOLD = 0, 1


@dataclass(frozen=True)
class Scaling:
    """Device scalars, float32 [1], that a gradient scaler leaves on an optimizer; None where there is none.

    A set `found_inf` makes every kernel leave weights and states alone.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @staticmethod
    def of(optimizer: torch.optim.Optimizer) -> Scaling:
        """What torch.amp.GradScaler set on this optimizer for the step under way."""
        values = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        return Scaling(*(v.reshape(1) if isinstance(v, Tensor) else None for v in values))


class Importance:
    """States of n tensors, one tensor each of the parameter's shape, and the operators that advance them.

    Attributes:
        ipt: mean of the instant scores of the window under way (movement: their sum); empty for magnitude.
        exp_avg_ipt, exp_avg_unc: running averages of importance and of its uncertainty; empty where unused.
        shadow: last unmasked value of every weight, for criteria that vanish at zero under strict masks; else empty.
        parts: tensors that are stepped, and by a gradient scaler skipped, together.
        accepted: per part, float32 [1]: gradients in this window so far.
        seen: bool [1], whether any step has brought a gradient that was not skipped.
        folded: bool [1], whether a window with such a step has ended; before that every average is zero.
    """

    def __init__(
        self, parameters: Sequence[Tensor], config: PruneConfig, layout: ops.Layout, parts: Sequence[Sequence[int]]
    ) -> None:
        self.config, self.layout = config, layout
        self.parameters = list(parameters)
        device = layout.places.device

        def states(wanted: bool) -> list[Tensor]:
            return [torch.zeros(p.shape, dtype=config.dtype, device=device) for p in parameters] if wanted else []

        self.ipt = states(config.criterion != "magnitude")
        self.exp_avg_ipt = states(config.smoothed)
        self.exp_avg_unc = states(config.smoothed and 0 < config.beta2 < 1)
        self.shadow = [p.detach().clone() for p in parameters] if config.needs_shadow else []
        self.parts = [(tuple(part), subset(layout, self.parameters, part)) for part in parts]
        self.accepted = [torch.zeros(1, device=device) for _ in parts]
        self.seen = torch.zeros(1, dtype=torch.bool, device=device)
        self.folded = torch.zeros_like(self.seen)

    @property
    def criterion(self) -> str:
        """Name the kernels know: a user's function arrives as precomputed scores."""
        return "precomputed" if callable(self.config.criterion) else self.config.criterion

    @property
    def scored_before_step(self) -> bool:
        """Whether the score at a step is known before its gradient: the mask can then ride on the optimizer's pass."""
        if self.config.smoothed:
            return self.config.beta2 != 0
        return self.config.criterion == "magnitude"

    @property
    def constant_in_window(self) -> bool:
        """Whether the score changes only when a window ends."""
        return self.config.smoothed and self.config.beta2 != 0

    @property
    def known(self) -> Tensor:
        """Bool [1], where the states are: whether the score tells weights apart; until then it is zero everywhere."""
        if self.config.criterion == "magnitude":
            return torch.ones_like(self.seen)
        return self.folded if self.config.smoothed else self.seen

    def score(self) -> tuple[str, list[Tensor], list[Tensor]]:
        """Kind and operands of the score that the selection reads: ops.SCORES, a, b."""
        if self.config.criterion == "magnitude":
            return "magnitude", self.shadow or self.parameters, []
        if self.config.criterion == "movement":
            return "identity", self.ipt, []
        if self.config.beta2 == 1:
            return "identity", self.exp_avg_ipt, []
        if self.config.beta2 == 0:
            return "deviation", self.exp_avg_ipt, self.ipt
        return "product", self.exp_avg_ipt, self.exp_avg_unc

    def accumulate(
        self,
        indices: Sequence[int],
        layout: ops.Layout,
        grads: list[Tensor],
        lr: Tensor,
        part: int,
        step: int,
        scaling: Scaling,
    ) -> None:
        """Take the gradients of one step into the window.

        Args:
            indices: which tensors. layout: theirs. grads: gradients, in the same order, dtype of the parameters.
            lr: float32 [len(indices)], learning rate of the coming step per tensor.
            part: which one they belong to. step: pruner step. scaling: gradient scaling under way.
        """
        weights = [(self.shadow or self.parameters)[i] for i in indices]
        if callable(self.config.criterion):
            grads = [self._own_score(*x, scaling) for x in zip(weights, grads, lr.tolist(), strict=True)]
            weights, scaling = [], Scaling(None, scaling.found_inf)
        torch.ops.pins_ext.accumulate_(
            [self.ipt[i] for i in indices],
            weights,
            grads,
            layout.places,
            layout.chunks,
            lr,
            self.accepted[part],
            self.rng(step, _ACCUMULATE),
            self.criterion,
            grad_scale=scaling.grad_scale,
            found_inf=scaling.found_inf,
        )

    def _own_score(self, p: Tensor, g: Tensor, lr: float, scaling: Scaling) -> Tensor:
        assert callable(self.config.criterion)
        g = g.float() if scaling.grad_scale is None else g.float() / scaling.grad_scale
        c = self.config.criterion(p.float(), g, lr)
        if not isinstance(c, Tensor) or c.shape != p.shape:
            got = tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__
            raise ValueError(f"a criterion must return one score per weight, shape {tuple(p.shape)}; got {got}")
        return c.float().contiguous()

    def count_accepted(self, part: int, scaling: Scaling, given: bool) -> None:
        """One more gradient in a part's window, unless it was not finite; `given`: any weight had one of its own."""
        accepted = self.accepted[part]
        finite = torch.ones_like(accepted) if scaling.found_inf is None else (scaling.found_inf == 0).to(accepted.dtype)
        accepted += finite
        if given:
            self.seen |= finite > 0

    def fold(self, step: int, bracket: Tensor | None = None, counts: Tensor | None = None) -> None:
        """End the window: advance the averages, and count their new scores against `bracket` in the same pass.

        `bracket` and `counts` need all weights in one part.
        """
        for (indices, layout), accepted in zip(self.parts, self.accepted, strict=True):
            torch.ops.pins_ext.fold_(
                [self.exp_avg_ipt[i] for i in indices],
                [self.exp_avg_unc[i] for i in indices] if self.exp_avg_unc else [],
                [self.ipt[i] for i in indices],
                layout.places,
                layout.chunks,
                accepted,
                self.rng(step, _FOLD),
                self.config.beta1,
                self.config.beta2,
                bracket=bracket,
                counts=counts,
            )
            accepted.zero_()
        self.folded |= self.seen

    def rng(self, step: int, stream: int = _ACCUMULATE) -> Tensor:
        """Keys of the stochastic rounding of one step, int64 [2]."""
        return torch.tensor(reference.rounding_key(self.config.seed, step, stream)).to(self.layout.places.device)

    def tensors(self) -> dict[str, list[Tensor]]:
        """The states by name, those that exist."""
        lists = {n: getattr(self, n) for n in ("ipt", "exp_avg_ipt", "exp_avg_unc", "shadow")}
        return {name: tensors for name, tensors in lists.items() if tensors}
