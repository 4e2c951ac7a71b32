"""Other processes on the machine: how much of the CPU they use while we measure, and waiting until they don't."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

QUIET = 0.05
"""Share of the machine's CPU time up to which a measurement counts as undisturbed."""

_STAT = Path("/proc/stat")
_IDLE_FIELDS = (3, 4)
_GUEST = 8
# The system counts the time of all processes in ticks of 10 ms per CPU.
_TICKS_SECONDS = 0.03


class Neighbours:
    """Watches over a measurement on the CPU; a GPU's own work they do not touch.

    Args:
        device: of the measurement.
        wait: seconds in all for waiting and for repeating what was disturbed.
    """

    def __init__(self, device: torch.device, wait: float = 0.0) -> None:
        self.watching = device.type == "cpu" and _STAT.exists()
        self.left = wait if self.watching else 0.0
        self._theirs = self._capacity = 0.0
        self._mark = (0.0, 0.0, 0.0)

    @property
    def share(self) -> float | None:
        """Their share of the machine's CPU time during the samples that were kept; None where nobody watched."""
        return self._theirs / self._capacity if self._capacity else None

    @property
    def disturbance(self) -> float | None:
        """Their share, where it was enough to disturb."""
        return self.share if _disturbs(self._theirs, self._capacity) else None

    def wait_for_quiet(self, pause: float = 0.5) -> None:
        """Return once they have been quiet for `pause` seconds, or when the waiting time is used up."""
        while self.left > 0:
            self.begin()
            time.sleep(pause)
            theirs, capacity, elapsed = self._since_mark()
            self.left -= elapsed
            if not _disturbs(theirs, capacity):
                return

    def begin(self) -> None:
        """Samples are about to be taken."""
        if self.watching:
            self._mark = _now()

    def keep(self) -> bool:
        """Whether the samples since `begin` count: nobody disturbed them, or there is no time left to repeat them."""
        if not self.watching:
            return True
        theirs, capacity, elapsed = self._since_mark()
        if self.left > 0 and _disturbs(theirs, capacity):
            self.left -= elapsed
            return False
        self._theirs += theirs
        self._capacity += capacity
        return True

    def _since_mark(self) -> tuple[float, float, float]:
        wall, busy, own = (now - then for now, then in zip(_now(), self._mark, strict=True))
        return max(0.0, busy - own), wall * (os.cpu_count() or 1), wall


def _disturbs(theirs: float, capacity: float) -> bool:
    return theirs > QUIET * capacity + _TICKS_SECONDS


def _now() -> tuple[float, float, float]:
    """Seconds: of the wall clock, of CPU time of all processes, of our own."""
    ticks = [int(x) for x in _STAT.read_text().partition("\n")[0].split()[1:]]
    # Guests are counted under user time already.
    busy = sum(t for i, t in enumerate(ticks[:_GUEST]) if i not in _IDLE_FIELDS) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system
