"""What memory there is, and how much a call takes beside its operands."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from types import TracebackType

import torch

_PROC = Path("/proc/self")


def available(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * units.get(text[-1:], 1))
    return max(sizes) or 32 << 20


class Peak:
    """The most memory in use within the block, above what was in use at its start, in `bytes`.

    CUDA: of torch's allocator. CPU: resident pages; the kernel's high-water mark is reset first, where it allows that,
    and the allocator's free pages are handed back, so that reused ones count as well.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            (_PROC / "clear_refs").write_text("5")
            self._before = _kilobytes(_PROC / "status", "VmRSS") * 1024
        except OSError:
            # A process that may not reset its mark: what the call adds to it is a lower bound.
            self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self.bytes = max(0, resource_peak() - self._before)


def resource_peak() -> int:
    """The process's high-water mark of resident memory, in bytes."""
    try:
        return _kilobytes(_PROC / "status", "VmHWM") * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kilobytes(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise OSError(f"{file} does not tell {name}")
