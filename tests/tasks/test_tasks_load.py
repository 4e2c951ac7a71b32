"""From arguments to a task that a Trainer can use: labels, splits, tokens, metrics, and what bad input says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import EvalPrediction, HfArgumentParser, PreTrainedTokenizerFast

from pins_ext.tasks import Task, TaskArguments, TaskError, load_task, task_name
from pins_ext.tasks.metrics import evaluate
from pins_ext.tasks.sources import sequence_data
from pins_ext.tasks.sources.rows import Rows
from pins_ext.tasks.splits import draw_evenly

Files = Callable[..., TaskArguments]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", *"abcdefghij"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Writes (text, label) rows to json lines files and returns the arguments that name them."""

    def write(
        train: list[Any], validation: list[Any] | None = None, test: list[Any] | None = None, **more: Any
    ) -> TaskArguments:
        for name, labels in {"train": train, "validation": validation, "test": test}.items():
            if labels is not None:
                path = tmp_path / f"{name}.jsonl"
                rows = (json.dumps({"text": f"a b {name} {i}", "label": label}) for i, label in enumerate(labels))
                path.write_text("\n".join(rows))
                more[f"{name}_file"] = str(path)
        return TaskArguments(**more)

    return write


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        (["b", "a", "b", "a"], ("a", "b"), [1, 0, 1, 0]),
        ([10, 9, 9, 10], ("9", "10"), [1, 0, 0, 1]),
        (["10", "9", "-1", "9", "-1", "10"], ("-1", "9", "10"), [2, 1, 0, 1, 0, 2]),
        ([True, False, False, True], ("false", "true"), [1, 0, 0, 1]),
        (["1", "x", "1", "x"], ("1", "x"), [0, 1, 0, 1]),
    ],
)
def test_classes_keep_their_names(files: Files, labels: list[Any], names: tuple[str, ...], ids: list[int]) -> None:
    task = load_task(files(labels, labels))
    assert (task.label_names, task.num_labels, task.is_regression) == (names, len(names), False)
    assert task.train["labels"][:] == ids
    assert task.model_kwargs()["id2label"] == dict(enumerate(names))
    assert task.model_kwargs()["label2id"] == {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize("labels", [[0.5, 1.5, 2.0], ["0.5", "1.5", "2"], [1.0, 2.0, 3.0], ["1e-1", "2", "3"]])
def test_decimals_are_a_regression(files: Files, labels: list[Any]) -> None:
    task = load_task(files(labels, labels))
    assert (task.is_regression, task.num_labels, task.main_metric) == (True, 1, "pearson_spearman")
    assert task.train["labels"][:] == [float(label) for label in labels]
    assert task.model_kwargs() == {"num_labels": 1, "problem_type": "regression"}


def test_the_label_type_can_be_said(files: Files) -> None:
    scores = [1, 2, 3, 4, 5]
    assert load_task(files(scores, scores, label_type="number")).is_regression
    assert load_task(files([1.0, 0.0, 1.0], [1.0], label_type="class")).label_names == ("0", "1")


@pytest.mark.parametrize(
    ("train", "validation", "more", "message"),
    [
        (["a", "b"], ["a", "c", "d"], {}, r"validation\.jsonl:2: unknown label c, d; training has a, b"),
        (["a", "a"], ["a"], {}, "every label is 'a'; a classifier needs two classes"),
        ([1, 2, 3, 4, 5], [1], {}, "5 different labels in 5 examples; .* --label-type number"),
        ([0.5, "x"], [0.5], {"label_type": "number"}, r"train\.jsonl:2: the label must be a finite number, got 'x'"),
        ([0.5, math.nan], [0.5], {}, r"train\.jsonl:2: the label must be a finite number, got nan"),
        (["a", "b", "a", "b"], ["a"], {"max_train_samples": 1}, "only one class among 1 training examples"),
        (["a", "b"], ["a"], {"text_columns": ["body"]}, "has no column body; it has text, label"),
    ],
)
def test_faults(files: Files, train: list[Any], validation: list[Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(files(train, validation, **more))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_file": "x.csv"}, "--validation-file goes with --train-file"),
        ({"task": "glue/rte", "label_column": "x"}, "--label-column goes with --train-file"),
        ({"task": "glue/rte", "train_file": "x.csv"}, "leave out --task"),
        ({"data_dir": "x"}, "--data-dir needs the task"),
        ({"train_file": "x.csv", "text_columns": ["a", "b", "c"]}, "one or two columns, got 3"),
        ({"eval_fraction": 1.0}, "--eval-fraction must lie between 0 and 1"),
        ({"max_train_samples": 0}, "--max-train-samples must be at least 1"),
        ({"max_eval_samples": -1}, "--max-eval-samples must be at least 1"),
        ({"max_length": 1}, "--max-length must be at least 4"),
        ({"label_type": "int"}, "--label-type must be auto, class or number"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        TaskArguments(**arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({}, "stdlib"), ({"task": "STDLIB"}, "stdlib"), ({"task": "STS-B"}, "glue/stsb"), ({"train_file": "x"}, "files")],
)
def test_task_names(arguments: dict[str, Any], name: str) -> None:
    assert task_name(TaskArguments(**arguments)) == name


def test_importing_the_package_is_quick() -> None:
    """The command's help must not wait for libraries that it does not need."""
    code = (
        "import sys, pins_ext.tasks; print(sorted({'datasets', 'transformers', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert run.stdout.decode().strip() == "[]"


def test_the_embedded_task_has_no_data_dir() -> None:
    with pytest.raises(TaskError, match="makes its own data"):
        load_task(TaskArguments(task="stdlib", data_dir="x"))


def test_every_argument_is_a_flag_with_help() -> None:
    parser = HfArgumentParser(TaskArguments)  # type: ignore[arg-type]
    flags = "--train-file a.csv --text-columns x y --max-length 32 --eval-fraction 0.2 --label-type class"
    (arguments,) = parser.parse_args_into_dataclasses(flags.split())
    assert arguments == TaskArguments(
        train_file="a.csv", text_columns=["x", "y"], max_length=32, eval_fraction=0.2, label_type="class"
    )
    assert all(action.help for action in parser._actions)


def test_validation_is_held_out_evenly(files: Files) -> None:
    labels = ["a"] * 80 + ["b"] * 20
    task = load_task(files(labels, eval_fraction=0.25))
    assert (len(task.train), len(task.validation)) == (75, 25)
    assert sum(task.validation["labels"]) == 5
    assert not set(task.train["text"]) & set(task.validation["text"])
    assert any("drawn with seed 0" in note for note in task.notes)
    again = load_task(files(labels, eval_fraction=0.25))
    other = load_task(files(labels, eval_fraction=0.25, split_seed=1))
    assert again.validation["text"][:] == task.validation["text"][:] != other.validation["text"][:]


def test_one_example_cannot_be_split(files: Files) -> None:
    with pytest.raises(TaskError, match="use --validation-file"):
        load_task(files([0.5]))


def test_a_class_that_only_validation_got_is_noted(files: Files) -> None:
    task = load_task(files(["a"] * 3 + ["rare"] + ["z"] * 12, eval_fraction=0.5))
    assert 1 in task.validation["labels"][:]
    assert "no training example is rare" in task.notes


def test_samples_are_limited_evenly(files: Files) -> None:
    labels = ["a"] * 60 + ["b"] * 40
    task = load_task(files(labels, labels, labels, max_train_samples=10, max_eval_samples=5))
    assert [len(split) for split in task.splits().values()] == [10, 5, 5]
    assert [sum(split["labels"]) for split in task.splits().values()] == [4, 2, 2]


def test_draw_evenly_keeps_order_and_does_not_repeat() -> None:
    for size in (1, 7, 100):
        drawn = draw_evenly([i % 3 for i in range(100)], size, seed=3)
        assert drawn == sorted(set(drawn))
        assert len(drawn) == size


def test_shared_inputs_are_noted(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("text,label\nsame,1\n" + f"{name},0\n")
    arguments = TaskArguments(train_file=str(tmp_path / "train.csv"), validation_file=str(tmp_path / "dev.csv"))
    assert any("1 of 2 inputs" in note for note in load_task(arguments).notes)


def test_tokens_and_batches(files: Files, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(files(["a", "b"], ["a"], max_length=4), tokenizer)
    assert set(task.train.column_names) >= {"input_ids", "attention_mask", "labels"}
    assert "text" not in task.train.column_names
    batch = task.collator([task.train[0], {"input_ids": [2], "attention_mask": [1], "labels": 1}])
    assert batch["input_ids"].tolist() == [[2, 3, 1, 1], [2, 0, 0, 0]]
    assert batch["labels"].dtype == torch.int64
    assert any("100.0% of the training inputs reach the limit of 4 tokens" in note for note in task.notes)
    assert not any("as the tokenizer says" in note for note in task.notes)
    longer = load_task(files(["a", "b"], ["a"], max_length=9), tokenizer)
    assert "inputs have at most 8 tokens, as the tokenizer says, not 9" in longer.notes


def test_pairs_and_values(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("premise\thypothesis\tscore\na b\tc\t0.5\nd\te f\t1.5\n")
    task = load_task(TaskArguments(train_file=str(path), validation_file=str(path)), tokenizer)
    assert task.train["input_ids"][:] == [[2, 3, 4], [5, 6, 7]]
    assert task.collator([task.train[0], task.train[1]])["labels"].dtype == torch.float32


def test_classes_are_numbered_as_a_model_has_them(files: Files) -> None:
    task = load_task(files(["no", "yes", "maybe", "no", "yes", "maybe"], ["yes", "no"]))
    assert task.train["labels"][:] == [1, 2, 0, 1, 2, 0]
    numbered = task.numbered_as(["Yes", "NO", "maybe"])
    assert numbered.train["labels"][:] == [1, 0, 2, 1, 0, 2]
    assert numbered.validation["labels"][:] == [0, 1]
    assert numbered.label_names == ("Yes", "NO", "maybe")
    assert "classes are numbered as the model has them: Yes, NO, maybe" in numbered.notes
    # Spelled otherwise alone; other classes, as many or not; a class twice.
    spelled = task.numbered_as(["MAYBE", "No", "Yes"])
    assert (spelled.label_names, spelled.notes) == (("MAYBE", "No", "Yes"), task.notes)
    for names in (["LABEL_0", "LABEL_1", "LABEL_2"], ["yes", "no"], ["yes", "yes", "no"], []):
        assert task.numbered_as(names) is task
    by_f1 = replace(task, metrics=("f1",))
    with pytest.raises(TaskError, match="whose f1 is that of the second"):
        by_f1.numbered_as(["yes", "no", "maybe"])


def test_the_length_is_bounded_by_the_model(files: Files, tokenizer: PreTrainedTokenizerFast) -> None:
    assert load_task(files(["a", "b"], ["a"]), tokenizer).max_length == 8


def test_nothing_is_written_to_the_cache(
    files: Files, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = load_task(files(["a", "b"], ["a"]), tokenizer)
    assert task.train.cache_files == []
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_without_padding_is_refused(files: Files, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = None
    with pytest.raises(TaskError, match="no padding token"):
        load_task(files(["a", "b"], ["a"]), tokenizer)


def test_texts_are_not_batched_and_tokens_not_tokenised(files: Files, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(files(["a", "b"], ["a"]))
    with pytest.raises(TaskError, match="use tokenized"):
        _ = task.collator
    with pytest.raises(TaskError, match="tokenised already"):
        task.tokenized(tokenizer).tokenized(tokenizer)


def test_metrics_of_a_prediction(files: Files) -> None:
    task = load_task(files(["a", "b"], ["a", "b", "b", "a"]))
    logits = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    labels = np.array(task.validation["labels"][:])
    expected = {"accuracy": 0.75, "macro_f1": pytest.approx((4 / 5 + 2 / 3) / 2)}
    assert task.compute_metrics(EvalPrediction(logits, labels)) == expected
    assert task.compute_metrics(EvalPrediction((logits, logits), labels)) == expected
    assert task.main_metric == "accuracy"


def test_metrics_are_those_of_the_field() -> None:
    outputs = np.eye(2)[[1, 1, 0, 0, 1]]
    names = ("accuracy", "f1", "matthews_correlation")
    found = evaluate(names, outputs, np.array([1, 0, 0, 1, 1]), is_regression=False)
    assert found == pytest.approx({"accuracy": 0.6, "f1": 2 / 3, "matthews_correlation": 1 / 6})
    values = np.array([[0.0], [1.0], [8.0]])
    found = evaluate(("pearson", "spearman", "pearson_spearman"), values, np.array([0.0, 1.0, 2.0]), is_regression=True)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef([0, 1, 8], [0, 1, 2])[0, 1])
    assert found["pearson_spearman"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)


def test_outputs_that_are_not_finite_have_no_score() -> None:
    outputs = np.array([[np.nan, 0.0], [0.0, 1.0]])
    assert math.isnan(evaluate(("accuracy",), outputs, np.array([0, 1]), is_regression=False)["accuracy"])


def test_the_baseline_answers_with_the_most_frequent_class(files: Files) -> None:
    task = load_task(files(["a", "b", "b"], ["a", "b", "b", "b"], ["a"]))
    assert task.baseline()["accuracy"] == 0.75
    assert task.baseline("test")["accuracy"] == 0.0
    with pytest.raises(TaskError, match="has no test split; it has train, validation"):
        load_task(files(["a", "b"], ["a"])).baseline("test")


def test_the_baseline_of_a_regression_follows_nothing(files: Files) -> None:
    task = load_task(files([0.5, 1.5], [0.5, 2.5]))
    assert task.baseline() == {"pearson_spearman": 0.0, "pearson": 0.0, "spearman": 0.0}
    assert "values    train 0.5 to 1.5" in task.describe()


def test_the_description_tells_what_a_reader_must_know(files: Files) -> None:
    text = load_task(files(["a", "b", "b", "b"], ["a", "b"], ["b"])).describe()
    for part in ("train 4 · validation 2 · test 1", "b  train 0.750 · validation 0.500", "accuracy 0.500", "licence"):
        assert part in text


def test_the_embedded_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """With passages made up here: reading the library's own takes seconds, and test_tasks_areas does it."""
    names = sequence_data.area_names()
    rows = Rows("made up", [f"text {i}" for i in range(14)], None, list(names) * 2, list(range(14)))
    monkeypatch.setattr(sequence_data, "read_areas", lambda: (rows, rows.take(range(7))))
    task: Task = load_task(TaskArguments())
    assert (task.name, task.max_length, task.label_names) == ("stdlib", 48, names)
    assert task.train["labels"][:7] == list(range(7))
    assert task.baseline()["accuracy"] == pytest.approx(1 / 7)
    assert task.recipe is not None
