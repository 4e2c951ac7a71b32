"""What goes into the layers whose weights are pruned: norms of their input features, collected by forward hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LINEAR, _CONV1D = 0, 1
"""The dimension of a weight that counts outputs: nn.Linear has [outputs, features], Conv1D [features, outputs]."""


def output_dims(model: nn.Module, parameters: Mapping[str, Tensor], purpose: str) -> list[int]:
    """The dimension of each weight along which the layer's outputs lie.

    Args:
        model: the model.
        parameters: weights by name.
        purpose: what needs to know, for the message of the error.

    Raises:
        ValueError: a weight that is not one of nn.Linear or transformers' Conv1D.
    """
    kinds = {id(m.weight): dim for m in model.modules() if (dim := _output_dim(m)) is not None}
    for name, p in parameters.items():
        if id(p) not in kinds:
            raise ValueError(
                f"{purpose} needs to know which weights make one output, and {name} is no weight of nn.Linear or "
                f"transformers' Conv1D: exclude it, or use another criterion and scope"
            )
    return [kinds[id(p)] for p in parameters.values()]


def _output_dim(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return _LINEAR
    return _CONV1D if type(module).__name__ == "Conv1D" else None


class InputNorms:
    """The 2-norm of every input feature of some layers, over all tokens that go in while it is attached.

    Args:
        model: the model.
        parameters: weights of its nn.Linear and Conv1D modules by name; one may belong to several modules.

    Attributes:
        tokens: bool [batch, length] of the batch under way, False where it is padding, which then counts for nothing;
            None: every position counts.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.tokens: Tensor | None = None
        self._names = {id(p): name for name, p in parameters.items()}
        self._squares: dict[str, Tensor] = {}
        self._handles: list[Any] = [
            module.register_forward_pre_hook(self._take, with_kwargs=True)
            for module in model.modules()
            if _output_dim(module) is not None and id(module.weight) in self._names
        ]

    @torch.no_grad()
    def _take(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if self.tokens is not None and x.shape[:-1] == self.tokens.shape:
            x = x.masked_fill(~self.tokens[..., None], 0)
        squares = x.reshape(-1, x.shape[-1]).float().square().sum(0, dtype=torch.float64)
        name = self._names[id(module.weight)]
        self._squares[name] = self._squares[name] + squares if name in self._squares else squares

    def norm(self, name: str) -> Tensor:
        """The norms of a weight's input features, float32 [features].

        Raises:
            RuntimeError: its layer was given nothing, or something that is not finite.
        """
        if name not in self._squares:
            raise RuntimeError(f"the layer of {name} was given no input in any batch: use more batches, or exclude it")
        norm = self._squares[name].sqrt().float()
        if not bool(torch.isfinite(norm).all()):
            raise RuntimeError(f"the inputs of {name}'s layer are not finite: calibrate in another dtype")
        return norm

    def detach(self) -> None:
        """Let go of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
