"""How a case is timed: same process, interleaved with copy and read bandwidth, medians with their spread.

CPU: wall time of each call, at least five rounds. CUDA: events, twenty warm-ups, fifty rounds. A case that fails, does
not fit into memory or would take too long is recorded with the reason, never left out silently.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pins_ext.contention import Neighbours

from . import memory

_BLOCK_SECONDS = 0.5


@dataclass(frozen=True)
class Streams:
    """What a kernel moves: whole tensors of the weights' size.

    Attributes:
        written: dtypes of what is updated in place.
        read: dtypes of what is only read.
    """

    written: tuple[torch.dtype, ...] = ()
    read: tuple[torch.dtype, ...] = ()

    @property
    def name(self) -> str:
        """Name of the case that measures the floor."""
        return f"floor: {_sizes(self.written)} in place, {_sizes(self.read)} read"

    @property
    def bytes_per_weight(self) -> int:
        """Counted once for reading and once for writing."""
        return sum(2 * d.itemsize for d in self.written) + sum(d.itemsize for d in self.read)


def _sizes(dtypes: Sequence[torch.dtype]) -> str:
    return "+".join(str(d.itemsize) for d in dtypes) + " B" if dtypes else "nothing"


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        name: as it stands in tables.
        run: one call; its argument is the number of the call, from 0, by which buffers rotate.
        kind: kernel (ours), step (ours, through the pruner), floor (torch's fused optimizers), peer, or bandwidth.
        weights: weights that one call treats.
        bytes_per_weight: those the call must move, counted once each; 0 where counting makes no sense.
        steps: training steps in one call; times are divided by it.
        against: name of the case a peer is compared with.
        slow: whether it contains kthvalue, a sort or the like.
        setup: run once before the first call, if it fits.
        needs: bytes that it and a call take beside the operands.
        predict: seconds a call will take, from a small piece.
        outputs: tensors that a call has written, for the test of bitwise repeatability; by default what `run` returns.
        streams: what one call moves, for a floor of its own; masks, a bit a weight, are left out.
    """

    name: str
    run: Callable[[int], Any]
    kind: str = "kernel"
    weights: int = 0
    bytes_per_weight: float = 0.0
    steps: int = 1
    against: str = ""
    slow: bool = False
    needs: int = 0
    setup: Callable[[], object] | None = None
    predict: Callable[[], float] | None = None
    outputs: Callable[[], Sequence[Tensor]] | None = None
    streams: Streams | None = None


@dataclass
class Timing:
    """What was seen of a case.

    Attributes:
        seconds: per step and sample.
        bytes_moved: counted per step.
        extra_bytes: peak memory beside the operands.
        calls: kernel launches on CUDA, operator calls on CPU.
        error: why there is nothing.
    """

    seconds: list[float] = field(default_factory=list)
    bytes_moved: float = 0.0
    extra_bytes: int | None = None
    calls: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Limits:
    """How long to go on.

    Attributes:
        rounds: samples per case.
        warmups: calls before them.
        patience: seconds after which a case gets no more samples than `least`, and a peer none.
        deadline: on the clock of time.perf_counter; past it no peer begins, and nobody gets a second sample.
    """

    rounds: int
    warmups: int
    patience: float
    least: int = 5
    deadline: float = math.inf

    @staticmethod
    def of(device: torch.device, quick: bool) -> Limits:
        """Those of the protocol."""
        if device.type == "cuda":
            return Limits(rounds=50, warmups=20, patience=5.0 if quick else 60.0, least=20)
        return Limits(rounds=5 if quick else 11, warmups=1, patience=2.0 if quick else 40.0)


