"""The benchmarks: data, protocol, peers that fail in the open, the command line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import pins_ext.bench as bench
from pins_ext import contention, ops
from pins_ext.bench import (
    baselines,
    bench_step,
    command,
    data,
    machine,
    memory,
    options,
    records,
    shapes,
    suite,
)
from pins_ext.bench.protocol import (
    Case,
    Limits,
    Streams,
    Timing,
    bandwidth_cases,
    floor_cases,
    measure,
    repeatable,
)

CPU = torch.device("cpu")
FEW = Limits(rounds=5, warmups=1, patience=5.0)
Maker = Callable[[data.Problem, bool], suite.Group | None]
STEMS = [f"{stem}{i}" for stem, makers in command.GROUPS.items() for i in range(len(makers))]
MAKERS = [make for makers in command.GROUPS.values() for make in makers]


def problem(name: str = "bert-base", params: int = 40_000, dtype: torch.dtype = torch.float32) -> data.Problem:
    return data.Problem(name, shapes.shapes_of(name, params), dtype, CPU)


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights"), [("bert-base", 84_934_656), ("llama-7b", 6_476_005_376), ("flat", 16_000_000)]
)
def test_shapes_are_those_of_the_models(name: str, weights: int) -> None:
    assert data.Problem(name, shapes.shapes_of(name), torch.float32, CPU).weights == weights


@pytest.mark.parametrize("name", shapes.SHAPES)
@pytest.mark.parametrize("params", [40_000, 3_000_000, 2_200_000_000])
def test_shapes_reach_the_wanted_size(name: str, params: int) -> None:
    found = problem(name, params)
    assert found.weights == pytest.approx(params, rel=0.11)
    assert len(found.shapes) == 5000 or name != "many-small"
    assert found.smaller(20_000).weights == pytest.approx(20_000, rel=0.3)


def test_data_is_random_repeatable_and_never_zero() -> None:
    first, second = (data.Draw(problem()).normal() for _ in range(2))
    assert all(torch.equal(x, y) and bool((x != 0).all()) for x, y in zip(first, second, strict=True))
    other = data.Draw(problem().turned(1)).normal()
    assert not torch.equal(first[0], other[0])


def test_misaligned_views_are_misaligned_and_contiguous() -> None:
    for tensor in data.Draw(problem("misaligned")).normal():
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 4


@pytest.mark.parametrize(
    ("scores", "holds"),
    [
        ("lognormal-1", lambda s: s.log2().std().item() == pytest.approx(1, rel=0.05)),
        ("lognormal-8", lambda s: s.log2().std().item() == pytest.approx(8, rel=0.05)),
        ("zeros-80", lambda s: (s == 0).float().mean().item() > 0.78),
        ("equal", lambda s: s.unique().numel() == 1),
        ("bf16-ties", lambda s: s.unique().numel() < s.numel()),
    ],
)
def test_scores_are_distributed_as_named(scores: str, holds: object) -> None:
    a, b = data.Draw(dataclasses.replace(problem(), scores=scores)).states()
    assert callable(holds)
    assert holds(torch.cat([(x * y).flatten() for x, y in zip(a, b, strict=True)]))


# ---- protocol --------------------------------------------------------------------------------------------------------


def test_cases_are_interleaved() -> None:
    calls: list[str] = []
    found = measure([Case(name, lambda turn, name=name: calls.append(name)) for name in "ab"], CPU, FEW)
    assert "".join(calls[-10:]) == "ab" * 5
    assert [len(timing.seconds) for timing in found.values()] == [5, 5]
    assert all(timing.error is None for timing in found.values())


def test_peers_fail_in_the_open() -> None:
    def fails(turn: int) -> None:
        raise RuntimeError("no such thing\nand more")

    def exhausts(turn: int) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    def fails_later(turn: int) -> None:
        if turn > 2:
            raise ValueError("the third time")

    too_large = torch.empty((1 << 24) + 1)
    cases = [
        Case("fails", fails, "peer"),
        Case("exhausts", exhausts, "peer"),
        Case("fails later", fails_later, "peer"),
        Case("too large", lambda turn: None, "peer", needs=1 << 60),
        Case("too slow", lambda turn: None, "peer", predict=lambda: 1000.0),
        Case("quantile", lambda turn: baselines.quantile(too_large, 5), "peer"),
        Case("works", lambda turn: None, "peer"),
    ]
    found = measure(cases, CPU, FEW)
    assert found["fails"].error == "RuntimeError: no such thing"
    assert found["exhausts"].error == "out of memory"
    assert found["fails later"].error == "ValueError: the third time"
    assert "GB are free" in str(found["too large"].error)
    assert "about 1000 s expected" in str(found["too slow"].error)
    # torch 2.15 takes as many as memory holds.
    assert found["quantile"].error is None or "too large" in str(found["quantile"].error)
    assert found["works"].error is None


def test_patience_ends_slow_peers_but_not_our_own_cases() -> None:
    cases = [Case(kind, lambda turn: time.sleep(0.01), kind) for kind in ("kernel", "peer", "floor")]
    found = measure(cases, CPU, Limits(rounds=9, warmups=1, patience=0.015, least=5))
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"kernel": 5, "peer": 1, "floor": 5}


def test_past_the_deadline_no_peer_begins() -> None:
    cases = [Case("ours", lambda turn: None), Case("theirs", lambda turn: None, "peer")]
    found = measure(cases, CPU, dataclasses.replace(FEW, deadline=time.perf_counter()))
    assert len(found["ours"].seconds) == 1
    assert found["theirs"].error == "not run: the budget is spent"


def test_disturbed_samples_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"wall": 0.0, "busy": 0.0, "theirs": [0.9, 0.0] * 50}

    def now() -> tuple[float, float, float]:
        clock["wall"] += 1.0
        clock["busy"] += clock["theirs"].pop(0)
        return clock["wall"], clock["busy"], 0.0

    monkeypatch.setattr(contention, "_now", now)
    monkeypatch.setattr(contention.time, "sleep", lambda seconds: None)
    patient, hurried = contention.Neighbours(CPU, wait=100.0), contention.Neighbours(CPU)
    calls: list[int] = []
    cases = [Case("x", calls.append)]
    limits = Limits(rounds=4, warmups=1, patience=5.0)
    assert len(measure(cases, CPU, limits, neighbours=patient)["x"].seconds) == 4
    assert patient.share is not None
    assert patient.share < contention.QUIET
    assert patient.left < 100.0
    measure(cases, CPU, limits, neighbours=hurried)
    assert hurried.share is not None


def test_peak_memory_of_a_call_is_seen() -> None:
    size = 48 << 20
    with memory.Peak(CPU) as peak:
        torch.full((size // 4,), 1.0)
    assert peak.bytes is not None
    assert size * 0.9 < peak.bytes < size * 1.5
    assert memory.last_level_cache(CPU) >= 1 << 18
    assert memory.available(CPU) > 1 << 20


def test_operators_are_counted() -> None:
    x = torch.rand(10)
    found = measure([Case("two", lambda turn: x.mul(2).add(1), steps=1)], CPU, FEW)
    assert found["two"].calls == 2


def test_operators_run_as_in_an_optimizer_step() -> None:
    """With gradients enabled every output is looked up whether autograd records it."""
    enabled: list[bool] = []
    measure([Case("asks", lambda turn: enabled.append(torch.is_grad_enabled()))], CPU, FEW)
    assert enabled
    assert not any(enabled)


def test_bandwidth_buffers_exceed_the_cache() -> None:
    copy, read, *_ = bandwidth_cases(CPU)
    assert copy.weights * 4 >= 4 * memory.last_level_cache(CPU)
    assert (copy.bytes_per_weight, read.bytes_per_weight) == (8, 4)


def test_repeatability_tells_a_difference() -> None:
    runs = iter(range(10))
    cases = [Case("same", lambda turn: torch.ones(3)), Case("differs", lambda turn: torch.tensor([float(next(runs))]))]
    assert repeatable(lambda: cases) == {"same": True, "differs": False}


class Nobody:
    """Watches nothing."""

    def group(self, group: suite.Group, calls: int) -> None: ...
    def tick(self, name: str) -> None: ...
    def done(self, group: suite.Group, records: object) -> None: ...


def test_a_group_that_does_not_fit_says_so() -> None:
    group = dataclasses.replace(MAKERS[0](problem(), True), operand_bytes=1e15)
    (record,) = suite.run([group], FEW, None, Nobody()).records
    assert "out of memory: the operands need" in str(record.error)


def test_the_budget_skips_the_least_valuable() -> None:
    def build(problem: data.Problem, peers: bool) -> list[Case]:
        return [Case("sleeps", lambda turn: time.sleep(0.02), "floor")]

    groups = [suite.Group("select", problem(), build, True, 0, label) for label in "abc"]
    outcome = suite.run(groups, FEW, 0.01, Nobody(), bandwidth_bytes=1 << 20)
    assert [r.label for r in outcome.records if r.case == "sleeps"] == ["a"]
    assert outcome.skipped == [group.name for group in groups[1:]]


def test_an_interrupted_run_keeps_what_it_has() -> None:
    def interrupted(turn: int) -> None:
        raise KeyboardInterrupt

    groups = [
        suite.Group(
            "select", problem(), lambda problem, peers: [Case("one", lambda turn: None, "floor")], True, 0, "a"
        ),
        suite.Group("select", problem(), lambda problem, peers: [Case("two", interrupted, "floor")], True, 0, "b"),
    ]
    outcome = suite.run(groups, FEW, None, Nobody(), bandwidth_bytes=1 << 20)
    assert outcome.interrupted
    assert [r.case for r in outcome.records if r.case != "copy, one thread"] == ["copy", "read", "one"]
    assert outcome.skipped == [groups[1].name]


# ---- every case runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def _one_set_of_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "last_level_cache", lambda device: 1)


@pytest.mark.usefixtures("_one_set_of_buffers")
@pytest.mark.parametrize(
    ("name", "dtype"), [("bert-base", torch.float32), ("bert-base", torch.bfloat16), ("misaligned", torch.float32)]
)
@pytest.mark.parametrize("make", MAKERS, ids=STEMS)
def test_every_case_runs(make: Maker, name: str, dtype: torch.dtype) -> None:
    group = make(problem(name, 20_000, dtype), name == "bert-base")
    if group is None:  # of peers alone
        assert make in MAKERS[STEMS.index("step3") : STEMS.index("clip0")]
        return
    cases = group.build(group.problem, group.peers)
    for case in cases:
        if "torch.compile" in case.name or (case.kind == "peer" and dtype != torch.float32):
            continue
        if case.setup is not None:
            case.setup()
        case.run(0)
        assert case.weights == group.problem.weights
    assert {case.against for case in cases if case.kind in ("peer", "floor")} <= {case.name for case in cases}
    assert all(case.bytes_per_weight > 0 for case in cases if case.kind == "step")
    if name == "bert-base":
        assert all(repeatable(lambda: group.build(group.problem, False)).values())


def test_the_peers_find_the_same_threshold() -> None:
    scores = torch.rand(10_001)
    for n_prune in (100, 5000, 9999):
        found = {float(f(scores, n_prune)) for f in (baselines.kthvalue, baselines.topk, baselines.sort)}
        assert len(found) == 1


@pytest.mark.parametrize("delta_t", [1, 10])
def test_the_tuned_peer_prunes_what_the_released_one_does(delta_t: int) -> None:
    zeros = []
    for fused in (False, True):
        model = bench_step.Model(problem("bert-base", 20_000))
        step = baselines.EagerStep(list(model.weights), 0.2, delta_t, 1e-4, fused)
        for i in range(2 * delta_t + 1):
            model.backward(i)
            step.step()
        zeros.append(torch.cat([(p == 0).flatten() for p in model.weights]))
    assert zeros[0].float().mean() == pytest.approx(0.8, abs=0.01)
    assert (zeros[0] != zeros[1]).float().mean() < 1e-3


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_one_set_of_buffers")
def test_quick_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    arguments = ["select", "step", "scores", "--quick", "--params", "3e4", "--rounds", "1", "--json", str(file)]
    assert bench.main([*arguments, "--budget", "3"]) == 0
    text = capsys.readouterr().out
    assert "average step, deltaT = 10" in text or "not reached" in text
    assert "targets" in text
    assert file.exists()
    assert file.with_suffix(".svg").exists()
    assert bench.main(["pack", *arguments[3:], "--no-peers", "--baseline", str(file)]) == 0
    assert "vs baseline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "unknown stem"),
        (["--params", "0.5"], "positive whole number"),
        (["--baseline", "missing.json"], "missing.json"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        bench.main(arguments)
    assert exit_info.value.code == 2
    assert says in capsys.readouterr().err


def test_machine_names_are_models() -> None:
    assert machine.file_stem("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-xeon-cpu-2-20ghz"
    about = machine.describe(CPU)
    assert about["name"]
    assert (about["cpu_family"] is None) == ("cpu family" not in Path("/proc/cpuinfo").read_text())


def test_random_masks_are_packed() -> None:
    tensors: list[Tensor] = [torch.rand(70_001), torch.rand(64)]
    masks = data.masks_of(problem("flat", 70_065), tensors, 0.2)
    assert [m.numel() for m in masks] == [ops.mask_bytes(70_001), 8]
    kept = sum(int(b).bit_count() for b in masks[0].tolist())
    assert kept == pytest.approx(14_000, rel=0.05)


def test_a_floor_moves_the_streams_of_its_case() -> None:
    f32, bf16 = torch.float32, torch.bfloat16
    streams = Streams((f32, bf16), (f32,))
    assert streams.bytes_per_weight == 8 + 4 + 4
    cases = [Case(name, lambda turn: None, streams=streams) for name in ("a", "b")]
    (floor,) = floor_cases(cases, CPU, 1 << 12)
    assert floor.weights * floor.bytes_per_weight == floor.weights * streams.bytes_per_weight
    moved: list[tuple[list[torch.dtype], list[torch.dtype]]] = []

    def stream(written: list[Tensor], read: list[Tensor]) -> None:
        moved.append(([x.dtype for x in written], [x.dtype for x in read]))

    with patch.object(torch.ops.pins_ext, "stream_", stream):
        floor.run(0)
    assert moved == [([f32, bf16], [f32])]


def test_the_share_of_the_floor_is_per_weight() -> None:
    """A floor of 16 bytes and 100 weights in 2 s; the case has 50 weights in 4 s: a quarter of the floor's speed."""
    streams = Streams((torch.float32,), (torch.float32, torch.float32))
    case = Case("x", lambda turn: None, weights=50, bytes_per_weight=16, streams=streams)
    seen = {streams.name: Timing([2.0], bytes_moved=1600), "x": Timing([4.0])}
    flat = data.Problem("flat", ((50,),), torch.float32, CPU)
    record = records.record_of("importance", "", flat, case, seen["x"], all_seen=seen)
    assert record.share_of_floor == pytest.approx(0.25)


def test_one_thread_copies_alone_and_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (alone,) = (c for c in bandwidth_cases(CPU, 1 << 12) if c.name == "copy, one thread")
        alone.run(0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_stems_of_the_help_are_those_that_run() -> None:
    assert (*command.GROUPS, "scores", "shapes") == options.STEMS
