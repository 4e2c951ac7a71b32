"""Questions: SQuAD's layout, windows over long contexts, the best span, and no answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
from small_models import word_pieces
from transformers import EvalPrediction

from pins_ext.tasks import TaskArguments, TaskError, load_task
from pins_ext.tasks.families.questions import QuestionTask, best_span
from pins_ext.tasks.metrics import evaluate_answers
from pins_ext.tasks.sources.squad import QUESTION_SETS, read_squad

CONTEXT = "one two three four five six seven eight nine ten"


def article(title: str, *answers: str | None, context: str = CONTEXT) -> dict[str, Any]:
    found = [[] if a is None else [{"text": a, "answer_start": context.index(a)}] for a in answers]
    qas = [{"id": f"{title}{i}", "question": " which ?", "answers": each} for i, each in enumerate(found)]
    return {"title": title, "paragraphs": [{"context": context, "qas": qas}]}


def write(path: Path, *articles: dict[str, Any]) -> str:
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return str(path)


def load(**arguments: Any) -> QuestionTask:
    return cast(QuestionTask, load_task(TaskArguments(**arguments)))


def test_articles_are_not_shared_between_splits(tmp_path: Path) -> None:
    file = write(tmp_path / "all.json", *(article(f"t{i}", "one", "two", "ten") for i in range(10)))
    task = load(train_file=file, eval_fraction=0.3)
    assert task.sizes() == {"train": 21, "validation": 9}
    assert not set(task.train["article"]) & set(task.validation["article"])
    assert "validation is 3 of 10 articles" in task.notes[0]
    other = load(task="squad", data_dir=str(tmp_path), eval_fraction=0.3, split_seed=1)
    assert set(other.validation["article"]) != set(task.validation["article"])
    assert load(train_file=file, max_train_samples=5, max_eval_samples=2).sizes() == {"train": 5, "validation": 2}
    with pytest.raises(TaskError, match="one article cannot be both"):
        load(train_file=write(tmp_path / "one.json", article("t", "one")))


def test_a_folder_has_train_and_dev_or_one_file(tmp_path: Path) -> None:
    write(tmp_path / "train-v2.0.json", article("a", "one", None))
    write(tmp_path / "dev-v2.0.json", article("b", "two"))
    task = load(task="squad-v2", data_dir=str(tmp_path))
    assert (task.name, task.sizes(), task.null_score_threshold) == ("squad_v2", {"train": 2, "validation": 1}, 0.0)
    (tmp_path / "train-v2.0.json").rename(tmp_path / "other.json")
    with pytest.raises(TaskError, match=r"has no train\.json for squad, nor one \.json file to split; it has dev-v2"):
        load(task="squad", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"data": [{"title": "x"}]}, r"data\[0\]: paragraphs must be a list"),
        ({"data": [{"paragraphs": [{"context": 3, "qas": []}]}]}, r"paragraphs\[0\]: context must be a text"),
        (
            {"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "?"}]}]}]},
            r"qas\[0\]: answers must be a list",
        ),
        ({"data": []}, "holds no questions"),
    ],
)
def test_faults(tmp_path: Path, document: Any, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(document))
    with pytest.raises(TaskError, match=message):
        read_squad(file)


def test_windows_hold_the_answer_or_point_to_the_first_token(tmp_path: Path) -> None:
    train = write(tmp_path / "train.json", article("a", "seven eight", None))
    task = load(train_file=train, validation_file=train, max_length=30, doc_stride=8).tokenized(word_pieces())
    # [CLS] w h i c h ? [SEP] + 21 of the 39 letters + [SEP], moving by 13.
    rows = [row for row in task.validation if row["example"] == 0]
    assert len(rows) == 3
    answers = []
    for row in rows:
        start, end = row["start_positions"], row["end_positions"]
        if start or end:
            answers.append(CONTEXT[row["offsets"][start][0] : row["offsets"][end][1]])
    assert answers
    assert set(answers) == {"seven eight"}
    assert all(row["start_positions"] == row["end_positions"] == 0 for row in task.validation if row["example"] == 1)
    assert "offsets" not in task.train.column_names
    assert any(note.startswith("2 training questions make 6 windows") for note in task.notes)
    with pytest.raises(TaskError, match="--doc-stride 40 leaves windows no way to move"):
        load(train_file=train, validation_file=train, max_length=30, doc_stride=40).tokenized(word_pieces())


def test_the_best_span_is_in_the_context_forward_and_short() -> None:
    offsets = np.array([[-1, -1], [-1, -1], [0, 3], [4, 7], [8, 13], [14, 18]])
    start, end = np.array([9.0, 9, 1, 0, 5, 0]), np.array([9.0, 9, 4.5, 0, 0, 3])
    assert best_span(start, end, offsets, n_best=20, max_length=30) == (8.0, 8, 18)
    assert best_span(start, end, offsets, n_best=20, max_length=1) == (5.5, 0, 3)
    assert best_span(start, end, offsets, n_best=1, max_length=30) is None
    # Shorter windows of a batch are padded at the end.
    padded = np.append(start, 99.0), np.append(end, 99.0)
    assert best_span(*padded, offsets, n_best=20, max_length=30) == (8.0, 8, 18)


def predict(task: QuestionTask, null: float) -> EvalPrediction:
    """Logits that point to the labelled span of every window, and to no answer with `null`."""
    width = max(map(len, task.validation["input_ids"]))
    logits = np.zeros((2, len(task.validation), width))
    for i, row in enumerate(task.validation):
        logits[0, i, row["start_positions"]] = logits[1, i, row["end_positions"]] = 4.0
        if row["start_positions"]:
            logits[:, i, 0] = null / 2
    labels = np.zeros(1)
    return EvalPrediction((logits[0], logits[1]), (labels, labels))


def test_answers_are_scored_and_null_wins_by_its_threshold(tmp_path: Path) -> None:
    train = write(tmp_path / "train.json", article("a", "two", None), article("b", "nine ten", "four"))
    files = {"train_file": train, "validation_file": train, "max_length": 64}
    task = load(**files).tokenized(word_pieces())
    assert task.compute_metrics(predict(task, null=2.0)) == {"f1": 100.0, "exact_match": 100.0}
    assert task.compute_metrics(predict(task, null=10.0)) == {"f1": 25.0, "exact_match": 25.0}
    patient = load(**files, null_score_threshold=5.0).tokenized(word_pieces())
    assert patient.compute_metrics(predict(patient, null=10.0))["exact_match"] == 100.0
    broken = predict(task, null=np.nan)
    assert np.isnan(task.compute_metrics(broken)["f1"])
    assert task.baseline() == {"f1": 25.0, "exact_match": 25.0}
    assert task.points == 1.0
    assert "validation 0.250" in task.describe()


def test_scores_are_squad_s() -> None:
    gold: dict[str, list[str]] = {"1": ["The cat", "a dog"], "2": ["red car"], "3": []}
    assert evaluate_answers({"1": "cat.", "2": "car", "3": ""}, gold) == {
        "f1": pytest.approx(100 * (1 + 2 / 3 + 1) / 3),
        "exact_match": pytest.approx(200 / 3),
    }
    assert evaluate_answers({"1": "", "2": "", "3": "x"}, gold) == {"f1": 0.0, "exact_match": 0.0}


def test_flags_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", article("a", "one"), article("b", "two"))
    with pytest.raises(TaskError, match="--null-score-threshold: every training question has an answer"):
        load(train_file=file, null_score_threshold=1.0)
    with pytest.raises(TaskError, match="--text-columns has no meaning for"):
        load(train_file=file, text_columns=["question"])
    with pytest.raises(TaskError, match="--doc-stride, --n-best-size has no meaning for stdlib"):
        load(doc_stride=3, n_best_size=2)


@pytest.mark.parametrize("name", QUESTION_SETS)
def test_published_sets_come_from_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    row = {"id": "1", "title": "t", "context": CONTEXT, "question": "which ?"}
    rows = [
        row | {"answers": {"text": ["two"], "answer_start": [4]}},
        row | {"answers": {"text": [], "answer_start": []}},
    ]
    data = datasets.Dataset.from_list(rows[: 1 + (name == "squad_v2")])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"train": data, "validation": data})
    task = load(task=name)
    assert task.sizes()["train"] == len(data)
    assert (task.null_score_threshold is None) == (name == "squad")
