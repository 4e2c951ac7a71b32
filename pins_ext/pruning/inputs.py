"""What goes into the layers whose weights are pruned: norms of their input features, collected by forward hooks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pins_ext.pruning.plan import ConflictWarning

_UNREACHED = 1e-30
"""The norm of what goes into an expert that no token reached: its weights compete by magnitude, below all others."""


def output_dims(model: nn.Module, parameters: Mapping[str, Tensor], purpose: str) -> list[int]:
    """The dimension of each weight along which the layer's outputs lie.

    nn.Linear has [outputs, features], Conv1D [features, outputs]; transformers' experts the same behind a dimension of
    experts, transposed or not.

    Args:
        model: the model.
        parameters: weights by name.
        purpose: what needs to know, for the message of the error.

    Raises:
        ValueError: a weight that is of none of these.
    """
    dims = {id(weight): dim for module in model.modules() for weight, dim in _weights(module)}
    for name, p in parameters.items():
        if id(p) not in dims:
            raise ValueError(
                f"{purpose} needs to know which weights make one output, and {name} is no weight of nn.Linear, "
                f"transformers' Conv1D or its experts: exclude it, or use another criterion and scope"
            )
    return [dims[id(p)] for p in parameters.values()]


def _weights(module: Any) -> list[tuple[Tensor, int]]:
    """The matrices of a layer, each with the dimension of its outputs."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return [(module.weight, 0 if isinstance(module, nn.Linear) else 1)]
    if _is_experts(module):
        dim = 2 if module.is_transposed else 1
        return [(_first(module), dim), (module.down_proj, dim)]
    return []


def _is_experts(module: Any) -> bool:
    """Whether it holds the experts of a block as its library's own implementations of them read it (transformers 5)."""
    told = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj"))
    return told and module.down_proj.dim() == 3


def _first(experts: Any) -> Tensor:
    """The matrices of all experts that read the block's hidden states."""
    weight: Tensor = experts.gate_up_proj if experts.has_gate else experts.up_proj
    return weight


class InputNorms:
    """The 2-norm of every input feature of some layers, over all tokens that go in while it is attached.

    Args:
        model: the model.
        parameters: weights of its nn.Linear, Conv1D and experts modules by name; one may belong to several modules.

    Attributes:
        tokens: bool [batch, length] of the batch under way, False where it is padding, which then counts for nothing;
            None: every position counts.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.tokens: Tensor | None = None
        self._names = {id(p): name for name, p in parameters.items()}
        self._squares: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        for module in model.modules():
            if any(id(weight) in self._names for weight, _ in _weights(module)):
                take = self._take_experts if _is_experts(module) else self._take
                self._handles.append(module.register_forward_pre_hook(take, with_kwargs=True))

    @torch.no_grad()
    def _take(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if self.tokens is not None and x.shape[:-1] == self.tokens.shape:
            x = x.masked_fill(~self.tokens[..., None], 0)
        self._add(module.weight, _squares(x))

    @torch.no_grad()
    def _take_experts(self, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hidden states [tokens, features] and, for each, the experts that it goes to [tokens, k]."""
        x, ids = (*args, *kwargs.values())[:2]
        x, ids = x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1])
        if self.tokens is not None and len(x) == self.tokens.numel():
            kept = self.tokens.reshape(-1)
            x, ids = x[kept], ids[kept]
        into_first = x.new_zeros(experts.num_experts, x.shape[1], dtype=torch.float64)
        into_down = x.new_zeros(experts.num_experts, _features(experts), dtype=torch.float64)
        for expert in ids.unique().tolist():
            if expert < experts.num_experts:  # beyond is what goes to none
                reached = x[(ids == expert).any(1)]
                into_first[expert] = _squares(reached)
                if id(experts.down_proj) in self._names:
                    into_down[expert] = _squares(_hidden(experts, expert, reached))
        self._add(_first(experts), into_first)
        self._add(experts.down_proj, into_down)

    def _add(self, weight: Tensor, squares: Tensor) -> None:
        if id(weight) in self._names:
            name = self._names[id(weight)]
            self._squares[name] = self._squares[name] + squares if name in self._squares else squares

    def norm(self, name: str) -> Tensor:
        """The norms of a weight's input features, float32 [features], or [experts, features].

        Raises:
            RuntimeError: its layer was given nothing, or something that is not finite.
        """
        squares = self._squares.get(name)
        if squares is None or (squares.dim() == 2 and not bool(squares.any())):
            raise RuntimeError(
                f"the layer of {name} was given no input in any batch: use more batches, or exclude it, as where "
                "another module reads its weight and does not call it"
            )
        norm = squares.sqrt().float()
        if not bool(torch.isfinite(norm).all()):
            raise RuntimeError(f"the inputs of {name}'s layer are not finite: calibrate in another dtype")
        if norm.dim() == 2:
            unreached = ~norm.any(1)
            norm[unreached] = _UNREACHED
        return norm

    def warn_of_unreached(self) -> None:
        """Warn of experts that no token reached."""
        counts = {name: int((~squares.any(1)).sum()) for name, squares in self._squares.items() if squares.dim() == 2}
        unreached = {name: count for name, count in counts.items() if count}
        if unreached:
            name, most = max(unreached.items(), key=lambda each: each[1])
            warnings.warn(
                f"no token reached some experts in {len(unreached)} tensors, up to {most} of "
                f"{len(self._squares[name])} in {name}: theirs are compared by magnitude; more batches reach more",
                ConflictWarning,
                stacklevel=5,
            )

    def detach(self) -> None:
        """Let go of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _squares(x: Tensor) -> Tensor:
    """Sum of squares of each feature, float64 [features]."""
    return x.reshape(-1, x.shape[-1]).float().square().sum(0, dtype=torch.float64)


def _features(experts: Any) -> int:
    """Input features of an expert's second matrix."""
    return int(experts.down_proj.shape[1 if experts.is_transposed else 2])


def _hidden(experts: Any, expert: int, x: Tensor) -> Tensor:
    """What goes into an expert's second matrix [tokens, features], as its library computes it."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weight = _first(experts)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    hidden = F.linear(x, weight.t() if experts.is_transposed else weight, bias)
    result: Tensor = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    return result
