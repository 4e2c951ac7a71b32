"""What was aimed at, and whether the records of a run reach it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .bench_small import one_tensor
from .bench_step import CLIPPED_FLOOR, FLOOR, clipped_name_of, lean_name_of, name_of
from .records import Record

Measured = Iterable[tuple[str, Record, float | None]]

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Target:
    """One line of the table of targets.

    Attributes:
        metric: what is measured.
        device: cpu, cuda, or both.
        least, wish: the bounds of pass and stretch.
        more: whether larger is better.
        unit: x (a ratio), share, passes or MB.
        measure: from a run's records, the label, record and value of every line that this target makes.
    """

    metric: str
    device: str
    least: float
    wish: float
    more: bool
    unit: str
    measure: Callable[[Sequence[Record]], Measured]

    def verdict(self, value: float | None) -> str:
        """pass, stretch, missed, or not measured."""
        if value is None:
            return "not measured"
        sign = 1 if self.more else -1
        return (
            "stretch" if sign * value >= sign * self.wish else "pass" if sign * value >= sign * self.least else "missed"
        )


@dataclass(frozen=True)
class Line:
    """A target beside what was measured; value is None where it was not."""

    target: Target
    label: str
    record: Record | None
    value: float | None

    @property
    def verdict(self) -> str:
        return self.target.verdict(self.value)

    @property
    def shown(self) -> str:
        """The value with its unit."""
        return shown(self.value, self.target.unit)


def shown(value: float | None, unit: str) -> str:
    """A measured number as the tables print it."""
    if value is None:
        return DASH
    return {
        "x": f"{value:.2f} {TIMES}",
        "share": f"{value:.2f}",
        "passes": f"{value:.2f}",
        "MB": f"{value / 1e6:.1f} MB",
    }[unit]


def lines(records: Sequence[Record], device: str, all_targets: bool = True) -> list[Line]:
    """The targets of a device against a run; all_targets: also those that it did not measure."""
    found = []
    for target in TARGETS:
        if target.device not in (device, "both"):
            continue
        measured = list(target.measure(records))
        found += [Line(target, label, record, value) for label, record, value in measured]
        if all_targets and not measured:
            found.append(Line(target, "", None, None))
    return found


def main_records(records: Sequence[Record]) -> list[Record]:
    """The records with peers beside them: those of the model's shapes, no score distributions, the largest first."""
    chosen = [r for r in records if r.shapes in ("bert-base", "llama-7b", "flat") and r.label != "scores"]
    return sorted(chosen, key=lambda r: (r.shapes == "flat", -r.weights))


def _find(records: Sequence[Record], case: str, dtype: str | None = None) -> Record | None:
    fitting = (r for r in main_records(records) if r.case == case and dtype in (None, r.dtype))
    return next((r for r in fitting if r.median_s is not None), None)


def _share(*cases: str, dtype: str | None = None) -> Callable[[Sequence[Record]], Measured]:
    def measure(records: Sequence[Record]) -> Measured:
        for case in cases:
            record = _find(records, case, dtype)
            if record is not None:
                yield case, record, record.share_of_copy

    return measure


def _share_of_floor(records: Sequence[Record]) -> Measured:
    for record in main_records(records):
        if record.share_of_floor:
            yield record.case, record, record.share_of_floor


def _many_small(records: Sequence[Record]) -> Measured:
    """Time over a single tensor over that over thousands of small ones, which takes turns with it."""
    for r in records:
        if r.stem == "small" and r.case == one_tensor(r.against) and r.times_ours:
            yield r.against, r, r.times_ours


def _passes(records: Sequence[Record]) -> Measured:
    record = _find(records, "select")
    if record is not None:
        yield "", record, record.passes


def _beside(peer: str, ours: str, inverse: bool = False) -> Callable[[Sequence[Record]], Measured]:
    """Time of a peer over ours; inverse: ours over its."""

    def measure(records: Sequence[Record]) -> Measured:
        record = next((r for r in main_records(records) if r.case == peer and r.against == ours and r.times_ours), None)
        if record is not None and record.times_ours:
            yield "", record, 1 / record.times_ours if inverse else record.times_ours

    return measure


def _clipped(criterion: str) -> Callable[[Sequence[Record]], Measured]:
    """Time of our clipping and step over that of torch's."""
    return _over(clipped_name_of(10, criterion), CLIPPED_FLOOR)


def _lean(what: str) -> Callable[[Sequence[Record]], Measured]:
    """Time of our step with less beside the weights over that of torch's, in the same group."""
    return _over(lean_name_of(10, what), FLOOR)


