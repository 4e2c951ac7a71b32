"""state_device="cpu": statistics on the host, the bits of those on the device.

Without a GPU, on a device whose operators are the CPU's and which raises where tensors of the two meet.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from state_device_job import CASES, QUICK
from torch import Tensor, nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.staging import Pair, Staging, StreamCopies

OTHERS = tuple(name for name in CASES if name not in QUICK)
HELPERS = Path(__file__).parents[1] / "helpers"


@cache
def outcomes(device: str, names: tuple[str, ...]) -> dict[str, str]:
    """What went wrong in each case; all of them run in one process."""
    job = [sys.executable, str(HELPERS / "state_device_job.py"), device, *names]
    ran = subprocess.run(job, capture_output=True, text=True, check=False, cwd=HELPERS)
    found = dict(json.loads(line) for line in ran.stdout.splitlines())
    assert len(found) == len(names), ran.stderr[-3000:]
    return found


@pytest.mark.parametrize("device", ["second", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", QUICK)
def test_the_bits_of_states_beside_the_weights(device: str, name: str) -> None:
    found = outcomes(device, QUICK)
    assert not found[name], found[name]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["second", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", OTHERS)
def test_the_bits_of_other_configurations(device: str, name: str) -> None:
    found = outcomes(device, OTHERS)
    assert not found[name], found[name]


class LateCopies:
    """Copies that are made at the last moment, when they are waited for; until then the memory is full of ones.

    Attributes:
        open: copies that nobody has waited for.
    """

    def __init__(self) -> None:
        self.open = 0

    def memory(self, size: int) -> Tensor:
        return torch.full((size,), 255, dtype=torch.uint8)

    def start(self, pairs: Sequence[Pair], to_host: bool) -> Callable[[], None]:
        for there, _ in pairs:
            there.reshape(-1).view(torch.uint8).fill_(255)
        waiting = list(pairs)
        self.open += 1

        def wait() -> None:
            self.open -= bool(waiting)
            while waiting:
                there, here = waiting.pop()
                there.copy_(here)

        return wait


def test_each_item_is_read_when_its_copies_are_there() -> None:
    """And, however early copies begin, stays as it is until the next one is asked for."""
    copies = LateCopies()
    staging = Staging(copies)
    sizes = [(3,), (5, 7), (), (0,), (64,), (1000,), (2,)]
    items = [[torch.randn(size), torch.randn(size).bfloat16()] for size in sizes]
    for _ in range(2):
        most = 0
        for item, found in zip(items, staging.read(iter(items)), strict=True):
            assert all(map(torch.equal, item, found))
            most = max(most, copies.open)
        assert most == 1  # the next one is on its way
        assert not copies.open
    assert staging.nbytes <= 2 * sum(-(-x.nbytes // 64) * 64 for x in items[5])


def test_an_item_that_fails_leaves_no_copy_under_way() -> None:
    copies = LateCopies()

    def items() -> Iterator[list[Tensor]]:
        yield [torch.ones(3)]
        yield [torch.ones(4)]
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        for _ in Staging(copies).read(items()):
            pass
    assert not copies.open


def test_what_is_sent_is_not_written_before_it_was_read() -> None:
    copies = LateCopies()
    staging = Staging(copies)
    there = [torch.zeros(5, dtype=torch.uint8)]
    here = staging.near(there)
    here[0].fill_(7)
    staging.send(there, here)
    staging.sent()
    here[0].fill_(9)
    assert there[0].tolist() == [7] * 5


class Stream:
    """A stream that notes what it is asked for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> Stream:
        self.log.append(f"{self.name} records")
        return self

    def synchronize(self) -> None:
        self.log.append(f"the host waits for {self.name}")


def test_copies_on_a_stream_come_behind_what_the_device_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls, with streams that do nothing; on a GPU the cases above run."""
    log: list[str] = []
    current, made = Stream("current", log), Stream("side", log)

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(StreamCopies, "memory", lambda self, size: torch.empty(size, dtype=torch.uint8))
    staging = Staging.of(torch.device("cuda", 0))
    items = [[torch.randn(3)], [torch.randn(5, 2)]]
    assert all(torch.equal(x, y) for (x,), (y,) in zip(items, staging.read(items), strict=True))
    begins = ["side waits for current", "on side", "side records"]
    assert log == [*begins, *begins, "the host waits for side", "the host waits for side"]
    log.clear()
    staging.send([torch.zeros(4)], [torch.ones(4)])
    assert log == ["on current", "current records"]
    staging.sent()
    assert log[2:] == ["the host waits for current"]


def test_weights_on_the_cpu_have_their_states_beside_them() -> None:
    """Where both are there is nothing to copy: one pass over memory stays one."""
    ends = []
    for where in (None, "cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        optimizer = PinsAdamW(model.parameters(), lr=1e-2)
        config = PruneConfig(delta_t=1, warmup=2, cooldown=2, state_device=where)
        pruner = Pruner(model, optimizer, config, 8)
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.randn(4, 16)).square().mean().backward()
            optimizer.step()
        assert not pruner.importance.on_host
        assert pruner.slots[0].one_pass
        assert pruner.plan()["host_bytes"] == 0
        pruner.finalize()
        ends.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("wrong", ["cuda", "", 5, ["cpu"]])
def test_another_device_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="state_device must be one of cpu; got"):
        PruneConfig(state_device=wrong)  # type: ignore[arg-type]


def test_one_shot_pruning_has_no_states_to_move() -> None:
    with pytest.raises(ValueError, match=r"state_device: one-shot pruning"):
        PruneConfig(state_device="cpu").check_once()
