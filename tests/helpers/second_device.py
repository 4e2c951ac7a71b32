"""A device apart from the CPU, on any machine: its operators run on the CPU, and what mixes the two devices raises.

Importing it makes the device known to the whole process: use it in a process of its own. What torch.utils has to make a
backend of Python code is experimental, which is why nothing but tests stands on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_NAME = "second"
_CROSSING = (torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten._copy_from)
_READS = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
)
_UNSET = object()

_setup_privateuseone_for_python_backend(_NAME)
DEVICE = torch.device(_NAME, 0)

READ: list[str] = []
"""Operators that brought something from the device to the CPU: a GPU's host would wait there."""


class Far(Tensor):
    """A tensor of the device: one of the CPU that only operators of the device touch."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Far:
        far = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        far.inner = inner
        return far

    @classmethod
    def __torch_dispatch__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(f, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = Far(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    # What a tensor without memory of its own lacks.

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        READ.append("tolist")
        return self.inner.tolist()

    def __getitem__(self, at: Any) -> Tensor:
        return super().__getitem__(Far(torch.tensor(at)) if isinstance(at, list) else at)

    def __setitem__(self, at: Any, value: Any) -> None:
        self.inner[tree_map_only(Far, _inner, at)] = _inner(value) if isinstance(value, Far) else value


def _inner(x: Far) -> Tensor:
    return x.inner


def _run(f: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given: list[Tensor] = []
    tree_map_only(Tensor, given.append, (args, kwargs))
    far = [x for x in given if isinstance(x, Far)]
    near = [x for x in given if not isinstance(x, Far) and x.dim()]
    if far and near and f.overloadpacket not in _CROSSING:
        raise RuntimeError(f"{f} of tensors on two devices: {[tuple(x.shape) for x in near]} are on the CPU")
    device = kwargs.get("device", _UNSET)
    to_far = bool(far) if device in (_UNSET, None) else torch.device(device).type == _NAME
    if device not in (_UNSET, None):
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    args, kwargs = tree_map_only(Far, _inner, (args, kwargs))
    leaves = f.overloadpacket in _CROSSING and not (to_far and isinstance(given[0], Far))
    if far and (leaves or f.overloadpacket in _READS):
        READ.append(str(f))
    with _disable_current_modes():
        found = f(*args, **kwargs)
    known = {id(x.inner): x for x in far} | {id(x): x for x in given}

    def wrapped(x: Tensor) -> Tensor:
        if id(x) in known:
            return known[id(x)]
        return Far(x) if to_far else x

    return tree_map_only(Tensor, wrapped, found)


_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(lambda f, *args, **kwargs: _run(f, args, kwargs), "PrivateUse1")
