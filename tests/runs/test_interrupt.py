"""Signals while training."""

from __future__ import annotations

import signal

import pytest

from pins_ext.runs import interrupt
from pins_ext.runs.errors import StoppedError


@pytest.mark.parametrize("several", [False, True])
def test_a_signal_that_comes_twice_at_once_is_one_of_several_processes(
    several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun forwards what its processes have got already."""
    now = [100.0]
    monkeypatch.setattr(interrupt, "several", lambda: several)
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    stop = interrupt.StopOnSignal()
    stop.training = True
    stop._receive(signal.SIGTERM, None)
    assert stop.received == signal.SIGTERM
    now[0] += 0.1
    if several:
        stop._receive(signal.SIGTERM, None)
        now[0] += 2.0
    with pytest.raises(StoppedError):
        stop._receive(signal.SIGTERM, None)
