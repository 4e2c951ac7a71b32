"""The HTML report: all that was recorded is in it, nothing is loaded from outside, odd records don't break it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import pins_ext
from pins_ext.cli.main import main
from pins_ext.files.plain import to_json, typed
from pins_ext.runs import charts, findings
from pins_ext.runs import html as report
from pins_ext.runs.record import FORMAT, RECORD, RecordError, RunRecord, Settings, as_read, read_record

KINDS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")


def record(label: str = "PINS 80 %", steps: int = 200, **changes: Any) -> RunRecord:
    """The record of a made-up run."""
    return typed(RunRecord, data(label, steps) | changes, "a record")


def data(label: str = "PINS 80 %", steps: int = 200) -> dict[str, Any]:
    """The same as JSON has it."""
    history, masks = [], []
    for step in range(10, steps + 1, 10):
        progress = min(1.0, max(0.0, (step / steps - 0.1) / 0.6))
        target = 0.8 * (1 - (1 - progress) ** 3)
        history.append({"step": step, "loss": 1.9 * math.exp(-step / 90) + 0.4})
        masks.append(
            {
                "step": step,
                "sparsity": target,
                "target_sparsity": target,
                "threshold": 1e-9 * (1 + 20 * target**3),
                "churn": 0.04 * math.exp(-step / 80),
            }
        )
    tensors = {
        f"bert.encoder.layer.{layer}.{kind}.weight": {"weights": 1000, "zeros": 700 + 20 * layer + 15 * k}
        for layer in range(6)
        for k, kind in enumerate(KINDS)
    }
    evaluations = [
        {"step": step, "eval_accuracy": 0.4 + step / 600, "at_target": step > 140} for step in range(50, steps + 1, 50)
    ]
    return {
        "format": FORMAT,
        "version": 1,
        "label": label,
        "created": "2026-11-20T10:00:00+00:00",
        "model": {"name": "all-MiniLM-L6-v2"},
        "data": {"task": "prose", "baseline": {"eval_accuracy": 0.27}, "baseline_name": "majority class"},
        "total_steps": steps,
        "config": {"pruning": {"sparsity": 0.8, "delta_t": 10}, "training": {"learning_rate": 1e-4}},
        "schedule": [{"step": m["step"], "target_sparsity": m["target_sparsity"]} for m in masks],
        "history": history,
        "masks": masks,
        "evaluations": evaluations,
        "final": {
            "metric": "eval_accuracy",
            "metrics": {"eval_accuracy": 0.71, "eval_loss": 0.9, "eval_runtime": 3.0},
            "weights": 24000,
            "zeros": 19200,
            "tensors": tensors,
        },
        "timings": {"train_seconds": 44.0, "step_ms": 210.0, "pruning_ms": 6.1, "pruning_share": 0.029},
        "versions": {"pins_ext": "0.1.0", "torch": "2.13.0"},
    }


def dense(label: str = "dense") -> RunRecord:
    """A run that pruned nothing."""
    history = data()["history"]
    final = {"metric": "eval_accuracy", "metrics": {"eval_accuracy": 0.74}, "weights": 0, "zeros": 0, "tensors": {}}
    return record(
        label, schedule=[], history=history, masks=[], final=final, timings={"train_seconds": 40.0, "step_ms": 190.0}
    )


def test_one_run_shows_every_picture_and_number() -> None:
    html = report.render([record()])
    for title in ("Sparsity", "Training loss", "Evaluation", "Threshold", "Mask churn", "Sparsity per tensor"):
        assert f"<b>{title}" in html
    for text in ("19,200 of 24,000 weights are zero", "80.00 %", "0.7100", "2.9 %", "majority class", "delta-t"):
        assert text in html


def test_runs_are_drawn_side_by_side() -> None:
    html = report.render([record(), record("magnitude 80 %"), dense()], title="Demo")
    assert html.count("<b>Training loss</b>") == 1
    assert html.count("<b>Sparsity per tensor") == 2
    results = html[html.index('aria-label="results"') : html.index("<h2>Cost")]
    for label in ("PINS 80 %", "magnitude 80 %", "dense", "majority class"):
        assert f'<th scope="row">{label}</th>' in results


def test_an_accuracy_has_a_standard_error() -> None:
    told = data()["data"] | {"examples": {"train": 9, "validation": 677}}
    other = data()["final"] | {"metrics": {"eval_accuracy": 0.5362}}
    # sqrt(.71 * .29 / 677) and sqrt(.5362 * .4638 / 677)
    shown = report.render([record(data=told), record(data=told, final=other)])
    assert "677 validation examples: an accuracy has a standard error of 1.7 to 1.9 points" in shown
    # As all of them were right, a normal distribution would know it exactly.
    certain = record(data=told, final=data()["final"] | {"metrics": {"eval_accuracy": 1.0}})
    assert "a standard error of 0.1 points" in findings.standard_error([certain])
    other = data()["final"] | {"metric": "eval_f1", "metrics": {"eval_f1": 0.7, "eval_accuracy": 0.7}}
    assert findings.standard_error([record(data=told, final=other)]) == ""
    assert findings.standard_error([record()]) == ""


def three() -> list[RunRecord]:
    """A comparison: dense, by PINS with a teacher, by magnitude with far larger thresholds."""
    told = data()["data"] | {"examples": {"train": 9, "validation": 677}}
    teacher = {"teacher": "latest", "memory": {"teacher": 4e6}}
    config = {"pruning": {"criterion": "pins"}, "self_regularization": teacher}
    final = data()["final"] | {"metrics": {"eval_accuracy": 0.615}}
    masks = [mask | {"threshold": 1e6 * mask["threshold"]} for mask in data()["masks"]]
    magnitude = record("magnitude", data=told, config={"pruning": {"criterion": "magnitude"}}, masks=masks, final=final)
    return [
        replace(dense(), data=magnitude.data, config=Settings()),
        record(data=told, config=config),
        magnitude,
    ]


def test_a_comparison_begins_with_its_finding() -> None:
    html = report.render(three())
    assert "PINS 80 % beats magnitude (+9.5 points) and is 3.0 points below dense." in html
    for others in (three()[:2], [*three(), three()[1]], [dense(), dense(), dense()]):
        assert findings.comparison(others) == ""


def test_an_accuracy_has_an_interval() -> None:
    low, high = findings.interval(three()[1]) or (0, 0)
    # Wilson's interval holds the rates whose expected deviation is 1.96 standard errors at most.
    for bound in (low, high):
        assert abs(0.71 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 677))
    assert low < 0.71 < high
    assert findings.interval(record()) is None
    scores = charts.pictures(three())[0]
    assert scores.title == "Scores"
    assert "Wilson" in scores.caption
    assert "dense 0.7400, PINS 80 % 0.7100, magnitude 0.6150" in scores.told


def test_each_threshold_has_an_axis_of_its_own() -> None:
    svg = next(p.svg for p in charts.pictures(three()) if p.title == "Threshold")
    # Each cuts its line by its own frame.
    assert svg.count("<clipPath") == 2
    assert "mathdefault" not in svg


def test_a_loss_with_the_distance_in_it_is_not_drawn_as_one_without() -> None:
    def loss(records: list[RunRecord]) -> charts.Picture:
        return next(p for p in charts.pictures(records) if p.title == "Training loss")

    assert "Dashed" in loss(three()).caption
    assert loss(three()).svg.count("stroke-dasharray") > loss(three()[:1]).svg.count("stroke-dasharray")
    alone = three()
    halves = tuple({**entry, "task_loss": (entry["loss"] or 0) / 2} for entry in alone[1].history)
    alone[1] = replace(alone[1], history=halves)
    assert "Dashed" not in loss(alone).caption
    assert loss(alone).svg != loss(three()).svg


def test_the_cost_of_a_teacher_is_shown() -> None:
    html = report.render(three())
    cost = html[html.index('aria-label="cost"') : html.index("<h2>Training")]
    assert f"<td>1.11 {report.TIMES}</td>" in cost
    assert "<td>latest, one more forward pass</td><td>4.0 MB</td>" in cost


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 50, bias=False), torch.nn.Linear(50, 7))
    with torch.no_grad():
        model[0].weight[torch.rand(50, 30) < 0.8] = 0
    zeros = int((model[0].weight == 0).sum())
    tensors = {"0.weight": {"weights": 1500, "zeros": zeros, "shape": [50, 30]}}
    final = data()["final"] | {"tensors": tensors, "weights": 1500, "zeros": zeros}
    weights = sum(p.numel() for p in model.parameters())
    found = findings.size(record(final=final, model={"name": "m", "dtype": "float32", "weights": weights}))
    written = pins_ext.save_sparse(model, tmp_path / "sparse")
    assert found is not None
    assert found.dense == written["dense"]
    # The file pads some arrays to whole words.
    assert found.packed <= written["stored"] <= found.packed + 64


def test_the_lines_that_load_a_result_work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"name": "m", "auto_class": "AutoModelForSequenceClassification"}
    page = report.render([record(model=model)])
    code = unescape(re.search(r"<code>(.*?)</code>", page, re.S)[1])  # type: ignore[index]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace('folder = "."', f"folder = {str(tiny / 'model')!r}"), names)
    assert type(names["model"]).__name__.endswith("ForSequenceClassification")
    assert "<pre" not in report.render([record(model=model | {"auto_class": "x; import os"})])


def test_pictures_and_tables_have_names_and_the_colours_of_the_page() -> None:
    html = report.render(three())
    assert html.count("<svg") == len(re.findall(r'<svg role="img" aria-label="[^"]{10,}"', html)) > 4
    assert html.count("<table>") == len(re.findall(r'role="region" aria-label="[^"]+" tabindex="0"><table>', html)) > 3
    body = html[html.index("<body>") :]
    for colour in charts.COLORS[:3]:
        assert colour not in body
    assert "var(--run-0)" in body
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert used <= set(re.findall(r"(--[\w-]+): #", html))


def test_the_scores_are_a_picture_of_their_own() -> None:
    svg = charts.scores_alone(three())
    assert svg is not None
    assert "var(" not in svg
    assert ElementTree.fromstring(svg).get("width")
    assert charts.scores_alone(three()[:1]) is None


def test_the_command_writes_the_scores_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for made in three():
        (tmp_path / made.label).mkdir()
        (tmp_path / made.label / RECORD).write_text(to_json(made))
    folders = [str(tmp_path / made.label) for made in three()]
    assert main(["report", *folders, "-o", str(tmp_path / "scores.svg")]) == 0
    assert (tmp_path / "scores.svg").read_text() == charts.scores_alone(three())
    assert main(["report", *folders, "-o", str(tmp_path / "titled.svg"), "--title", "Ours"]) == 0
    assert ">Ours<" in (tmp_path / "titled.svg").read_text()
    capsys.readouterr()
    assert main(["report", folders[0], "-o", str(tmp_path / "one.svg")]) == 2
    assert "two runs or more" in capsys.readouterr().err
    assert not (tmp_path / "one.svg").exists()
    assert main(["report", *folders, "-o", str(tmp_path / "scores.pdf")]) == 2
    assert "scores.pdf: the name must end in .html or .svg" in capsys.readouterr().err


def test_equal_labels_are_numbered() -> None:
    html = report.render([record(), record()])
    assert "PINS 80 % (1)" in html
    assert "PINS 80 % (2)" in html


def test_runs_of_several_tasks_are_not_to_be_compared() -> None:
    other = record("other", data=data()["data"] | {"task": "glue/rte"})
    said = "These runs are of several tasks"
    assert said in report.render([record(), other])
    assert '<th scope="col">task</th>' in report.render([record(), other])
    assert said not in report.render([record(), record("other")])
    assert '<th scope="col">task</th>' not in report.render([record(), record("other")])


def test_a_verdict_and_times_are_of_one_task() -> None:
    runs = three()
    step, without = runs[1].timings.step_ms, runs[0].timings.step_ms
    assert step
    assert without
    ratio = f"{step / without:.2f} {report.TIMES}"
    assert findings.comparison(runs)
    assert ratio in report.render(runs)
    elsewhere = [replace(runs[0], data=replace(runs[0].data, task="glue/rte")), *runs[1:]]
    assert not findings.comparison(elsewhere)
    assert ratio not in report.render(elsewhere)


def test_equal_labels_get_their_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("a/seed=1", "a/seed=2", "b"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / RECORD).write_text(to_json(dense() if place == "b" else record()))
    output = tmp_path / "all.html"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(output)]) == 0
    html = output.read_text()
    assert "PINS 80 % (a/seed=1)" in html
    assert "PINS 80 % (a/seed=2)" in html
    assert "dense (" not in html
    assert main(["report", str(tmp_path / "b"), str(tmp_path / "b"), "-o", str(output)]) == 0
    assert "dense (2)" in output.read_text()


def test_the_page_loads_nothing() -> None:
    html = report.render([record(), dense()])
    namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.search(r"(src|href)=[\"'](?!#)|url\((?!#)|@import|<script|https?://", namespaces)


def test_pictures_are_well_formed_and_repeatable() -> None:
    first, second = charts.pictures([record()]), charts.pictures([record()])
    assert [p.svg for p in first] == [p.svg for p in second]
    for picture in first:
        assert ElementTree.fromstring(picture.svg).tag.endswith("svg")


def test_pictures_of_one_page_share_no_ids() -> None:
    named = [re.findall(r'\bid="([^"]*)"', p.svg) for p in charts.pictures([record(), record("other")])]
    assert sum(map(len, named)) == len(set().union(*named)) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": [], "history": [], "masks": [], "evaluations": []},
        {"masks": [{"step": 1, "sparsity": 0.0, "target_sparsity": 0.0, "threshold": float("nan"), "churn": None}]},
        {"timings": {}, "versions": {}, "config": {}, "data": {}, "model": {}},
        {"label": "<script>alert(1)</script>"},
    ],
)
def test_odd_records_render(changes: dict[str, Any]) -> None:
    html = report.render([record(**changes)])
    assert html.endswith("</html>\n")
    assert "<script" not in html


def test_a_run_that_learned_nothing_says_so_and_what_to_try() -> None:
    """An accuracy that always answering with the same class has too."""
    assert "no better" not in report.render([record()])
    poor = data()["final"] | {"metrics": {"eval_accuracy": 0.27}}
    said = findings.no_better_than_baseline(record(final=poor))
    assert said.startswith(
        "PINS 80 %: accuracy 0.2700 is no better than majority class, which needs no model and has 0.27"
    )
    assert all(flag in said for flag in ("--num-train-epochs", "--learning-rate", "--sparsity"))
    assert "is no better than majority class" in report.render([record(final=poor)])
    loss = {"metric": "eval_perplexity", "greater_is_better": False, "metrics": {"eval_perplexity": 90.0}}
    told = {"task": "t", "baseline": {"eval_perplexity": 80.0}, "baseline_name": "token frequencies"}
    assert "is no better than token frequencies" in findings.no_better_than_baseline(record(final=loss, data=told))
    better = loss | {"metrics": {"eval_perplexity": 70.0}}
    assert findings.no_better_than_baseline(record(final=better, data=told)) == ""
    assert "--sparsity" not in findings.no_better_than_baseline(record(final=loss, data=told))


HOSTILE = '<img src=x onerror="alert(1)">'


def hostile(value: Any) -> Any:
    """A record whose every text is markup."""
    if isinstance(value, dict):
        return {name: hostile(item) for name, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_markup_in_a_record_is_text() -> None:
    """metrics.json may come from anybody: whatever it holds, nothing of it is live in the page."""
    made = hostile(data()) | {"format": FORMAT, "notes": [HOSTILE]}
    made["final"] |= {"metric": HOSTILE, "metrics": {HOSTILE: 0.5}}
    made["final"]["tensors"] = {f"{HOSTILE}.weight": {"weights": 10, "zeros": 9}}
    made["data"]["baseline"] = {HOSTILE: 0.25}
    made["config"]["pruning"][HOSTILE] = [HOSTILE, {HOSTILE: HOSTILE}]
    made["versions"][HOSTILE] = HOSTILE
    html = report.render([typed(RunRecord, made, "a record")])
    assert "<img" not in html
    assert "&lt;img" in html
    page = re.sub(r"(?s)^.*?<body>|<meta[^>]*>", "", html).replace("</html>", "").replace("</body>", "")
    ElementTree.fromstring(f"<div>{page}</div>")


@pytest.mark.parametrize("label", ["$\\undefined$", "costs $5 or $6", 'font: 1px x; 2" y', 'a style="font: 9px b"'])
def test_a_label_is_drawn_as_it_is_written(label: str) -> None:
    drawn = charts.pictures([record(label), record("other")])
    assert len(drawn) == 8
    for picture in drawn[:6]:
        texts = [
            "".join(element.itertext())
            for element in ElementTree.fromstring(picture.svg).iter()
            if element.tag.endswith("text")
        ]
        assert label in texts


def test_pictures_take_the_font_of_the_page() -> None:
    for picture in charts.pictures([record()]):
        assert "font-family: inherit" in picture.svg
        assert "DejaVu" not in picture.svg


def test_unnumbered_tensors_are_bars() -> None:
    tensors = {"left.weight": {"weights": 10, "zeros": 9}, "right.weight": {"weights": 4, "zeros": 1}}
    final = data()["final"] | {"tensors": tensors}
    assert "left.weight" in charts.pictures([record(final=final)])[-1].svg


def test_records_are_checked(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"has no metrics\.json"):
        read_record(tmp_path)
    file = tmp_path / RECORD
    for content, reason in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"format": "other"}', "not written by pins-ext"),
        (json.dumps(data() | {"version": 2}), "version 2, this software reads 1"),
        (json.dumps(data() | {"final": {}}), "final: metric is missing"),
        (json.dumps(data() | {"total_steps": HOSTILE}), "total_steps must be a whole number"),
        (json.dumps(data() | {"total_steps": True}), "total_steps must be a whole number"),
        (json.dumps(data() | {"masks": [{"sparsity": 0.5}]}), "an entry of masks has no step"),
        (json.dumps(data() | {"history": [{"step": 1, "loss": "low"}]}), "history.0..loss must be a number"),
        (json.dumps(data() | {"data": {"examples": {"train": None}}}), "examples.train must be a whole number"),
        (json.dumps(data() | {"notes": "one"}), "notes must be a list"),
        (json.dumps(data() | {"config": 3}), "config must be an object"),
    ):
        file.write_text(content)
        with pytest.raises(RecordError, match=reason):
            read_record(tmp_path)
    file.write_text(json.dumps(data()))
    assert read_record(tmp_path) == read_record(file) == record()


def test_a_record_is_written_as_it_is_read(tmp_path: Path) -> None:
    final = data()["final"] | {"metrics": {"eval_accuracy": float("nan")}}
    made = as_read(record(final=final))
    assert made.final.score is None
    (tmp_path / RECORD).write_text(to_json(made))
    assert read_record(tmp_path) == made
    written = json.loads((tmp_path / RECORD).read_text())
    assert list(written)[:5] == ["format", "version", "label", "created", "model"]
    assert list(written["model"]) == ["name", "class", "auto_class", "dtype", "weights"]
    # What was not measured is left out.
    assert "optimizer_ms" not in written["timings"]
    assert "threshold" not in written["final"]
