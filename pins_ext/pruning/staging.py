"""Tensors on their way between a GPU and the host, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

_ALIGNED = 64
"""Bytes at whose multiples tensors begin in a buffer: a cache line."""

Pair = tuple[Tensor, Tensor]
"""Where to, where from."""


class Copies(Protocol):
    """How tensors get from one device to the other."""

    def memory(self, size: int) -> Tensor:
        """Host memory for copies, uint8 [size]."""

    def start(self, pairs: Sequence[Pair], to_host: bool) -> Callable[[], None]:
        """Begin copies, behind what the device was given to do so far. Returns what waits for them alone."""


class BlockingCopies:
    """Copies that are made when the call returns; of any device."""

    def memory(self, size: int) -> Tensor:
        """See Copies."""
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def start(self, pairs: Sequence[Pair], to_host: bool) -> Callable[[], None]:
        """See Copies."""
        for there, here in pairs:
            there.copy_(here)
        return lambda: None


class StreamCopies:
    """Copies through pinned memory; those to the host run on a stream of their own.

    Args:
        device: of CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def memory(self, size: int) -> Tensor:
        """See Copies."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True, device="cpu")

    def start(self, pairs: Sequence[Pair], to_host: bool) -> Callable[[], None]:
        """See Copies."""
        current = torch.cuda.current_stream(self._device)
        stream = self._stream if to_host else current
        if to_host:
            stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for there, here in pairs:
                there.copy_(here, non_blocking=True)
        done = stream.record_event()

        def wait() -> None:
            done.synchronize()
            # Until then the allocator must not give their memory away, which it does in the order of another stream.
            pairs_alive.clear()

        pairs_alive = list(pairs)
        return wait


class Staging:
    """Two buffers on the host, filled in turns: the operators read one while the other is filled.

    The host waits for a copy before it reads it, and for nothing that the device was given to do later.

    Args:
        copies: how they are made.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._buffers = [copies.memory(0), copies.memory(0)]
        self._sent: Callable[[], None] = lambda: None

    @staticmethod
    def of(device: torch.device) -> Staging:
        """For tensors on this device."""
        return Staging(StreamCopies(device) if device.type == "cuda" else BlockingCopies())

    @property
    def nbytes(self) -> int:
        """Of both buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def read(self, items: Iterable[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
        """Copies of each item's tensors on the host, good until the next item is asked for.

        Args:
            items: tensors on the device; an item is asked for when its copies can begin.
        """
        coming: tuple[list[Tensor], Callable[[], None]] | None = None
        try:
            for place, item in zip(cycle((0, 1)), items):
                ready, coming = coming, self._start(place, item)
                if ready is not None:
                    ready[1]()
                    yield ready[0]
            if coming is not None:
                ready, coming = coming, None
                ready[1]()
                yield ready[0]
        finally:
            if coming is not None:
                coming[1]()

    def _start(self, place: int, item: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        sizes = [-(-x.nbytes // _ALIGNED) * _ALIGNED for x in item]
        if self._buffers[place].numel() < sum(sizes):
            self._buffers[place] = self._copies.memory(sum(sizes))
        parts = self._buffers[place][: sum(sizes)].split(sizes)
        near = [part[: x.nbytes].view(x.dtype).view(x.shape) for part, x in zip(parts, item, strict=True)]
        return near, self._copies.start(list(zip(near, item, strict=True)), to_host=True)

    def near(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host memory of the shapes and dtypes of these, for `send`; not initialized."""
        sizes = [-(-x.nbytes // _ALIGNED) * _ALIGNED for x in tensors]
        parts = self._copies.memory(sum(sizes)).split(sizes)
        return [part[: x.nbytes].view(x.dtype).view(x.shape) for part, x in zip(parts, tensors, strict=True)]

    def send(self, there: Sequence[Tensor], here: Sequence[Tensor]) -> None:
        """Copy to the device, behind what it was given to do so far; what is here must stay until `sent`.

        Args:
            there: on the device; written.
            here: of `near`.
        """
        self._sent = self._copies.start(list(zip(there, here, strict=True)), to_host=False)

    def sent(self) -> None:
        """Wait until the last `send` has read what it copies."""
        self._sent()
