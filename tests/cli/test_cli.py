"""The command line on a tiny model: what it writes, shows and finds."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from classifier import WORDS, flags, weights
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from pins_ext.cli.main import main
from pins_ext.runs import command_line
from pins_ext.runs.compare import three


def test_the_result_is_an_ordinary_checkpoint_with_its_zeros(unbroken: Path, tiny: Path) -> None:
    names = {file.name for file in unbroken.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.json", "report.html"} <= names
    assert not unbroken.with_name("run.unfinished").exists()
    model = AutoModelForSequenceClassification.from_pretrained(unbroken)
    assert model.config.id2label == {0: "no", 1: "yes"}
    record = json.loads((unbroken / "metrics.json").read_text())
    assert record["model"]["name"] == f"{tiny}/model"
    tensors = record["final"]["tensors"]
    parameters = dict(model.named_parameters())
    assert all((parameters[name] == 0).sum() == t["zeros"] for name, t in tensors.items())
    assert (
        record["final"]["zeros"]
        == round(0.75 * record["final"]["weights"])
        == sum(t["zeros"] for t in tensors.values())
    )
    assert {"eval_accuracy", "test_accuracy"} <= record["final"]["metrics"].keys()
    assert [entry["step"] for entry in record["history"]] == [2, 4, 6, 8, 10, 12]
    assert record["masks"]
    assert 0 < record["timings"]["pruning_share"] < 1


def test_what_starts_is_said_and_a_conflict_is_recorded(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(["train", *flags(tiny, output, "--delta-t", "40", "--teacher", "best")]) == 0
    said = capsys.readouterr().out
    assert "training  12 steps of 8 of 60 examples, learning rate 0.001; validated on 18" in said
    assert "pruning   4,096 of 13,202 weights, 12 tensors; dense to step 1, 75.0 % from step 9" in said
    notes = json.loads((output / "metrics.json").read_text())["notes"]
    assert any(note.startswith("conflict: the final sparsity starts before the first window of 40") for note in notes)
    assert any(note.endswith("the teacher (--teacher best)") for note in notes)
    assert all(f"note      {note}" in said for note in notes)
    assert "before the first window of 40 steps" in (output / "report.html").read_text()
    # Finalizing applied the first mask, so the model is evaluated once more; where it changes nothing, it is not.
    assert said.count("step    12/12  eval loss") == 2
    assert main(["train", *flags(tiny, output, "--test-file", f"{tiny}/dev.csv")]) == 0
    said = capsys.readouterr().out
    assert said.count("step    12/12  eval loss") == 1
    metrics = json.loads((output / "metrics.json").read_text())["final"]["metrics"]
    assert metrics["eval_loss"] == metrics["test_loss"]
    assert f"the earlier result is now {output}.1" in said


def test_the_demo_is_evaluated_on_the_way_only_where_that_decides_something() -> None:
    def demo(*argv: str) -> list[object]:
        request = command_line.parse(command_line.parser("pins-ext train", "", ""), argv)
        return [each.training["eval_strategy"] for each in three(request).values()]

    assert demo() == ["no"] * 3
    assert demo("--teacher", "best") == demo("--early-stopping", "2") == ["steps"] * 3


def test_verify_confirms_and_notices(unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(unbroken)]) == 0
    assert "holds  " in capsys.readouterr().out
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in unbroken.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    record = json.loads((broken / "metrics.json").read_text())
    zeros = record["final"]["zeros"]
    (broken / "metrics.json").write_text(json.dumps(record | {"final": record["final"] | {"zeros": zeros + 5}}))
    assert main(["verify", str(broken)]) == 1
    assert f"recorded are {zeros + 5:,} zeros" in capsys.readouterr().out
    record["config"]["pruning"]["pattern"] = {"*": "none", "*layer.1.output*": "2:4"}
    (broken / "metrics.json").write_text(json.dumps(record))
    assert main(["verify", str(broken)]) == 1
    said = capsys.readouterr().out
    assert said.count("groups or blocks do not have the pattern 2:4") == 1
    assert "layer.1.output.dense.weight: " in said
    tensors = weights(broken)
    name = "bert.encoder.layer.1.output.dense.weight"
    tensors[name][tensors[name] == 0] = 1e-9
    tensors["bert.embeddings.word_embeddings.weight"][3, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert main(["verify", str(broken)]) == 1
    said = capsys.readouterr().out
    assert f"{name} has 0 zeros" in said
    assert "word_embeddings.weight holds NaN" in said
    assert "weights that the mask prunes are not zero" in said
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert main(["verify", str(broken)]) == 1
    assert "transformers can't load it" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "absent")]) == 2


def test_a_pattern_is_pruned_named_and_verified(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert main(["train", *flags(tiny, output, "--sparsity", "0.5", "--pattern", "2:4")]) == 0
    assert "PINS 50 % 2:4" in capsys.readouterr().out
    record = json.loads((output / "metrics.json").read_text())
    assert record["config"]["pruning"]["pattern"] == "2:4"
    pruned = weights(output)
    for name in record["final"]["tensors"]:
        assert ((pruned[name] != 0).view(len(pruned[name]), -1, 4).sum(-1) <= 2).all()
    assert "PINS 50 % 2:4" in (output / "report.html").read_text()
    assert main(["verify", str(output)]) == 0
    assert "(50.0000 %), pattern 2:4" in capsys.readouterr().out
    assert main(["inspect", str(output)]) == 0
    assert "2:4 in rows in 12 matrices" in capsys.readouterr().out
    assert main(["train", *flags(tiny, tmp_path / "no", "--pattern", "2:4")]) == 2
    assert "2,048: set sparsity to 0.5" in capsys.readouterr().err


def test_report_is_written_again_and_compares(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (unbroken / "report.html").unlink()
    assert main(["report", str(unbroken)]) == 0
    assert "Sparsity per tensor" in (unbroken / "report.html").read_text()
    assert main(["report", str(unbroken), str(unbroken), "-o", str(tmp_path / "both.html"), "--title", "Two"]) == 0
    assert "<h1>Two</h1>" in (tmp_path / "both.html").read_text()
    capsys.readouterr()
    for wrong, reason in (
        ([str(tmp_path / "absent")], "is not the folder of a run"),
        ([str(tmp_path / "both.html")], "is a file: give the folder of a run"),
        ([str(unbroken), "-o", str(tmp_path / "absent" / "x.html")], "there is no folder"),
        ([str(unbroken), "-o", str(tmp_path)], "is a folder: name a file"),
    ):
        assert main(["report", *wrong]) == 2
        said = capsys.readouterr().err
        assert reason in said
        assert said.count("\n") == 1


def test_plan_trains_and_writes_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = flags(tiny, tmp_path / "run")
    asked, place = own[:-2], own[-2:]
    assert main(["plan", *asked, *place]) == 2
    assert (
        capsys.readouterr().err
        == "pins-ext plan: --output-dir is a flag of train that plan does not take: leave it out\n"
    )
    assert main(["plan", *asked]) == 0
    said = capsys.readouterr().out
    assert "4,096 prunable weights in 12 tensors" in said
    assert "12 steps of 8" in said
    assert "schedule cubic" in said
    assert said.count("also occur in training") == 1
    assert "reach the limit" not in said
    teacher = "teacher latest, a snapshot every step, weight adaptive, temperature 2, 0.1 MiB"
    assert said.endswith(f"self-regularization: {teacher}\n")
    (tmp_path / "train.yaml").write_text("output-dir: elsewhere\nlabel: mine\nsparsity: 0.5")
    assert main(["plan", *asked, "--config", str(tmp_path / "train.yaml"), "--teacher", "none"]) == 0
    (tmp_path / "train.yaml").unlink()
    assert not list(tmp_path.iterdir())


def test_compare_trains_three_and_says_who_won(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", *flags(tiny, tmp_path / "all", "--compare", "--save-strategy", "no")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "majority class" in said
    assert "magnitude 75 %" in said
    assert "PINS 75 % equals magnitude 75 % and equals dense." in said
    assert "18 validation examples: an accuracy has a standard error of 10.2 points (Wilson)." in said
    html = (tmp_path / "all" / "report.html").read_text()
    assert html.count("<b>Sparsity per tensor") == 2
    records = {
        kind: json.loads((tmp_path / "all" / kind / "metrics.json").read_text())
        for kind in ("dense", "pins", "magnitude")
    }
    assert records["dense"]["final"]["weights"] == 0
    assert records["magnitude"]["config"]["self_regularization"] == {}
    assert records["pins"]["config"]["self_regularization"]["teacher"] == "latest"
    # All three are there: resuming has nothing to do, and says so by being quick.
    assert main([*command, "--resume"]) == 0
    assert main(["report", str(tmp_path / "all")]) == 0
    assert main(["verify", str(tmp_path / "all")]) == 0
    assert capsys.readouterr().out.count("holds") == 3
    (tmp_path / "all" / "mine.txt").write_text("keep")
    assert main(command) == 2


@pytest.mark.parametrize(
    "more",
    [
        ("--optimizer", "adafactor"),
        ("--optim", "sgd"),
        ("--sparsity", "0"),
        ("--dtype", "bfloat16", "--state-dtype", "bfloat16"),
        ("--score-gradient", "task", "--teacher", "ema"),
        ("--early-stopping", "2", "--save-steps", "6"),
        ("--label-type", "number", "--label-column", "score"),
    ],
)
def test_other_ways_of_training(tiny: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    rows = [f"{WORDS[i % 3]} {WORDS[3 + i % 7]},{i % 3},{i % 3 / 2}" for i in range(24)]
    (tmp_path / "numbers.csv").write_text("text,label,score\n" + "\n".join(rows) + "\n")
    files = ["--train-file", f"{tmp_path}/numbers.csv", "--validation-file", f"{tmp_path}/numbers.csv"]
    assert main(["train", *flags(tiny, tmp_path / "run", *files, *more)]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["final"]["zeros"] == (0 if "0" in more else 3072)
    assert record["config"]["training"]["optimizer"] == (more[1] if more[0].startswith("--optim") else "adamw")


@pytest.mark.parametrize("teacher", ["none", "latest"])
def test_accumulated_losses_are_of_the_size_of_one(tiny: Path, tmp_path: Path, teacher: str) -> None:
    """Two classes and no knowledge: ln 2, however many batches make a step."""
    for accumulated in (1, 4):
        output = tmp_path / str(accumulated)
        steps = [
            "--gradient-accumulation-steps",
            str(accumulated),
            "--per-device-train-batch-size",
            str(8 // accumulated),
        ]
        assert main(["train", *flags(tiny, output), *steps, "--teacher", teacher, "--logging-steps", "1"]) == 0
        first = json.loads((output / "metrics.json").read_text())["history"][0]
        assert first["loss"] == pytest.approx(math.log(2), abs=0.15)


def test_doctor_finds_a_sound_installation(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"{tiny}/model"]) == 0
    said = capsys.readouterr().out
    assert "agree with the reference, bit for bit" in said
    assert "model: float32" in said.replace(f"{tiny}/", "")
    assert said.endswith("ready\n")
    assert main(["doctor", "no/such/model"]) == 1
    said = capsys.readouterr().out
    assert "no/such/model is no folder here, and as a hub name it could not be loaded" in said
    assert "ready" not in said


def test_doctor_finds_a_broken_extension(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pins_ext.reference.instant_score", lambda *args: torch.zeros(4099))
    assert main(["doctor"]) == 1
    assert "BROKEN operators" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "pins_ext._C", None)
    assert main(["doctor"]) == 1
    assert "does not load" in capsys.readouterr().out
