"""The one way by which host data reaches the device within a step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to a device without waiting for it.

    Args:
        values: tensor on the host. On a GPU it goes through pinned memory, which torch's allocator keeps until the copy
            has been made.
        device: where it is needed.

    Returns:
        The copy; `values` itself where `device` is the CPU.
    """
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class PointerTables:
    """The `pointers` arguments of operators that are called again and again with the same lists: tables of addresses.

    States and masks keep their addresses for a whole run, gradients often do: a table is uploaded when an address has
    changed, and otherwise the one on the device serves again.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[tuple[tuple[int, ...], ...], Tensor]] = {}

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
        before = self._kept.get(use)
        if before is not None and before[0] == rows:
            return before[1]
        if places.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # the operator says why it can't go on
        table = to_device(torch.tensor(rows, dtype=torch.int64).view(len(lists), n), places.device)
        self._kept[use] = rows, table
        return table

    @staticmethod
    def read_on(device: torch.device) -> bool:
        """Whether the operators of a device read such tables."""
        return device.type == "cuda"