class _Count(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def measure(
    cases: Sequence[Case],
    device: torch.device,
    limits: Limits,
    tick: Callable[[str], None] = lambda name: None,
    neighbours: Neighbours | None = None,
) -> dict[str, Timing]:
    """Time the cases, interleaved; under no_grad, as an optimizer's step runs.

    Args:
        tick: called before each call of a case, with its name.
        neighbours: watches what other processes do meanwhile; samples that they disturbed are taken again while its
            waiting time lasts.

    Returns:
        By name of the case.
    """
    found = {case.name: Timing(bytes_moved=case.weights * case.bytes_per_weight) for case in cases}
    for case in cases:
        tick(case.name)
        _first_call(case, found[case.name], device, limits)
    spent = {name: limits.patience + 1 if timing.seconds else 0.0 for name, timing in found.items()}
    neighbours = neighbours or Neighbours(device)
    for turn in range(limits.rounds):
        queue = [c for c in cases if not _enough(c, found[c.name], spent[c.name], limits)]
        while queue:
            neighbours.wait_for_quiet()
            neighbours.begin()
            block = _block(queue, found, turn + limits.warmups, device, tick)
            if not neighbours.keep():
                queue = [case for case, _ in block] + queue
                continue
            for case, seconds in block:
                spent[case.name] += seconds
                found[case.name].seconds.append(seconds / case.steps)
    return found


def _block(
    queue: list[Case], found: Mapping[str, Timing], turn: int, device: torch.device, tick: Callable[[str], None]
) -> list[tuple[Case, float]]:
    """Time cases from the queue: on CUDA all without a break, on the CPU some, so that a disturbance costs few."""
    begin = time.perf_counter()
    pending = []
    while queue and (device.type == "cuda" or time.perf_counter() - begin < _BLOCK_SECONDS):
        case = queue.pop(0)
        tick(case.name)
        try:
            pending.append((case, _timed(case, turn, device)))
        except Exception as error:  # a peer may fail at any call; that is a result
            found[case.name].error = reason(error)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [(case, elapsed()) for case, elapsed in pending]


def _enough(case: Case, seen: Timing, spent: float, limits: Limits) -> bool:
    samples = len(seen.seconds)
    if seen.error:
        return True
    if time.perf_counter() > limits.deadline:
        return samples > 0
    return spent > limits.patience and samples >= (1 if case.kind == "peer" else limits.least)


def _timed(case: Case, turn: int, device: torch.device) -> Callable[[], float]:
    """Run once; the seconds it took, to be asked for after synchronising."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        case.run(turn)
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    case.run(turn)
    seconds = time.perf_counter() - start
    return lambda: seconds


def _first_call(case: Case, seen: Timing, device: torch.device, limits: Limits) -> None:
    """Warm up; on the way look at memory and count calls."""
    free = memory.available(device)
    if case.needs > free:
        seen.error = f"out of memory: needs {case.needs / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
        return
    if case.kind == "peer" and time.perf_counter() > limits.deadline:
        seen.error = "not run: the budget is spent"
        return
    try:
        if case.predict is not None:
            expected = case.predict()
            if expected > limits.patience:
                seen.error = f"not run: about {expected:.0f} s expected, more than {limits.patience:.0f} s"
                return
        if case.setup is not None:
            case.setup()
        begin = time.perf_counter()
        with memory.Peak(device) as peak:
            case.run(0)
        seen.extra_bytes = peak.bytes
        first = time.perf_counter() - begin
        if case.kind == "peer" and first * 2 > limits.patience:
            # Too slow to be called twice: the first call is the sample.
            seen.seconds.append(first / case.steps)
            return
        seen.calls = _count_calls(case, device)
        for turn in range(2, limits.warmups):
            if (time.perf_counter() - begin) > limits.patience / 2:
                break
            case.run(turn)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # failing is a result of a peer, and of ours
        seen.error = reason(error)
        gc.collect()


def _count_calls(case: Case, device: torch.device) -> int | None:
    """Kernel launches on CUDA, operator calls on CPU, of one step."""
    if device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            case.run(1)
            torch.cuda.synchronize(device)
        launches = sum(e.device_type.name == "CUDA" for e in trace.events() or ())
        # Without the profiling library there are no events, not no launches.
        return round(launches / case.steps) if launches else None
    with _Count() as count:
        case.run(1)
    return round(count.calls / case.steps)


def reason(error: BaseException) -> str:
    """An exception as one line of a table."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:160]


def repeatable(build: Callable[[], Sequence[Case]]) -> dict[str, bool]:
    """Whether two runs from the same data write the same bits, for each of our cases."""
    first, second = ({c.name: _outputs(c) for c in build() if c.kind in ("kernel", "step")} for _ in range(2))
    return {
        name: all(torch.equal(_bits(x), _bits(y)) for x, y in zip(written, second[name], strict=True))
        for name, written in first.items()
    }


def _outputs(case: Case) -> list[Tensor]:
    if case.setup is not None:
        case.setup()
    result = case.run(0)
    return [tensor.detach().clone() for tensor in (case.outputs() if case.outputs is not None else [result])]


def _bits(tensor: Tensor) -> Tensor:
    """As integers, so that NaN equals NaN and 0 differs from -0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()]) if tensor.is_floating_point() else tensor


def bandwidth_cases(device: torch.device, least_bytes: int = 1 << 26) -> list[Case]:
    """Copy (`copy_`: a byte read, a byte written) and read (`amax`) over buffers larger than the last-level cache.

    On a CPU with several threads, the copy of one of them, too: what more cores bring.
    """
    n = _elements(device, least_bytes)
    generator = torch.Generator(device).manual_seed(1)
    source = torch.rand(n, generator=generator, device=device)
    target = torch.rand(n, generator=generator, device=device)

    def copy_alone(turn: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            target.copy_(source)
        finally:
            torch.set_num_threads(threads)

    found = [
        Case("copy", lambda turn: target.copy_(source), "bandwidth", n, 8),
        Case("read", lambda turn: source.amax(), "bandwidth", n, 4),
    ]
    if device.type == "cpu" and torch.get_num_threads() > 1:
        found.append(Case("copy, one thread", copy_alone, "bandwidth", n, 8))
    return found


def floor_cases(cases: Sequence[Case], device: torch.device, least_bytes: int = 1 << 26) -> list[Case]:
    """For each set of streams, the loop that moves them without arithmetic: the floor of the cases that have it.

    Copy is no floor of an update in place: it also reads the lines that it overwrites. On the CPU alone.
    """
    if device.type != "cpu":
        return []
    n, buffers = _elements(device, least_bytes), _Buffers()
    return [
        Case(streams.name, buffers.run_of(streams, n), "bandwidth", n, streams.bytes_per_weight)
        for streams in dict.fromkeys(case.streams for case in cases if case.streams is not None)
    ]


class _Buffers:
    """Tensors that the floors share."""

    def __init__(self) -> None:
        self._made: dict[torch.dtype, list[Tensor]] = {}

    def run_of(self, streams: Streams, n: int) -> Callable[[int], None]:
        taken: dict[torch.dtype, int] = {}
        written, read = ([self._next(d, taken, n) for d in dtypes] for dtypes in (streams.written, streams.read))
        return lambda turn: torch.ops.pins_ext.stream_(written, read)

    def _next(self, dtype: torch.dtype, taken: dict[torch.dtype, int], n: int) -> Tensor:
        own, place = self._made.setdefault(dtype, []), taken.get(dtype, 0)
        taken[dtype] = place + 1
        if place == len(own):
            own.append(torch.rand(n).to(dtype))
        return own[place]


def _elements(device: torch.device, least_bytes: int) -> int:
    return max(4 * memory.last_level_cache(device), least_bytes) // 4
