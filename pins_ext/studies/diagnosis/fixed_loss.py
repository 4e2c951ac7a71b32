"""The loss on fixed batches as a function of the prunable weights: values, gradients, changes that leave no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.files import random_state


class FixedLoss:
    """The mean loss of the same batches, without dropout, of a model whose weights are tried out and put back.

    One copy of the prunable weights is kept between `keep` and `undisturbed`'s end; gradients pass through one tensor
    at a time.

    Args:
        model: the model.
        parameters: its prunable parameters, contiguous.
        loss: loss of the model on one batch, a scalar.
        batches: of equal size; what `loss` takes.

    Attributes:
        kept: copies of the parameters that `restore` brings back; empty before `keep`.
        set_aside: inside `undisturbed`, the gradients of training.
        evaluations: forward passes over all batches so far.

    Raises:
        ValueError: no batch.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[Tensor], loss: Callable[[Any], Tensor], batches: Sequence[Any]
    ) -> None:
        if not batches:
            raise ValueError("the loss needs at least one batch to be measured on")
        self.model, self.parameters, self.loss, self.batches = model, list(parameters), loss, list(batches)
        self.kept: list[Tensor] = []
        self.set_aside: list[Tensor | None] = []
        self.evaluations = 0
        self._spacing = 0.0

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Evaluate inside; afterwards training goes on as if nothing had happened.

        Random state, training flags and gradients come back. So do the weights, once `keep` has been called.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.set_aside = [p.grad for p in self.parameters]
        try:
            with random_state.untouched():
                self.model.eval()
                for p in self.parameters:
                    p.grad = None
                yield
        finally:
            if self.kept:
                self.restore()
                self.kept = []
            for p, grad in zip(self.parameters, self.set_aside, strict=True):
                p.grad = grad
            self.set_aside = []
            for module, training in modes:
                module.training = training

    # ---- weights ----------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Take the weights as they are for those that `restore` brings back."""
        self.kept = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the kept weights back, to the last bit."""
        for p, kept in zip(self.parameters, self.kept, strict=True):
            p.copy_(kept)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights with the kept ones, with room for one tensor more."""
        for p, kept in zip(self.parameters, self.kept, strict=True):
            current = p.detach().clone()
            p.copy_(kept)
            kept.copy_(current)

    # ---- the loss ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def value(self) -> float:
        """The loss now: batch losses in the model's precision, their mean in double precision."""
        self.evaluations += 1
        losses = [self.loss(batch) for batch in self.batches]
        self._spacing = max(float(torch.nextafter(x.abs(), x.new_tensor(math.inf)) - x.abs()) for x in losses)
        return sum(map(float, losses)) / len(losses)

    def gradient(self, visit: Callable[[int, Tensor], None]) -> None:
        """Backward through every batch.

        Args:
            visit: called with a parameter's place and a part of its gradient; the gradient is the sum of the parts. A
                parameter that the loss does not depend on gets no call.
        """

        def arrived(i: int) -> Callable[[Tensor], None]:
            def hook(p: Tensor) -> None:
                assert p.grad is not None
                visit(i, p.grad)
                p.grad = None

            return hook

        handles = [p.register_post_accumulate_grad_hook(arrived(i)) for i, p in enumerate(self.parameters)]
        try:
            for batch in self.batches:
                with torch.enable_grad():
                    (self.loss(batch) / len(self.batches)).backward(inputs=self.parameters)
        finally:
            for handle in handles:
                handle.remove()
        self.evaluations += 1

    @torch.no_grad()
    def noise(self, generator: torch.Generator, repeats: int = 4) -> float:
        """Standard deviation of the value from rounding alone (Monte Carlo arithmetic, Parker 1997).

        Each repeat moves every weight that is not zero by one unit in its last place, at random up or down. Repeating
        an unchanged evaluation shows nothing: it comes out the same. Added is the rounding of each batch's loss to the
        numbers its dtype has. The weights must be the kept ones, and are after.
        """
        values = []
        for _ in range(repeats):
            for p in self.parameters:
                up = torch.randint(2, p.shape, generator=generator).to(p.device, p.dtype) * 2 - 1
                p.copy_(torch.where(p == 0, p, torch.nextafter(p, up * torch.inf)))
            values.append(self.value())
            self.restore()
        # Evenly distributed over one spacing of numbers: its standard deviation is 1/sqrt(12) of it.
        last = self._spacing / math.sqrt(12 * len(self.batches))
        return math.hypot(float(torch.tensor(values, dtype=torch.float64).std()), last)
