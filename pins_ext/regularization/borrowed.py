"""A teacher of a model that is cut over ranks: FSDP 2 copies no modules, so the model itself holds its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.distributed import states
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import forget_gathered, is_dtensor, local

_KIND = "teacher/"


class Borrowed(nn.Module):
    """This rank's parts of a model's weights and buffers at some moment, and the model that answers with them.

    While it answers, in eval mode, the two change places, one tensor at a time. Every rank asks at the same time.

    Args:
        model: of FSDP 2 or tensor parallelism.
        tensors: whole weights and buffers by name, to begin with; None: the model's, as they are now.

    Attributes:
        parts: this rank's, by name.
        model: see above.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        # Not as a module of this one.
        self._model = (model,)
        self._ranks: Ranks | None = None
        self.parts = {name: part.clone() for name, part in parts_of(model).items()}
        if tensors is not None:
            for name, part in self.cut(tensors).items():
                self.parts[name].copy_(part)

    @property
    def model(self) -> nn.Module:
        """See the class."""
        return self._model[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs with these weights."""
        with _exchanged(parts_of(self.model), self.parts), _evaluating(self.model):
            try:
                return self.model(*args, **kwargs)
            finally:
                forget_gathered(self.model)

    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of whole tensors, by name; one of another shape than the model's as it is."""
        sharded = self._sharded()
        whole = {_KIND + name: tensor for name, tensor in tensors.items()}
        return _named(states.parts(whole, list(sharded), list(sharded.values())))

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors put together from all ranks' parts, by name; every rank calls it and gets all of them."""
        sharded, found = self._sharded(), {_KIND + name: part for name, part in parts.items()}
        return _named(states.whole(found, list(sharded), list(sharded.values()), self.ranks))

    @property
    def ranks(self) -> Ranks:
        """Those that the model is cut over."""
        if self._ranks is None:
            self._ranks = Ranks(list(self._sharded().values()))
        return self._ranks

    def _sharded(self) -> dict[str, Tensor]:
        forget_gathered(self.model)
        return {name: p for name, p in self.model.named_parameters() if is_dtensor(p)}


def parts_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once: of those that are cut over ranks this rank's part."""
    if isinstance(module, Borrowed):
        return module.parts
    # What is gathered is no part.
    forget_gathered(module)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: local(tensor) for name, tensor in tensors.items()}


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_KIND): tensor for name, tensor in tensors.items()}


@contextmanager
def _exchanged(model: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> Iterator[None]:
    """With the model's values in the parts and theirs in the model."""
    # Under .data: a backward pass may still need the values, which will be there again.
    pairs = [(model[name].data, part) for name, part in parts.items()]
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for a, b in pairs:
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """With all modules in eval mode, and no cache of keys and values that nobody asks for."""
    training = [module for module in model.modules() if module.training]
    config: Any = getattr(model, "config", None)
    caches = getattr(config, "use_cache", False)
    model.eval()
    if caches:
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if caches:
            config.use_cache = True
