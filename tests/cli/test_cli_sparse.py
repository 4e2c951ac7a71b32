"""`pins-ext export` and `pins-ext run`: each kind of model, both forms of checkpoint, bad requests."""

from __future__ import annotations

import errno
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import characters, decoder_config, word_pieces
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from pins_ext.cli.main import main
from pins_ext.runs.sparse_ending import end_sparse
from pins_ext.sparse.format import load_sparse
from pins_ext.sparse.linear import SparseLinear
from pins_ext.sparse.shards import ShardWriter


def pruned(model: nn.Module) -> Any:
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.data[torch.rand(weight.shape) < 0.9] = 0
    return model


def config(**changes: Any) -> BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertConfig(vocab_size=len(word_pieces()), max_position_embeddings=64, **sizes, **changes)


MODELS = {
    "classification": lambda: BertForSequenceClassification(config(id2label={0: "no", 1: "yes"})),
    "regression": lambda: BertForSequenceClassification(config(num_labels=1)),
    "entities": lambda: BertForTokenClassification(config(id2label={0: "O", 1: "B-PLACE", 2: "I-PLACE"})),
    "questions": lambda: BertForQuestionAnswering(config()),
    "generation": lambda: GPT2LMHeadModel(decoder_config()),
}


def saved(kind: str, folder: Path) -> Path:
    torch.manual_seed(1)
    pruned(MODELS[kind]()).save_pretrained(folder)
    (characters() if kind == "generation" else word_pieces()).save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["run", *map(str, argv), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", MODELS)
def test_sparse_and_dense_answer_alike(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(kind, tmp_path / "dense")
    texts = ["--text", "a cab in a bag", "--text", "an odd day. what a day"]
    if kind == "questions":
        texts += ["--pair", "what is in a bag?", "--pair", "what day?"]
    dense = run(capsys, folder, *texts, "--dense")
    assert len(dense) == 2
    assert main(["export", str(folder)]) == 0
    for form in (folder, tmp_path / "dense.sparse"):
        for found, expected in zip(run(capsys, form, *texts, "--min-sparsity", "0.5"), dense, strict=True):
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert found[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value) or (
                    key == "entities" and [e | {"score": 0} for e in found[key]] == [e | {"score": 0} for e in value]
                )


def test_what_people_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("classification", tmp_path / "dense")
    assert main(["run", str(folder), "--text", "a cab", "--pair", "a bag", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "sparse or dense, measured" in said
    assert "yes (0." in said or "no (0." in said
    assert "1 text in " in said
    (tmp_path / "texts.txt").write_text("a cab\ta bag\n\na day\ta bad day\n")
    assert len(run(capsys, folder, "--file", tmp_path / "texts.txt")) == 2


def test_export_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("classification", tmp_path / "dense")
    assert main(["export", str(folder), "--output-dir", str(tmp_path / "small")]) == 0
    said = capsys.readouterr().out
    assert "pruned tensors: " in said
    assert all(f"\n{word}" in said for word in ("dense", "sparse", "floor", "written"))
    assert main(["inspect", str(tmp_path / "small")]) == 0
    stored = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert f"; {stored / 1e6:,.1f} MB here, " in capsys.readouterr().out
    (tmp_path / "mine.csv").write_text("text,label\n" + "a cab,no\nan odd day,yes\n" * 9)
    asked = ["train", "--model", str(tmp_path / "small"), "--train-file", str(tmp_path / "mine.csv")]
    assert f"unpack it with pins-ext export {tmp_path / 'small'} --format dense" in refused(capsys, *asked)
    assert main(["export", str(tmp_path / "small"), "--format", "dense", "--output-dir", str(tmp_path / "back")]) == 0
    before = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {f.name for f in (tmp_path / "back").iterdir()} == {f.name for f in folder.iterdir()}


def test_export_changes_dtype_and_values_when_asked(tmp_path: Path) -> None:
    folder = saved("classification", tmp_path / "dense")
    assert main(["export", str(folder), "--dtype", "bfloat16", "--int8", "--output-dir", str(tmp_path / "small")]) == 0
    assert {p.dtype for p in load_sparse(tmp_path / "small").parameters()} == {torch.bfloat16}
    again = ["export", str(tmp_path / "small"), "--format", "dense", "--dtype", "float16"]
    assert main([*again, "--output-dir", str(tmp_path / "half")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.float16


def test_bad_requests_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("classification", tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts.txt").write_text("a\tb\nc\n")
    assert "is no folder: name one that train" in refused(capsys, "export", tmp_path / "none")
    assert "holds no checkpoint: it has neither config.json nor" in refused(capsys, "export", tmp_path / "empty")
    assert "exists: choose another --output-dir" in refused(capsys, "export", folder, "--output-dir", tmp_path)
    assert "is the checkpoint itself" in refused(capsys, "export", folder, "--output-dir", folder, "--overwrite")
    assert "--int8 is for --format sparse" in refused(capsys, "export", folder, "--format", "dense", "--int8")
    assert "give texts with --text, or with --file" in refused(capsys, "run", folder)
    assert "one --pair for each --text" in refused(capsys, "run", folder, "--text", "a", "--pair", "a", "--pair", "b")
    assert "all lines must hold a text, or all" in refused(capsys, "run", folder, "--file", tmp_path / "texts.txt")
    assert "between 0 and 1, got 90" in refused(capsys, "run", folder, "--text", "a", "--min-sparsity", 90)
    for threads in (0, 100_000):
        said = refused(capsys, "run", folder, "--text", "a", "--threads", threads)
        assert f"--threads must be between 1 and 1024, got {threads}" in said
    for flag, value in (("--values", "int8"), ("--min-sparsity", 0.5)):
        said = refused(capsys, "run", folder, "--text", "a", "--dense", flag, value)
        assert f"{flag} is for sparse layers: leave it out with --dense" in said
    questions = saved("questions", tmp_path / "questions")
    assert "needs a question for each text" in refused(capsys, "run", questions, "--text", "a")
    said = refused(capsys, "run", questions, "--text", "a", "--pair", "what? " * 9)
    assert "a question has 45 tokens, too many beside a text in 64: shorten it" in said
    assert run(capsys, questions, "--text", "a cab " * 40, "--pair", "what? " * 8 + "what", "--dense")
    entities = saved("entities", tmp_path / "entities")
    assert "takes one text at a time" in refused(capsys, "run", entities, "--text", "a", "--pair", "b")


@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaForSequenceClassification])
def test_token_types_that_a_model_does_not_read_are_left_out(
    kind: type[LlamaForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = word_pieces()
    kind(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    told["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    assert "token_type_ids" in AutoTokenizer.from_pretrained(tmp_path)("a cab")
    (answer,) = run(capsys, tmp_path, "--text", "a cab", "--dense")
    assert answer


def test_generation_ends_with_the_models_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("generation", tmp_path / "dense")
    positions = decoder_config().n_positions
    (answer,) = run(capsys, folder, "--text", "a cab", "--max-new-tokens", 100_000, "--dense")
    assert 0 < len(answer["text"]) <= positions - 5
    assert "a text is empty: a model for generation needs" in refused(capsys, "run", folder, "--text", "")
    said = refused(capsys, "run", folder, "--text", "a" * (positions + 3))
    assert f"a text has {positions + 3} tokens and the model {positions} positions: shorten the text" in said


@pytest.mark.parametrize("kind", ["classification", "entities", "questions"])
def test_a_text_that_is_longer_than_the_models_positions(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(kind, tmp_path / "dense")
    tokenizer = word_pieces()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(folder)
    pair = ["--pair", "what?"] if kind == "questions" else []
    (answer,) = run(capsys, folder, "--text", "a bad cab " * 100, *pair, "--dense")
    # Questions are asked of windows that cover the whole text.
    assert answer.get("cut_to") == (None if kind == "questions" else config().max_position_embeddings)
    assert main(["run", str(folder), "--text", "a bad cab " * 100, *pair, "--dense"]) == 0
    assert ("(the text was cut to 64 tokens)" in capsys.readouterr().out) == (kind != "questions")
    # 62 letters, [CLS] and [SEP]
    (answer,) = run(capsys, folder, "--text", "a bad cab " * 8 + "a bad cab"[:7], *pair, "--dense")
    assert "cut_to" not in answer


def test_a_text_without_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    GPT2ForSequenceClassification(decoder_config()).save_pretrained(tmp_path)
    characters().save_pretrained(tmp_path)
    assert "a text is empty: its tokenizer makes no tokens" in refused(capsys, "run", tmp_path, "--text", "", "--dense")
    folder = saved("classification", tmp_path / "bert")
    assert run(capsys, folder, "--text", "", "--dense")  # [CLS] [SEP]


def test_weights_that_the_asked_form_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "dense"
    model = pruned(MODELS["classification"]())
    model.classifier.weight.data[0, 0] = 1e6
    model.save_pretrained(folder)
    for form in ("sparse", "dense"):
        said = refused(capsys, "export", folder, "--dtype", "float16", "--format", form)
        assert "classifier.weight has weights up to 1e+06, which are infinite in torch.float16: use bfloat16" in said
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]
    assert main(["export", str(folder), "--dtype", "bfloat16"]) == 0


def test_a_folder_that_can_t_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("classification", tmp_path / "dense")
    (tmp_path / "file").write_text("in the way")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        assert main(["export", str(folder), "--output-dir", str(tmp_path / "a")]) == 1
    said = capsys.readouterr().err
    assert f"could not save {tmp_path / 'a'}: OSError: [Errno 28] No space left on device" in said
    assert main(["export", str(folder), "--output-dir", str(tmp_path / "file" / "a")]) == 1
    assert f"could not save {tmp_path / 'file' / 'a'}: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "file"]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("classification", tmp_path / "dense")
    assert main(["export", str(folder)]) == 0
    (shard,) = (tmp_path / "dense.sparse").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert "is damaged" in refused(capsys, "run", tmp_path / "dense.sparse", "--text", "a")
    head = folder / "model.safetensors"
    head.write_bytes(head.read_bytes()[:-100])
    assert "can't be loaded" in refused(capsys, "run", folder, "--text", "a")


def test_a_model_that_is_not_pruned_runs_densely_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BertForSequenceClassification(config()).save_pretrained(tmp_path / "dense")
    word_pieces().save_pretrained(tmp_path / "dense")
    assert main(["run", str(tmp_path / "dense"), "--text", "a"]) == 0
    assert "computed densely: no linear layer has 30% zeros" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "dense")]) == 0
    assert "note: no tensor has enough zeros" in capsys.readouterr().out


def test_a_comparison_ends_with_the_pruned_model_run_sparse(tmp_path: Path) -> None:
    folder = saved("classification", tmp_path / "pins")
    for _ in range(2):
        console = Console(record=True, width=120)
        end_sparse(folder, console)
        said = console.export_text()
        assert "pins exported and run" in said
        assert "\n  dense " in said
        assert "\n  sparse " in said
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        zeros = sum(int((weight == 0).sum()) for weight in model.parameters())
        assert f"zeros   {zeros:,} of the model's {model.num_parameters():,} weights" in said
        (command,) = (line.removeprefix("next    ") for line in said.splitlines() if line.startswith("next"))
        assert main(shlex.split(command)[1:]) == 0
    assert torch.equal(
        load_sparse(tmp_path / "pins.sparse").classifier.weight,
        AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight,
    )


def test_run_computes_on_sparse_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("classification", tmp_path / "dense")
    calls: list[int] = []
    forward = SparseLinear.forward
    monkeypatch.setattr("pins_ext.sparse.inference.measure", lambda *_: ((2.0, 2.0), (1.0, 1.0)))
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
    run(capsys, folder, "--text", "a cab")
    assert len(calls) >= 6
    calls.clear()
    run(capsys, folder, "--text", "a cab", "--dense")
    assert calls == []
