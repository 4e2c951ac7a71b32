"""How host data and lists of tensors reach operators within a step: the one way to a device, and few crossings."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext._C import same_items

MANY = 256
"""Tensors of a list that `KeptLists` keeps, at least."""


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured: what is launched on this device now runs in the replays alone."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    with on_device(device):
        return torch.cuda.is_current_stream_capturing()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Within it a GPU is the current one; a CPU is left as it is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to a device without waiting for it.

    Args:
        values: tensor on the host. On a GPU it goes through pinned memory, which torch's allocator keeps until the copy
            has been made.
        device: where it is needed.

    Returns:
        The copy; `values` itself where `device` is the CPU.

    Raises:
        RuntimeError: a CUDA graph is captured: its replays would repeat these values, from memory that is not theirs.
    """
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph is captured, and this step has something to upload: take a step of the same kind before, "
            "with the same hyperparameters, and leave gradients where they are (capture forward and backward before "
            "it, or zero_grad(set_to_none=False))"
        )
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Uploads:
    """Host data that most steps have in common: uploaded when it changes, and otherwise on the device already.

    What a captured step reads is kept for good, as replays read it again.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[object, Tensor]] = {}
        self._captured: dict[int, Tensor] = {}

    def of(self, use: Hashable, key: object, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """The data on a device; not to be written to.

        Args:
            use: what for; one tensor is kept for each, and each device.
            key: what it depends on, compared by value.
            device: where it is needed.
            make: makes it on the host.
        """
        before = self._kept.get((use, device))
        if before is None or before[0] != key:
            before = self._kept[use, device] = key, to_device(make(), device)
        if capturing(device):
            self._captured[id(before[1])] = before[1]
        return before[1]


class PointerTables:
    """The `pointers` arguments of operators that are called again and again with the same lists: tables of addresses.

    States and masks keep their addresses for a whole run, gradients often do: a table is uploaded when an address has
    changed, and otherwise the one on the device serves again.
    """

    def __init__(self) -> None:
        self._uploads = Uploads()

    def of(self, use: Hashable, places: Tensor, *lists: Sequence[Tensor]) -> Tensor | None:
        """The addresses of the lists, int64 [lists, n] on the device of `places`; None where nobody reads them.

        Args:
            use: what for; one table is kept for each.
            places: int64 [n, 14], see Layout.
            lists: n tensors each, or none.
        """
        if not self.read_on(places.device):
            return None
        n = len(places)
        rows = tuple(tuple(x.data_ptr() for x in tensors) if tensors else (0,) * n for tensors in lists)
        return self._uploads.of(
            use, rows, places.device, lambda: torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(lists), n)
        )

    @staticmethod
    def read_on(device: torch.device) -> bool:
        """Whether the operators of a device read such tables."""
        return device.type == "cuda"


class KeptLists:
    """The list arguments of operators that are called again and again with the same lists of CPU tensors.

    A list crosses from Python into an operator tensor by tensor. Of thousands of small tensors that takes longer than
    all arithmetic, so a list that comes a second time with the very same tensors is kept on the operators' side. They
    still ask each tensor for its memory, dtype and size in every call, and check them as those of any list. Kept
    tensors live until another list comes for their use, or as long as this object. A copy of it begins without lists.
    Nothing is kept where modules swap their parameters (torch.__future__.set_swap_module_params_on_conversion): torch
    refuses to swap a tensor that something else holds.
    """

    def __init__(self) -> None:
        self._lists: dict[Hashable, _KeptList] = {}

    def __reduce__(self) -> tuple[type[KeptLists], tuple[()]]:
        return KeptLists, ()

    def of(self, use: Hashable, *lists: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        """What to call an operator with in place of the lists.

        Args:
            use: what for; the last lists of each use are remembered.
            lists: in the same order in every call of a use; short ones, and those of another device, are not kept.

        Returns:
            For each list what `keep_list` made of it, or the list.
        """
        if torch.compiler.is_compiling():
            return lists
        if torch.__future__.get_swap_module_params_on_conversion():
            self._lists.clear()
            return lists
        return tuple(self._of((use, place), tensors) for place, tensors in enumerate(lists))

    def _of(self, use: Hashable, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(tensors) < MANY or not tensors[0].is_cpu:
            self._lists.pop(use, None)
            return tensors
        before = self._lists.get(use)
        if before is None or not before.holds(tensors):
            self._lists[use] = _KeptList(tensors)
            return tensors
        return before.crossing()


class _KeptList:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._crossing: list[Tensor] | None = None

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        return same_items(tensors if isinstance(tensors, list) else list(tensors), self._tensors)

    def crossing(self) -> list[Tensor]:
        if self._crossing is None:
            # What a subclass does with an operator's arguments is its own business.
            plain = all(type(x) in (Tensor, nn.Parameter) and x.is_cpu for x in self._tensors)
            self._crossing = [self._keep()] if plain else self._tensors
        return self._crossing

    def _keep(self) -> Tensor:
        kept = torch.ops.pins_ext.keep_list(self._tensors)
        weakref.finalize(self, torch.ops.pins_ext.forget_list, kept)
        return kept
