"""What is written down: one record per case, and the file of a run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pins_ext.files.atomic import write_file

from .data import Problem
from .protocol import Case, Timing

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """One measured case. Times in seconds per step or call; None where it could not be measured or makes no sense.

    Attributes:
        gbps: bytes counted over the median.
        copy_gbps, read_gbps: bandwidths measured between the samples of this case's group.
        share_of_copy: gbps over copy_gbps.
        share_of_floor: the time of a loop without arithmetic over the same streams, over this case's.
        passes: of `select`, its time over the time to read the states once.
        times_ours: of a peer, its median over that of the case it is compared with (`against`).
        extra_bytes: peak memory beside the operands.
        calls: kernel launches (CUDA) or operator calls (CPU).
        repeatable: whether two runs wrote the same bits.
        slow: whether it contains kthvalue, a sort or a quantile.
        others: share of the machine's CPU time that other processes used between the samples; above neighbours.QUIET
            the times are disturbed.
        error: why there is no time.
    """

    stem: str
    label: str
    case: str
    kind: str
    shapes: str
    tensors: int
    weights: int
    dtype: str
    state_dtype: str
    scores: str
    ratio: float
    bytes_per_weight: float
    median_s: float | None = None
    p5_s: float | None = None
    p95_s: float | None = None
    samples: int = 0
    gbps: float | None = None
    copy_gbps: float | None = None
    read_gbps: float | None = None
    share_of_copy: float | None = None
    share_of_floor: float | None = None
    passes: float | None = None
    against: str = ""
    times_ours: float | None = None
    slow: bool = False
    extra_bytes: int | None = None
    calls: int | None = None
    repeatable: bool | None = None
    others: float | None = None
    error: str | None = None


def record_of(
    stem: str,
    label: str,
    problem: Problem,
    case: Case,
    timing: Timing | None = None,
    *,
    all_seen: Mapping[str, Timing] | None = None,
    repeatable: bool | None = None,
    others: float | None = None,
    error: str | None = None,
) -> Record:
    """A case and what was seen of it, with everything that follows from it."""
    timing = timing or Timing(error=error)
    all_seen = all_seen or {}
    median = _median(timing)
    counted = case.bytes_per_weight * case.weights
    gbps = counted / median / 1e9 if median and counted else None
    copy, read = (_bandwidth(all_seen.get(name)) for name in ("copy", "read"))
    ours = _median(all_seen[case.against]) if case.against in all_seen else None
    is_select = case.name.startswith("select")
    return Record(
        stem=stem,
        label=label,
        case=case.name,
        kind=case.kind,
        shapes=problem.name,
        tensors=len(problem.shapes),
        weights=problem.weights,
        dtype=str(problem.dtype).removeprefix("torch."),
        state_dtype=str(problem.state_dtype).removeprefix("torch."),
        scores=problem.scores,
        ratio=problem.ratio,
        bytes_per_weight=case.bytes_per_weight,
        median_s=median,
        p5_s=_quantile(timing.seconds, 0.05),
        p95_s=_quantile(timing.seconds, 0.95),
        samples=len(timing.seconds),
        gbps=gbps,
        copy_gbps=copy,
        read_gbps=read,
        share_of_copy=gbps / copy if gbps and copy else None,
        share_of_floor=_share_of_floor(case, median, all_seen),
        passes=read / gbps if is_select and gbps and read else None,
        against=case.against,
        times_ours=median / ours if median and ours else None,
        slow=case.slow,
        extra_bytes=timing.extra_bytes,
        calls=timing.calls,
        repeatable=repeatable,
        others=others,
        error=timing.error,
    )


def _share_of_floor(case: Case, median: float | None, all_seen: Mapping[str, Timing]) -> float | None:
    if case.streams is None or not median:
        return None
    speed = _bandwidth(all_seen.get(case.streams.name))
    return case.weights * case.streams.bytes_per_weight / speed / 1e9 / median if speed else None


def _bandwidth(timing: Timing | None) -> float | None:
    median = _median(timing) if timing else None
    return timing.bytes_moved / median / 1e9 if timing and median else None


def _median(timing: Timing) -> float | None:
    return statistics.median(timing.seconds) if timing.seconds else None


def _quantile(samples: Sequence[float], share: float) -> float | None:
    """By linear interpolation."""
    if not samples:
        return None
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Run:
    """The file of a run. machine: see machine.describe. options: of the command line. seconds: it took in all."""

    machine: dict[str, Any]
    date: str
    options: dict[str, Any]
    seconds: float
    records: list[Record]
    skipped: list[str]

    def save(self, path: Path) -> None:
        """Write JSON, aside and then renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    @property
    def others(self) -> float:
        """The largest share of the CPU that other processes used while something was measured on it."""
        return max((record.others or 0.0 for record in self.records), default=0.0)

    @staticmethod
    def load(path: Path) -> Run:
        """Read what `save` wrote.

        Raises:
            ValueError: another kind of file, or another version of it.
        """
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no result file: {error}") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"{path} is no result file of schema {SCHEMA}")
        known = {f.name for f in fields(Record)}
        records = [Record(**{k: v for k, v in r.items() if k in known}) for r in data["records"]]
        return Run(data["machine"], data["date"], data["options"], data["seconds"], records, data["skipped"])
