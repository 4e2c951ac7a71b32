"""A grid of tiny runs: what is run, what stays, what a failing or interrupted cell leaves, and what the tables say."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

import pytest
from classifier import flags, make_tiny, weights

from pins_ext.cli.main import main
from pins_ext.studies.ablation import launch
from pins_ext.studies.ablation.grid import read_grid, shipped
from pins_ext.studies.ablation.spread import Difference, Spread

GRID = """
about: a tiny grid
base: {max-steps: 12, learning-rate: 1.0e-3, eval-strategy: "no", save-strategy: "no", delta-t: 2}
methods:
  dense: {sparsity: 0}
  pins: {teacher: none}
  magnitude: {criterion: magnitude, teacher: none}
vary: {sparsity: [0.5, 0.75]}
seeds: [1, 2]
reference: pins
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, labelled files and a grid."""
    tiny = make_tiny(tmp_path_factory.mktemp("tiny"))
    (tiny / "grid.yaml").write_text(GRID)
    return tiny


def ablate(tiny: Path, output: Path, *more: str) -> list[str]:
    """The command on the tiny grid."""
    files = ["--train-file", f"{tiny}/train.csv", "--validation-file", f"{tiny}/dev.csv"]
    own = ["--model", f"{tiny}/model", *files, "--use-cpu", "--per-device-train-batch-size", "8"]
    return ["ablate", str(tiny / "grid.yaml"), *own, "--output-dir", str(output), *more]


class InThisProcess:
    """Runs cells without a process of their own, which saves the imports; remembers their commands."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, arguments: Sequence[str], log: IO[str], show: Callable[[str], None]) -> int:
        self.commands.append(list(arguments))
        with redirect_stdout(log), redirect_stderr(log):
            return main(arguments)


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> InThisProcess:
    runner = InThisProcess()
    monkeypatch.setattr(launch, "in_process_of_its_own", runner)
    return runner


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole grid, run once."""
    output = tmp_path_factory.mktemp("done") / "grid"
    with pytest.MonkeyPatch.context() as patch:
        runner = InThisProcess()
        patch.setattr(launch, "in_process_of_its_own", runner)
        assert main(ablate(tiny, output)) == 0
    # Dense is one run per seed, whatever the sparsity of the others.
    assert len(runner.commands) == 2 + 4 + 4
    return output


def test_verify_and_report_take_a_whole_grid(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(done)]) == 0
    said = capsys.readouterr().out
    assert said.count("holds  ") == 10
    assert f"{done}/pins/sparsity=0.75/seed=2: 3,072 of 4,096" in said
    assert main(["report", str(done), "-o", str(tmp_path / "cells.html")]) == 0
    html = (tmp_path / "cells.html").read_text()
    assert all(f">{name}</t" in html for name in ("dense/seed=1", "magnitude/sparsity=0.5/seed=2"))
    assert main(["report", str(done / "ablation.csv")]) == 2
    assert "ablation.csv is a file: give the folder of a run, a comparison or an ablation" in capsys.readouterr().err


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def test_the_tables_hold_what_the_runs_recorded(done: Path) -> None:
    runs = {row["cell"]: row for row in rows(done / "cells.csv")}
    assert len(runs) == 10
    records = {name: json.loads((done / name / "metrics.json").read_text()) for name in runs}
    for name, row in runs.items():
        assert float(row["eval_accuracy"]) == records[name]["final"]["metrics"]["eval_accuracy"]
        assert float(row["peak_memory_mb"]) == records[name]["timings"]["peak_memory_mb"] > 0
        assert row["steps"] == "12"
    assert {row["non_zeros"] for name, row in runs.items() if "0.75" in name} == {"1024"}
    dense = weights(done / "dense" / "seed=1")
    tensors = records["pins/sparsity=0.5/seed=1"]["final"]["tensors"]
    assert int(runs["dense/seed=1"]["non_zeros"]) == sum(int(dense[name].count_nonzero()) for name in tensors)

    table = {(r["method"], r["sparsity"], r["quantity"]): r for r in rows(done / "ablation.csv")}
    by_seed = [
        [float(runs[f"{m}/sparsity=0.5/seed={s}"]["train_seconds"]) for s in (1, 2)] for m in ("magnitude", "pins")
    ]
    row = table["magnitude", "0.5", "train_seconds"]
    assert float(row["mean"]) == pytest.approx(sum(by_seed[0]) / 2)
    gap = [a - b for a, b in zip(*by_seed, strict=True)]
    assert float(row["difference"]) == pytest.approx(sum(gap) / 2)
    # With two seeds the t quantile is 12.706, and the standard error half of the gaps' distance.
    half = 12.706 * abs(gap[0] - gap[1]) / 2
    assert float(row["difference_high"]) == pytest.approx(sum(gap) / 2 + half, rel=1e-3, abs=1e-9)
    assert table["pins", "0.5", "eval_accuracy"]["difference"] == ""
    # Both sparsities are held against the same dense runs.
    assert table["dense", "0.5", "eval_accuracy"]["mean"] == table["dense", "0.75", "eval_accuracy"]["mean"]


def test_a_difference_is_paired_by_seed() -> None:
    scores, reference = {1: 0.60, 2: 0.70, 3: 0.65, 4: 0.9}, {3: 0.62, 2: 0.66, 1: 0.59, 5: 0.1}
    found = Difference.of(scores, reference)
    assert found is not None
    # Gaps .01, .04, .03: mean .08/3, deviation .0152753, and the t quantile of two degrees of freedom is 4.30265.
    half = 4.30265 * 0.0152753 / 3**0.5
    assert (found.mean, found.n) == (pytest.approx(0.08 / 3), 3)
    assert (found.low, found.high) == (
        pytest.approx(0.08 / 3 - half, rel=1e-4),
        pytest.approx(0.08 / 3 + half, rel=1e-4),
    )
    assert Difference.of({1: 0.5}, {1: 0.25}) == Difference(0.25, None, None, 1)
    assert Difference.of({1: 0.5}, {2: 0.25}) is None
    # Two seeds that agree by chance prove nothing: no interval of no width.
    assert Difference.of({1: 0.5, 2: 0.7}, {1: 0.5, 2: 0.7}) == Difference(0.0, None, None, 2)
    same = Difference.of({1: 0.3, 2: 0.7}, {1: 0.2, 2: 0.6})
    assert same == Difference(pytest.approx(0.1), None, None, 2)
    assert Spread.of([0.6, 0.7, 0.65]) == Spread(pytest.approx(0.65), pytest.approx(0.05), 3)
    assert Spread.of([0.6]) == Spread(0.6, None, 1)


def test_overlap_is_counted_in_the_saved_models(done: Path) -> None:
    found = {(row["sparsity"], row["seed"]): row for row in rows(done / "overlap.csv")}
    assert len(found) == 4
    first, second = (weights(done / method / "sparsity=0.75" / "seed=2") for method in ("pins", "magnitude"))
    record = json.loads((done / "pins" / "sparsity=0.75" / "seed=2" / "metrics.json").read_text())
    kept = [(first[name] != 0, second[name] != 0) for name in record["final"]["tensors"]]
    common, either = (
        sum(int(part.sum()) for part in parts) for parts in zip(*((a & b, a | b) for a, b in kept), strict=True)
    )
    row = found["0.75", "2"]
    assert int(row["kept_by_both"]) == common
    assert float(row["jaccard"]) == pytest.approx(common / either)
    assert float(row["in_common"]) == pytest.approx(common / 1024)
    assert float(row["in_common_at_random"]) == pytest.approx(0.25)
    expected = sum(int(a.sum()) * int(b.sum()) / a.numel() for a, b in kept)
    assert float(row["in_common_at_random_per_tensor"]) == pytest.approx(expected / 1024)


def test_the_document_has_everything(done: Path) -> None:
    text = (done / "ablation.md").read_text()
    for part in ("## Results", "## Cost", "## Overlap of the final masks", "## How", "majority class on files"):
        assert part in text
    assert "| 0.75 | magnitude |" in text
    assert "without a result" not in text
    assert (done / "ablation.svg").read_text().count("<svg") == 1


def test_finished_cells_stay_and_lost_ones_are_run_again(
    tiny: Path, done: Path, cells: InThisProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "ablation.csv").read_text()
    lost = done / "magnitude" / "sparsity=0.5" / "seed=2"
    kept = weights(lost)
    for file in lost.iterdir():
        file.unlink()
    assert main(ablate(tiny, done, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert f"10 of 10 cells, seeds 1, 2, {tiny}/model\n" in said
    assert f" --output-dir {lost}\n" in said
    assert said.count("finished ") == 9
    assert "to run    magnitude/sparsity=0.5/seed=2" in said
    assert main(ablate(tiny, done)) == 0
    assert "9 of 10 cells are finished already" in capsys.readouterr().out
    assert len(cells.commands) == 1
    assert weights(lost).keys() == kept.keys()
    quality = [line for line in before.splitlines() if "accuracy" in line]
    assert quality == [line for line in (done / "ablation.csv").read_text().splitlines() if "accuracy" in line]


def test_another_setting_is_not_taken_for_the_same(
    tiny: Path, done: Path, cells: InThisProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ablate(tiny, done, "--max-steps", "10")) == 2
    said = capsys.readouterr().err
    assert "max_steps 12 -> 10" in said
    assert "--overwrite" in said
    assert cells.commands == []
    assert main(ablate(tiny, done, "--max-steps", "10", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert said.count("refused ") == said.count("max_steps 12 -> 10") == 10
    assert main(ablate(tiny, done, "--max-steps", "10", "--dry-run", "--overwrite")) == 0
    said = capsys.readouterr().out
    assert said.count("to run ") == said.count("--max-steps 10 ") == 10


def test_typed_flags_go_to_every_cell_but_make_no_method_another(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ablate(tiny, tmp_path / "out", "--sparsity", "0.6", "--teacher=ema", "--dry-run")) == 0
    commands = dict(re.findall(r"^to run +(\S+)\n +pins-ext train (.*)$", capsys.readouterr().out, re.M))
    assert commands.keys() == {f"{method}/seed={seed}" for method in ("dense", "pins", "magnitude") for seed in (1, 2)}
    assert "--sparsity 0 " in commands["dense/seed=1"]
    assert "--teacher ema " in commands["dense/seed=1"]
    assert "--sparsity 0.6 " in commands["magnitude/seed=2"]
    assert "--teacher none " in commands["magnitude/seed=2"]
    assert main(["ablate", "glue", "--data-dir", "here/{task}", "--seeds", "7", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"pins/task=glue-rte/seed=7\n.* --data-dir here/rte .*--task glue/rte ", said)


def test_a_failing_cell_is_reported_and_stops_no_other(
    tiny: Path, tmp_path: Path, cells: InThisProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.yaml").write_text(
        GRID.replace("magnitude: {", "magnitude: {include: [nowhere], ").replace("[0.5, 0.75]", "[0.5]")
    )
    command = ablate(tiny, tmp_path / "out", "--seeds", "3")
    command[1] = str(tmp_path / "grid.yaml")
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert len(cells.commands) == 3
    document = (tmp_path / "out" / "ablation.md").read_text()
    assert "| magnitude/sparsity=0.5/seed=3 |" in document.partition("without a result")[2]
    assert "nowhere" in document
    assert {row["method"] for row in rows(tmp_path / "out" / "cells.csv")} == {"dense", "pins"}
    assert main([*command, "--report-only"]) == 0
    assert (tmp_path / "out" / "ablation.md").read_text() == document


@pytest.mark.slow
def test_a_cell_in_a_process_of_its_own_stops_on_a_signal_and_resumes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.yaml").write_text("methods: {pins: {teacher: none}}\nseeds: [5]")
    # So many that the cell is not through before a busy test process has read its first line.
    length = ["--max-steps", "1200", "--eval-strategy", "no", "--save-strategy", "no"]
    command = ["ablate", str(tmp_path / "one.yaml"), *flags(tiny, tmp_path / "out"), *length]
    cell = tmp_path / "out" / "pins" / "seed=5"

    def interrupt(line: str) -> None:
        if "  step " in line:
            monkeypatch.undo()
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(launch, "_live", lambda *_: interrupt)
    assert main(command) == 130
    assert "0 of 1 cells done: the same command goes on from there" in capsys.readouterr().err
    (checkpoint,) = cell.with_name("seed=5.unfinished").glob("checkpoint-*")
    assert main(command) == 0
    log = cell.with_name("seed=5.log").read_text()
    assert f"resuming from {checkpoint.name}" in log
    assert "step  1200/1200" in log
    assert json.loads((cell / "metrics.json").read_text())["total_steps"] == 1200


def test_shipped_grids_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--list"]) == 0
    listed = capsys.readouterr().out
    for name in shipped():
        assert f"{name} " in listed
        assert main(["ablate", name, "--seeds", "1", "--dry-run"]) == 0
        said = capsys.readouterr().out
        grid = read_grid(name)
        assert grid.about
        assert len(grid.seeds) >= 3
        assert said.count("to run ") >= len(grid.methods)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("methods: {}", "at least one method"),
        ("methods: {a: {}}\nseed: [1]", "unknown entry 'seed'"),
        ("methods: {a: {}}\nseeds: [1, 1]", "different whole numbers"),
        ("methods: {a: {}}\nseeds: 1", "different whole numbers"),
        ("methods: {a: {}}\nvary: {sparsity: 0.5}", "vary sparsity must be a list"),
        ("methods: {a: {}}\nreference: b", "reference 'b' is none of the methods a"),
        ("methods: {a/b: {}}", "names a folder"),
        ("methods: {a: {seed: 3}}", "seed can't be set here"),
        ("methods: {a: [1]}", "must map flags to values"),
        ("methods: [a]", "methods must be a mapping"),
        ("- a", "must map base, methods"),
        ("methods: {a: {nonsense: 1}}", "a/seed=42: unknown flag --nonsense"),
        ("methods: {a: {eval-strategy: no}}", "a/seed=42: "),
    ],
)
def test_a_bad_grid_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    assert main(["ablate", str(tmp_path / "bad.yaml"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_bad_flags_are_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, reason in (
        (["--only", "nothing*"], "--only nothing* fits no cell"),
        (["--teacher-every", "x"], "invalid int value"),
        (["--seed", "3"], "seed can't be set here"),
        (["--seeds", "1", "1"], "--seeds must be different"),
        (["--report-only"], "no finished cell"),
    ):
        assert main(ablate(tiny, tmp_path / "out", *more)) in (1, 2)
        assert reason in capsys.readouterr().err
    assert main(["ablate"]) == 2
    assert "which grid?" in capsys.readouterr().err
    assert main(["ablate", "absent"]) == 2
    assert "neither a file, nor one of" in capsys.readouterr().err


def test_a_flag_that_every_method_sets_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g.yaml").write_text("methods: {a: {teacher: none}, b: {teacher: ema}}")
    assert main(["ablate", str(tmp_path / "g.yaml"), "--teacher", "latest", "--dry-run"]) == 2
    assert "every method of g sets it itself" in capsys.readouterr().err