def _over(name: str, floor_name: str) -> Callable[[Sequence[Record]], Measured]:
    def measure(records: Sequence[Record]) -> Measured:
        ours = _find(records, name)
        beside = [] if ours is None else [r for r in records if (r.stem, r.label) == (ours.stem, ours.label)]
        floor = _find(beside, floor_name)
        if ours is not None and floor is not None and ours.median_s and floor.median_s:
            yield "", ours, ours.median_s / floor.median_s

    return measure


def _transient(records: Sequence[Record]) -> Measured:
    selects = [r for r in records if r.case.startswith("select") and r.extra_bytes is not None]
    if selects:
        worst = max(selects, key=lambda r: r.extra_bytes or 0)
        yield "", worst, worst.extra_bytes


AVERAGE, MASK = name_of(10), name_of(1)
TUNED, RELEASED = "eager, tuned: fused AdamW, topk(sorted=False)", "eager, released: AdamW, cat + kthvalue"
_CPU_KERNELS = (
    "accumulate_", "fold_", "fold_ + count", "count_", "pack_", "apply_mask_", "masked_adamw_ alone",
    "masked_adamw_ + ipt", "masked_adamw_ + ipt + mask", "masked_sgd_ + ipt + mask",
)  # fmt: skip

TARGETS = (
    Target("masked AdamW + ipt, fp32, bandwidth over that of copy", "cuda", 0.88, 0.94, True, "share",
           _share("masked_adamw_ + ipt", dtype="float32")),
    Target("masked AdamW + ipt, all in bf16, bandwidth over that of copy", "cuda", 0.80, 0.90, True, "share",
           _share("masked_adamw_ + ipt", dtype="bfloat16")),
    Target("fold + histogram, bandwidth over that of copy", "cuda", 0.85, 0.93, True, "share", _share("fold_ + count")),
    Target("select from stored states: passes over the data (time / read time)", "cuda", 2.6, 2.1, False, "passes",
           _passes),
    Target("average step at deltaT = 10 / torch fused AdamW (floor 1.35)", "cuda", 1.6, 1.42, False, "x",
           _beside(FLOOR, AVERAGE, inverse=True)),
    Target("kernel's bandwidth over that of copy", "cpu", 0.75, 0.90, True, "share", _share(*_CPU_KERNELS)),
    Target("kernel's share of its own floor", "cpu", 0.85, 0.95, True, "share", _share_of_floor),
    Target("bandwidth over 5,000 small tensors over that of one", "cpu", 0.7, 0.9, True, "share", _many_small),
    Target("clip + step at deltaT = 10 / torch clip_grad_norm_ + fused AdamW (floor 1.04)", "cpu", 1.15, 1.0, False,
           "x", _clipped("pins")),
    Target("the same with criterion fisher (floor 0.82)", "cpu", 1.0, 0.9, False, "x", _clipped("fisher")),
    Target("average step at deltaT = 10 / torch fused AdamW (floor 1.35)", "cpu", 1.45, 1.2, False, "x",
           _beside(FLOOR, AVERAGE, inverse=True)),
    Target("the same with statistics in bfloat16 (floor 1.20)", "both", 1.3, 1.2, False, "x", _lean("bfloat16")),
    Target("the same with criterion moments (floor 1.06)", "both", 1.2, 1.1, False, "x", _lean("moments")),
    Target("the same with criterion fisher (floor 1.03)", "both", 1.1, 1.05, False, "x", _lean("fisher")),
    Target("mask step at deltaT = 1 / torch fused AdamW (floor 1.57)", "cuda", 2.2, 1.65, False, "x",
           _beside(FLOOR, MASK, inverse=True)),
    Target("mask step at deltaT = 1 / torch fused AdamW (floor 1.57)", "cpu", 2.0, 1.65, False, "x",
           _beside(FLOOR, MASK, inverse=True)),
    Target("mask step against tuned eager, without kthvalue", "both", 4, 5, True, "x", _beside(TUNED, MASK)),
    # The ratio that contains kthvalue never stands without the one that does not.
    Target("score + global select against eager score + cat + kthvalue", "cpu", 30, 50, True, "x",
           _beside("eager score + cat + kthvalue", "select")),
    Target("score + global select against eager score + cat + topk(sorted=False)", "cpu", 25, 45, True, "x",
           _beside("eager score + cat + topk(sorted=False)", "select")),
    Target("transient memory at selection", "both", 64e6, 24e6, False, "MB", _transient),
)  # fmt: skip
"""Set before what they ask for was measured; `both` on every device."""
