"""Causal language models: blocks of running text and their perplexity; data as text, generated and scored."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import sacrebleu
import torch
from small_models import characters, decoder_config
from transformers import BertConfig, BertLMHeadModel, EvalPrediction, GPT2LMHeadModel

from pins_ext.tasks import TaskArguments, TaskError, load_task
from pins_ext.tasks.families.data_to_text import DataToTextTask
from pins_ext.tasks.families.language import LanguageTask
from pins_ext.tasks.metrics import evaluate_texts, perplexity
from pins_ext.tasks.sources.e2e import draw

PAIRS = 'mr,ref\n"name[A], food[B]",A sells B.\n"name[A], food[B]",At A there is B.\nname[C],C is a place.\n'


def text_task(folder: Path, train: str, dev: str | None = None, **more: Any) -> LanguageTask:
    (folder / "train.txt").write_text(train)
    if dev is not None:
        (folder / "dev.txt").write_text(dev)
        more["validation_file"] = str(folder / "dev.txt")
    return cast(LanguageTask, load_task(TaskArguments(train_file=str(folder / "train.txt"), **more)))


def pairs_task(folder: Path, **more: Any) -> DataToTextTask:
    for name in ("trainset", "devset"):
        (folder / f"{name}.csv.gz").write_bytes(gzip.compress(PAIRS.encode()))
    return cast(DataToTextTask, load_task(TaskArguments(task="e2e", data_dir=str(folder), **more)))


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(decoder_config()).eval()


def test_text_is_joined_and_cut_into_blocks(tmp_path: Path) -> None:
    task = text_task(tmp_path, "abc\n\nde\n", "abcdefg", max_length=4).tokenized(characters())
    tokenizer = task.fitted_tokenizer()
    assert [tokenizer.decode(ids) for ids in task.train["input_ids"]] == ["abc\n", "\nde\n"]
    assert [tokenizer.decode(ids) for ids in task.validation["input_ids"]] == ["abcd", "efg"]
    batch = task.collator(list(task.validation))
    assert batch["labels"][1].tolist()[3:] == [-100]
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0]
    assert task.sizes() == {"train": 2, "validation": 2}
    assert text_task(tmp_path, "abcd" * 9, "ab" * 9, max_length=4, max_train_samples=3, max_eval_samples=2).tokenized(
        characters()
    ).sizes() == {"train": 3, "validation": 2}


def test_perplexity_is_that_of_all_predicted_tokens(tmp_path: Path) -> None:
    task = text_task(tmp_path, "abc\n" * 4, "the end of it", max_length=5).tokenized(characters())
    network, losses = model(), []
    parts = []
    for row in task.validation:
        batch = task.collator([row])
        with torch.no_grad():
            logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        parts.append(task.reduce_logits((logits, None), batch["labels"]).numpy())
        losses += (-logits[0, :-1].log_softmax(-1)).gather(1, batch["labels"][0, 1:, None]).flatten().tolist()
    found = task.compute_metrics(EvalPrediction(np.concatenate(parts), np.zeros(1)))
    assert len(losses) == 10
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert not task.greater_is_better


def test_perplexity_has_no_upper_end() -> None:
    assert perplexity(10.0, 5) == pytest.approx(math.e**2)
    assert perplexity(1e6, 10) == math.inf
    assert math.isnan(perplexity(math.nan, 10))


def test_the_baseline_is_the_tokens_own_frequency(tmp_path: Path) -> None:
    task = text_task(tmp_path, "ab" * 50, "xbb").tokenized(characters())
    # b stands 50 times among 100 tokens, one more is added to each of 257.
    assert task.baseline()["perplexity"] == pytest.approx(357 / 51)
    assert "token frequencies" in task.describe()


def test_the_last_lines_are_held_out(tmp_path: Path) -> None:
    task = text_task(tmp_path, "a\nb\nc\nd\n", eval_fraction=0.25)
    assert (task.train["text"][:], task.validation["text"][:]) == (["a\n", "b\n", "c\n"], ["d\n"])
    with pytest.raises(TaskError, match="1 lines can't be parted"):
        text_task(tmp_path, "a\n")
    with pytest.raises(TaskError, match="is empty"):
        text_task(tmp_path, " \n")


def test_wikitext_comes_from_the_hub_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.Dataset.from_dict({"text": ["", " = A = \n"]})
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> dict[str, datasets.Dataset]:
        calls.append(args)
        return dict.fromkeys(("train", "validation", "test"), data)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task(TaskArguments(task="wikitext-2")).test is not None
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(b"some text\n"))
    assert load_task(TaskArguments(task="wikitext2", data_dir=str(tmp_path))).train["text"][:] == ["some text\n"]


def test_models_that_look_ahead_are_refused(tmp_path: Path) -> None:
    task = text_task(tmp_path, "ab", "ab", max_length=8)
    task.check_model(model())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    encoder = BertLMHeadModel(BertConfig(vocab_size=20, **sizes))
    with pytest.raises(TaskError, match="BertLMHeadModel sees the token that it is to predict"):
        task.check_model(encoder)
    assert encoder.training


def test_only_the_reference_and_its_end_are_learned(tmp_path: Path) -> None:
    task = pairs_task(tmp_path).tokenized(characters())
    row, tokenizer = task.train[2], task.fitted_tokenizer()
    assert tokenizer.decode(row["input_ids"]) == "name[C]\nC is a place.<end>"
    learned = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(learned) == "C is a place.<end>"
    assert task.references("validation") == {
        "name[A], food[B]": ["A sells B.", "At A there is B."],
        "name[C]": ["C is a place."],
    }
    assert "inputs    train 2 · validation 2" in task.describe()


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_generated_together_are_those_generated_alone(tmp_path: Path, beams: int) -> None:
    task = pairs_task(tmp_path, num_beams=beams, max_new_tokens=6).tokenized(characters())
    network, mrs = model(), ["name[A], food[B]", "x", "name[Cecil]"]
    alone = [task.generate(network, [mr])[0] for mr in mrs]
    assert task.generate(network, mrs) == alone
    assert len(set(alone)) > 1
    prediction = EvalPrediction(np.zeros((3, 1)), np.zeros((3, 4)))
    found = task.generate(network, list(task.references("validation")))
    expected = evaluate_texts(found, list(task.references("validation").values()))
    assert task.compute_metrics(prediction, model=network) == expected


def test_bleu_takes_all_references_and_any_number() -> None:
    found = ["a b c d e", "f g h i j"]
    references = [["x", "a b c d e"], ["f g h i j"]]
    assert evaluate_texts(found, references) == {"bleu": pytest.approx(100)}
    assert evaluate_texts(found, [["x"], ["f g h i j"]])["bleu"] < 60
    same = [["a b c d f", "b c d e f"], ["f g h i k", "g h i j k"]]
    streams = [[texts[i] for texts in same] for i in range(2)]
    assert evaluate_texts(found, same)["bleu"] == pytest.approx(sacrebleu.corpus_bleu(found, streams).score)


def test_a_sample_keeps_all_references_of_a_meaning() -> None:
    split = datasets.Dataset.from_dict({"mr": ["a", "b", "a", "c"], "ref": ["1", "2", "3", "4"]})
    for seed in range(4):
        drawn = draw(split, 1, seed)
        assert len(drawn) == (2 if drawn["mr"][0] == "a" else 1)
        assert len(set(drawn["mr"])) == 1


def test_data_to_text_faults(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="the model has 64 positions, and inputs have up to 128 tokens"):
        pairs_task(tmp_path).check_model(model())
    task = pairs_task(tmp_path, max_new_tokens=64, max_length=32)
    with pytest.raises(TaskError, match="--max-new-tokens 64 leaves nothing of the model's 64 positions"):
        task.check_model(model())
    endless = characters()
    endless.eos_token = None
    with pytest.raises(TaskError, match="no generated text would ever end"):
        task.tokenized(endless)
    with pytest.raises(TaskError, match="--num-beams must be at least 1"):
        TaskArguments(task="e2e", num_beams=0)
    (tmp_path / "devset.csv.gz").write_bytes(gzip.compress(b"mr,ref\nname[A],\n"))
    with pytest.raises(TaskError, match=r"devset\.csv\.gz:2: ref must be a text"):
        load_task(TaskArguments(task="e2e", data_dir=str(tmp_path)))
    (tmp_path / "devset.csv.gz").write_bytes(gzip.compress(b"text,label\na,b\n"))
    with pytest.raises(TaskError, match="the columns mr and ref are missing; it has text, label"):
        load_task(TaskArguments(task="e2e", data_dir=str(tmp_path)))
