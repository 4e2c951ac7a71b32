"""What the benchmarks write down: records, targets, the picture, the table of figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_bench import CPU, MAKERS, Nobody, problem

from pins_ext import contention
from pins_ext.bench import (
    bench_small,
    command,
    machine,
    memory,
    records,
    results_table,
    roofline,
    suite,
    targets,
)
from pins_ext.bench.protocol import Limits


@pytest.fixture(scope="module")
def run() -> records.Run:
    """A small run of everything that targets look at."""
    groups = [group(problem(), True) for group in MAKERS]
    groups.append(bench_small.group(problem("many-small"), False))
    limits = Limits(rounds=2, warmups=1, patience=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "last_level_cache", lambda device: 1)
        outcome = suite.run(groups, limits, None, Nobody(), bandwidth_bytes=1 << 20)
    options = {"stems": [], "shapes": ["bert-base"], "params": None, "dtype": "fp32", "quick": False}
    about = machine.describe(CPU)
    return records.Run(about, "2026-01-02", options, 1.0, outcome.records, [])


def test_a_run_is_saved_and_read(run: records.Run, tmp_path: Path) -> None:
    run.save(tmp_path / "a" / "run.json")
    assert records.Run.load(tmp_path / "a" / "run.json") == run
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["run.json"]
    written = json.loads((tmp_path / "a" / "run.json").read_text())
    assert set(written) == {"schema", "machine", "date", "options", "seconds", "records", "skipped"}
    by_case = {r["case"]: r for r in written["records"] if r["kind"] == "kernel"}
    for name in (
        "median_s",
        "p5_s",
        "p95_s",
        "gbps",
        "copy_gbps",
        "read_gbps",
        "share_of_copy",
        "share_of_floor",
        "extra_bytes",
        "calls",
    ):
        assert by_case["fold_"][name] is not None, name
    assert by_case["fold_"]["repeatable"] is True
    assert by_case["select"]["passes"] > 0


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99}', "no json"])
def test_foreign_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="no result file"):
        records.Run.load(tmp_path / "x.json")


def test_every_target_is_measured(run: records.Run) -> None:
    lines = targets.lines(run.records, "cpu")
    assert all(line.value is not None for line in lines)
    assert {line.target for line in lines} == {t for t in targets.TARGETS if t.device != "cuda"}
    assert all(line.verdict == "not measured" for line in targets.lines([], "cuda"))


def test_verdicts() -> None:
    more = next(t for t in targets.TARGETS if t.more and t.unit == "share")
    less = next(t for t in targets.TARGETS if not t.more and t.unit == "x")
    assert [more.verdict(v) for v in (more.wish, more.least, 0.0, None)] == [
        "stretch",
        "pass",
        "missed",
        "not measured",
    ]
    assert [less.verdict(v) for v in (less.wish, less.least, 99.0)] == ["stretch", "pass", "missed"]


def test_kthvalue_never_stands_alone(run: records.Run) -> None:
    told = [line.target.metric for line in targets.lines(run.records, "cpu", all_targets=False)]
    beside = "score + global select against eager score + cat + "
    assert beside + "kthvalue" in told
    assert beside + "topk(sorted=False)" in told


def test_the_picture_is_drawn(run: records.Run, tmp_path: Path) -> None:
    assert roofline.draw(run, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert text.startswith("<?xml")
    assert not roofline.draw(dataclasses.replace(run, records=[]), tmp_path / "y.svg")


# ---- RESULTS.md ------------------------------------------------------------------------------------------------------


def test_status_is_rendered_checked_and_written(
    run: records.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, document = tmp_path / "results", tmp_path / "RESULTS.md"
    run.save(results / "cpu-2026-01-02.json")
    dataclasses.replace(run, date="2026-01-01").save(results / "cpu-2026-01-01.json")
    dataclasses.replace(run, options=run.options | {"quick": True}).save(results / "cpu-2026-01-03-quick.json")
    document.write_text(f"before\n{results_table.BEGIN}\nformer\n{results_table.END}\nafter\n")
    arguments = ["--document", str(document), "--results", str(results)]
    assert results_table.main([*arguments, "--check"]) == 1
    assert results_table.main([*arguments, "--write"]) == 0
    assert results_table.main([*arguments, "--check"]) == 0
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "former" not in text
    assert "(results/cpu-2026-01-02.json)" in text
    assert "2026-01-01" not in text
    assert "quick" not in text
    assert "never run on a GPU" in text
    assert ("disturbed" in text) == (run.others > contention.QUIET)
    shown = [line for line in targets.lines(run.records, "cpu") if line.verdict == "missed"]
    assert text.count("**missed**") == len(shown)
    document.write_text("no markers")
    assert results_table.main([*arguments, "--write"]) == 1
    assert "no <!-- status:begin -->" in capsys.readouterr().err


def test_the_committed_table_says_what_the_committed_files_say() -> None:
    assert results_table.main(["--check"]) == 0


def test_partial_and_quick_runs_have_names_of_their_own(run: records.Run) -> None:
    full = command.file_name(run)
    assert full == f"{machine.file_stem(run.machine['name'])}-2026-01-02.json"
    for change in ({"stems": ["step"]}, {"params": 1_100_000_000}, {"dtype": "bf16"}, {"quick": True}):
        assert command.file_name(dataclasses.replace(run, options=run.options | change)) != full
