"""Training that stops at the first loss, gradient or weight that is NaN or infinite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pins_ext.optim.step import NonFiniteError


class FiniteWatch:
    """Looks at the loss and the gradient norm of every step.

    On a CPU at once, so that the weights are still those of the step before. A GPU would have to be waited for: there
    the numbers of one step are read in the next one, and before anything is saved.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[str, int, Tensor]] = []

    def look(self, name: str, step: int, value: Tensor | float) -> None:
        """Take a number in.

        Args:
            name: what it is, for the message.
            step: the optimizer step under way, from 1.
            value: one number.

        Raises:
            NonFiniteError: it is not finite, or, on a GPU, one of an earlier step was not.
        """
        value = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
        if value.is_cuda:
            earlier = [each for each in self._pending if each[1] < step]
            self._pending = [each for each in self._pending if each[1] >= step]
            # The caller's buffer may be reused by then.
            self._pending.append((name, step, value.clone()))
            _refuse(earlier)
        else:
            _refuse([(name, step, value)])

    def settle(self) -> None:
        """Read what has not been read yet.

        Raises:
            NonFiniteError: one of the numbers is not finite.
        """
        pending, self._pending = self._pending, []
        _refuse(pending)


def check_weights(model: nn.Module, step: int) -> None:
    """Refuse a model that must not be saved.

    Args:
        model: its parameters are read.
        step: optimizer steps made so far, for the message.

    Raises:
        NonFiniteError: a parameter holds NaN or infinity.
    """
    odd = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if odd:
        more = f" and {len(odd) - 1} other parameters" if len(odd) > 1 else ""
        raise NonFiniteError(f"{odd[0]}{more} held NaN or infinite weights after step {step}")


def _refuse(numbers: list[tuple[str, int, Tensor]]) -> None:
    for name, step, value in numbers:
        if not bool(torch.isfinite(value)):
            raise NonFiniteError(f"the {name} was {value.item():g} at step {step}")
