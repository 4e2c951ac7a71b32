"""Entities: CoNLL files, tags at the first piece of each word, and the score of whole entities."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from small_models import word_pieces
from transformers import EvalPrediction

from pins_ext.tasks import TaskArguments, TaskError, load_task
from pins_ext.tasks.families.tokens import TokenTask, first_tokens
from pins_ext.tasks.labels import IGNORED
from pins_ext.tasks.metrics import evaluate_entities
from pins_ext.tasks.sources.conll import ENTITY_SETS, read_conll
from pins_ext.tasks.sources.hub import PARQUET

TEXT = "new\tB-place\nyork\tI-place\nis\tO\n\t\nann\tB-person\n\nno\tO\n"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.conll").write_text(text, encoding="utf-8")


def own(folder: Path, **more: Any) -> TokenTask:
    files = {"train_file": str(folder / "train.conll"), "validation_file": str(folder / "dev.conll")}
    return cast(TokenTask, load_task(TaskArguments(**(files | more))))


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "-DOCSTART- -X- O O\n\nnew N B-NP B-place\nyork N I-NP I-place\nis V B-VP O\n\nann N B-NP B-person\n\nno X O O",
        "\ufeffnew\tB-place\r\nyork\ufeff\tI-place\r\nis\tO\r\n\r\nann\tB-person\r\n\ufeff\r\nno\tO\r\n\r\n",
    ],
)
def test_layouts(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.conll").write_bytes(text.encode())
    read = read_conll(tmp_path / "a.conll")
    assert [[word.strip("\ufeff") for word in words] for words in read.words] == [
        ["new", "york", "is"],
        ["ann"],
        ["no"],
    ]
    assert read.tags == [["B-place", "I-place", "O"], ["B-person"], ["O"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("new\tB-place\nyork\n", r"a\.conll:2: expected a word and its tag.* got 'york'"),
        ("new\tplace\n", r"a\.conll:1: .*O, B-type or I-type"),
        ("new\tS-place\n", r"a\.conll:1: "),
        ("\n\n", "holds no sentences"),
    ],
)
def test_faults(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, a=text)
    with pytest.raises(TaskError, match=message):
        read_conll(tmp_path / "a.conll")


def test_an_unknown_tag_names_its_line(tmp_path: Path) -> None:
    write(tmp_path, train=TEXT, dev="is\tO\nrome\tB-city\n")
    with pytest.raises(TaskError, match=r"dev\.conll:2: unknown tag B-city; the entities are person, place"):
        own(tmp_path)
    write(tmp_path, train="is\tO\n", dev=TEXT)
    with pytest.raises(TaskError, match="there is no entity to learn"):
        own(tmp_path)


def test_the_first_piece_has_the_tag(tmp_path: Path) -> None:
    write(tmp_path, train=TEXT, dev=TEXT)
    task = own(tmp_path)
    assert task.label_names == ("O", "B-person", "I-person", "B-place", "I-place")
    assert task.model_kwargs()["id2label"][3] == "B-place"
    tokenized = task.tokenized(word_pieces())
    # [CLS] n ##e ##w y ##o ##r ##k i ##s [SEP]
    assert tokenized.train["labels"][0] == [-100, 3, -100, -100, 4, -100, -100, -100, 0, -100, -100]
    batch = tokenized.collator([{k: row[k] for k in ("input_ids", "labels")} for row in list(tokenized.train)[:2]])
    assert batch["labels"][1].tolist() == [-100, 1, *[-100] * 9]
    assert first_tokens([None, 0, 0, 2, None]) == [None, 0, None, 2, None]


def test_words_cut_off_or_without_a_token_are_outside(tmp_path: Path) -> None:
    write(tmp_path, train=TEXT, dev="\u200d\tO\nann\tB-person\nbo\tB-person\n")
    task = own(tmp_path, max_length=5).tokenized(word_pieces())
    labels = np.array(task.validation["labels"][:])
    seen = labels != IGNORED
    predicted = np.where(seen, labels, 4)
    scores = task.compute_metrics(EvalPrediction(predicted, labels))
    assert seen.sum() in (1, 2)
    assert scores == {"f1": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5}


def test_logits_become_tags_and_what_is_not_finite_has_no_score(tmp_path: Path) -> None:
    write(tmp_path, train=TEXT, dev="is\tO\n")
    task = own(tmp_path).tokenized(word_pieces())
    labels = np.array(task.validation["labels"][:])
    logits = torch.zeros(1, labels.shape[1], 5)
    logits[..., 2] = 1
    assert task.reduce_logits(logits, torch.tensor(labels)).unique().tolist() == [2]
    logits[0, 1, 0] = torch.nan
    reduced = task.reduce_logits((logits,), torch.tensor(labels)).numpy()
    assert np.isnan(task.compute_metrics(EvalPrediction(reduced, labels))["f1"])


def test_an_entity_counts_when_bounds_and_type_are_right() -> None:
    gold = [["B-a", "I-a", "O", "B-b"], ["O", "B-a"], ["O"]]
    found = [["B-a", "I-a", "O", "B-a"], ["B-a", "I-a"], ["B-b"]]
    assert evaluate_entities(gold, found) == {"f1": pytest.approx(2 / 7), "precision": 0.25, "recall": 1 / 3}
    assert evaluate_entities(gold, gold)["f1"] == 1.0
    assert evaluate_entities([["O"]], [["O"]])["f1"] == 0.0


def test_the_baseline_knows_each_word_s_usual_tag(tmp_path: Path) -> None:
    write(tmp_path, train=TEXT, dev="ann\tB-person\nin\tO\nrome\tB-place\n")
    task = own(tmp_path)
    assert task.baseline() == {"f1": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5}
    described = task.describe()
    assert "entity    person  train 1 · validation 1" in described
    assert "each word's usual tag" in described


def test_tags_are_numbered_as_a_model_has_them(tmp_path: Path) -> None:
    write(tmp_path, train=TEXT, dev=TEXT)
    task = own(tmp_path)
    assert task.label_names == ("O", "B-person", "I-person", "B-place", "I-place")
    assert task.train["tags"][:] == [[3, 4, 0], [1], [0]]
    numbered = task.numbered_as(["B-place", "I-place", "B-person", "I-person", "O"])
    assert numbered.train["tags"][:] == numbered.validation["tags"][:] == [[0, 1, 4], [2], [4]]
    for names in (["O", "B-place", "I-place"], ["B-PLACE", "I-PLACE", "B-PERSON", "I-PERSON", "O"]):
        assert task.numbered_as(names) is task


def test_sentences_are_held_out_and_limited(tmp_path: Path) -> None:
    write(tmp_path, train="".join(f"w{i}\tB-x\n\n" for i in range(20)))
    arguments = {"train_file": str(tmp_path / "train.conll"), "eval_fraction": 0.25}
    task = load_task(TaskArguments(**arguments))  # type: ignore[arg-type]
    assert task.sizes() == {"train": 15, "validation": 5}
    assert not {words[0] for words in task.train["tokens"]} & {words[0] for words in task.validation["tokens"]}
    task = load_task(TaskArguments(**arguments, max_train_samples=4, max_eval_samples=2))  # type: ignore[arg-type]
    assert task.sizes() == {"train": 4, "validation": 2}


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    write(tmp_path, train=TEXT, dev=TEXT)
    slow = cast(Any, SimpleNamespace(is_fast=False, name_or_path="slow"))
    with pytest.raises(TaskError, match="the tokenizer slow is not a fast one"):
        own(tmp_path).tokenized(slow)


@pytest.mark.parametrize("name", ENTITY_SETS)
def test_published_sets_come_from_parquet_or_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kinds = ENTITY_SETS[name].kinds
    tags = datasets.List(datasets.ClassLabel(names=["O", *(f"{s}-{k}" for k in kinds for s in "BI")]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    rows = datasets.Dataset.from_dict({"tokens": [["ann", "is"], []], "ner_tags": [[1, 0], []]}, features=features)
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> dict[str, datasets.Dataset]:
        calls.append((args, kwargs))
        return dict.fromkeys(("train", "validation", "test"), rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(TaskArguments(task=name.upper()))
    assert calls[0][1]["revision"] == PARQUET
    assert calls[0][1]["data_files"]["validation"] == "*/validation/*.parquet"
    assert (task.name, task.sizes()["test"], task.train["tags"][:]) == (name, 1, [[1, 0]])
    with pytest.raises(TaskError, match=f"has no train.conll .* for {name}"):
        load_task(TaskArguments(task=name, data_dir=str(tmp_path)))
    write(tmp_path, train=f"a\tB-{kinds[0]}\n", dev="b\tO\n")
    assert load_task(TaskArguments(task=name, data_dir=str(tmp_path))).test is None
