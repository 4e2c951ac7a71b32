"""Every family of tasks from the command line, end to end on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import decoder_folder, encoder_folder

from pins_ext.cli.main import main
from pins_ext.runs.findings import verdict
from pins_ext.runs.record import Final, RunRecord

CONTEXT = "ann met bob in york"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both tiny models, and data of every family."""
    root = tmp_path_factory.mktemp("data")
    encoder_folder(root / "encoder")
    decoder_folder(root / "decoder")
    (root / "names.conll").write_text("ann\tB-person\nmet\tO\nbob\tB-person\n\nin\tO\nyork\tB-place\n\n" * 10)
    qas = [{"question": "who ?", "answers": [{"text": "ann", "answer_start": 0}]}, {"question": "why ?", "answers": []}]
    articles = [{"title": str(i), "paragraphs": [{"context": CONTEXT, "qas": qas}]} for i in range(8)]
    (root / "questions.json").write_text(json.dumps({"data": articles}))
    (root / "text.txt").write_text("some words and some more words\n" * 30)
    (root / "wiki").mkdir()
    for name in ("train", "valid"):
        (root / "wiki" / f"{name}.txt").write_text("some words\n" * 9)
    pairs = "mr,ref\n" + "name[A],A is here.\nname[B],B is here.\nname[B],There is B.\n" * 8
    for name in ("trainset", "devset", "testset_w_refs"):
        (root / f"{name}.csv").write_text(pairs)
    return root


def command(data: Path, output: Path, *more: str) -> list[str]:
    pruning = ["--sparsity", "0.5", "--delta-t", "2", "--learning-rate", "1e-2"]
    length = ["--max-steps", "8", "--eval-steps", "4", "--save-steps", "4", "--max-length", "24", "--use-cpu"]
    return ["train", *length, *pruning, "--output-dir", str(output), *more]


FAMILIES = {
    "entities": (["--model", "encoder", "--train-file", "names.conll"], "eval_f1", "BertForTokenClassification"),
    "questions": (
        ["--model", "encoder", "--train-file", "questions.json", "--doc-stride", "4"],
        "eval_f1",
        "BertForQuestionAnswering",
    ),
    "language": (
        ["--model", "decoder", "--random-init", "--train-file", "text.txt"],
        "eval_perplexity",
        "GPT2LMHeadModel",
    ),
    "data-to-text": (
        ["--model", "decoder", "--random-init", "--task", "e2e", "--data-dir", ".", "--max-new-tokens", "8"],
        "eval_bleu",
        "GPT2LMHeadModel",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_evaluates_and_holds(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    monkeypatch.chdir(data)
    flags, metric, kind = FAMILIES[family]
    # Saved where it is evaluated.
    best = ["--load-best-model-at-end", "--eval-steps", "2", "--max-train-samples", "16", "--max-eval-samples", "6"]
    assert main(command(data, tmp_path / "run", *flags, *best)) == 0
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    final, examples = record["final"], record["data"]["examples"]
    assert (final["metric"], record["model"]["class"]) == (metric, kind)
    assert final["metrics"][metric] is not None
    assert final["greater_is_better"] == (metric != "eval_perplexity")
    assert final["zeros"] * 2 == final["weights"]
    assert metric in record["data"]["baseline"]
    assert examples["train"] <= 16
    assert ("test" in examples) == (family == "data-to-text") == ("test_bleu" in final["metrics"])
    assert record["config"]["self_regularization"]["teacher"] == "latest"
    assert main(["verify", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert record["data"]["baseline_name"] in said
    assert ("lower is better" in said) == (family == "language")
    assert main(command(data, tmp_path / "other", *flags, "--metric-for-best-model", "accuracies")) == 2
    told = capsys.readouterr().err
    assert "--metric-for-best-model accuracies: an evaluation of" in told
    assert f"{metric.removeprefix('eval_')}, " in told
    asked = command(data, tmp_path / "run", *flags)[1:]
    place = asked.index("--output-dir")
    assert main(["plan", *asked[:place], *asked[place + 2 :]]) == 0
    assert f"metric    {metric.removeprefix('eval_')}" in capsys.readouterr().out


def test_the_best_language_model_is_the_least_perplexed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    flags = [*FAMILIES["language"][0], "--load-best-model-at-end", "--warmup", "1", "--cooldown", "6"]
    # With a rate this high the model gets worse again.
    assert main(command(data, tmp_path / "run", *flags, "--eval-steps", "2", "--save-steps", "2")) == 0
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["config"]["training"]["greater_is_better"] is False
    at_target = [entry["eval_perplexity"] for entry in record["evaluations"] if entry.get("at_target")]
    assert len(set(at_target)) > 1
    assert record["final"]["metrics"]["eval_perplexity"] == pytest.approx(min(at_target))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--task", "wikitext2", "--data-dir", "wiki"], "wikitext2 needs a causal language model"),
        (["--train-file", "text.txt", "--model", "decoder"], "--random-init"),
        (["--train-file", "text.txt", "--model", "encoder"], "sees the token that it is to predict"),
        (["--train-file", "names.conll", "--num-beams", "2"], "--num-beams has no meaning for names.conll"),
        (["--task", "squadron"], "unknown task squadron; known are stdlib"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    more: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(data)
    assert main(command(data, tmp_path / "run", *more)) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert reason in said[0]


def test_the_verdict_knows_the_direction() -> None:
    def record(label: str, value: float, **final: Any) -> RunRecord:
        return RunRecord(label=label, final=Final("m", metrics={"m": value}, **final))

    shares = [record(label, value) for label, value in (("dense", 0.9), ("PINS", 0.85), ("magnitude", 0.8))]
    assert verdict(shares, "m") == "PINS beats magnitude (+5.0 points) and is 5.0 points below dense."
    equal = [record(label, value) for label, value in (("dense", 0.9), ("PINS", 0.8004), ("magnitude", 0.8))]
    assert verdict(equal, "m") == "PINS equals magnitude and is 10.0 points below dense."
    lower = {"greater_is_better": False, "points": 1.0}
    texts = [record(label, value, **lower) for label, value in (("dense", 20.0), ("PINS", 25.0), ("magnitude", 24.0))]
    assert verdict(texts, "m") == (
        "PINS does not beat magnitude (+1.0 points; lower is better) and is 5.0 points above dense."
    )
