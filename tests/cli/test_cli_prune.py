"""`pins-ext prune`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.small_models import characters, decoder_config
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from pins_ext.cli.main import main
from pins_ext.pruning.config import PruneConfig
from pins_ext.runs import once as runs_once


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny GPT-2 and running text."""
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    GPT2LMHeadModel(decoder_config()).save_pretrained(folder / "model")
    characters().save_pretrained(folder / "model")
    (folder / "mine.txt").write_text("A cab in a bag is an odd thing to have on a day like this.\n" * 40)
    return folder


def test_it_prunes_a_classifier_by_its_data(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "pruned"
    data = ["--data", f"{tiny}/train.csv", "--sparsity", "0.5", "--output-dir"]
    headless, headed = ["prune", f"{tiny}/model", *data], str(tmp_path / "headed")
    assert main([*headless, headed, "--criterion", "magnitude"]) == 0
    said = capsys.readouterr().out
    assert "note      initialised at random: classifier.bias, classifier.weight" in said
    assert "evaluated" not in said
    assert main([*headless, str(target), "--criterion", "fisher"]) == 2
    said = capsys.readouterr().err
    assert (
        "no head for files: fisher would score by gradients that come through one made at random (classifier." in said
    )
    assert not target.exists()
    asked = ["prune", headed, *data, str(target)]
    assert main([*asked, "--criterion", "fisher", "--batches", "3", "--batch-size", "4"]) == 0
    said = capsys.readouterr().out
    zeros, weights = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of ([\d,]+) weights are zero", said)[0])
    assert zeros == weights // 2
    assert "scored    by fisher, compared globally, 3 batches, their mean loss before pruning" in said
    assert f"next      pins-ext inspect {target}" in said
    assert "evaluated accuracy" in said
    tensors = load_file(target / "model.safetensors")
    saved = {name: t for name, t in tensors.items() if ".layer." in name and t.dim() == 2}
    assert sum(int((t == 0).sum()) for t in saved.values()) == zeros
    for name, t in saved.items():
        assert f"{(t == 0).float().mean():9.2%}  {name}\n" in said
    assert main(["inspect", str(target)]) == 0
    again = ["prune", str(target), "--data", f"{tiny}/train.csv", "--sparsity", "0.6", "--criterion", "magnitude"]
    assert main([*again, "--output-dir", str(tmp_path / "more")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"evaluated accuracy \d\.\d{4} before, \d\.\d{4} after; .*loss .* after \(\d+ examples\)", said)
    assert main([*asked, "--criterion", "fisher"]) == 2
    assert "exists: choose another --output-dir" in capsys.readouterr().err


def test_a_head_that_would_be_lost_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--sparsity", "0.5", "--criterion", "magnitude", "--output-dir"]
    lines = (tiny / "train.csv").read_text().splitlines()
    more = tmp_path / "more.csv"
    more.write_text("\n".join([*lines, *(f"{line.rsplit(',', 1)[0]},maybe" for line in lines[1::3])]) + "\n")
    assert main(["prune", f"{tiny}/model", "--data", f"{tiny}/train.csv", *asked, str(tmp_path / "a")]) == 0
    assert main(["prune", str(tmp_path / "a"), "--data", str(more), *asked, str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "a head of another shape than files, with 3 labels, needs (classifier.bias, classifier.weight)" in said
    assert not (tmp_path / "b").exists()


def test_it_prunes_a_language_model_by_wanda(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "pruned"
    asked = ["prune", f"{text}/model", "--data", f"{text}/mine.txt", "--max-length", "32", "--criterion", "wanda"]
    assert main([*asked, "--sparsity", "0.5", "--dtype", "bfloat16", "--output-dir", str(target)]) == 0
    assert "within each output of a layer" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert ((weight == 0).sum(0) == 8).all()
    assert len(AutoTokenizer.from_pretrained(target)("a cab")["input_ids"]) == 5


def test_a_head_with_the_labels_in_another_order_is_read_by_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--data", f"{tiny}/train.csv", "--validation-file", f"{tiny}/dev.csv", "--sparsity", "0.5"]
    assert (
        main(["prune", f"{tiny}/model", *asked, "--criterion", "magnitude", "--output-dir", str(tmp_path / "a")]) == 0
    )
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    head = {name: tensor.flip(0).contiguous() for name, tensor in tensors.items() if name.startswith("classifier.")}
    save_file(tensors | head, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    names = [name.upper() for name in config["id2label"].values()]
    # By their numbers, in whatever order a file has them.
    config["id2label"] = dict(reversed([*enumerate(reversed(names))]))
    config["label2id"] = {name: i for i, name in config["id2label"].items()}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    scores = []
    for folder in ("a", "b"):
        capsys.readouterr()
        more = ["--criterion", "fisher", "--output-dir", str(tmp_path / f"{folder}2"), "--batches", "3"]
        assert main(["prune", str(tmp_path / folder), *asked, *more]) == 0
        said = capsys.readouterr().out
        scores.append(re.findall(r"evaluated .*", said))
        numbered = f"note      classes are numbered as the model has them: {', '.join(reversed(names))}\n"
        assert (numbered in said) == (folder == "b")
    assert scores[0] == scores[1] != []
    assert AutoConfig.from_pretrained(tmp_path / "b2").id2label == dict(enumerate(reversed(names)))
    pruned, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("a2", "b2"))
    assert all(torch.equal(pruned[name] == 0, other[name] == 0) for name in pruned.keys() - head.keys())


def test_what_was_zero_already_is_told_and_what_it_costs(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--data", f"{text}/mine.txt", "--max-length", "32", "--batches", "2", "--criterion"]
    half, more = str(tmp_path / "half"), str(tmp_path / "more")
    assert main(["prune", f"{text}/model", *asked, "magnitude", "--sparsity", "0.5", "--output-dir", half]) == 0
    said = capsys.readouterr().out
    assert "were zero already" not in said
    losses = re.findall(r"loss (\d+\.\d{4}) before, (\d+\.\d{4}) after", said)[0]
    assert losses[0] != losses[1]
    again = [*asked, "wanda", "--sparsity", "0.2", "--max-eval-samples", "1", "--output-dir", more]
    assert main(["prune", half, *again]) == 0
    said = capsys.readouterr().out
    assert re.search(r"note      [\d,]+ of them were zero already, beyond the [\d,]+ that were chosen", said)
    assert "(1 examples)" in said
    assert f"loss {losses[1]} before" not in said
    assert main(["prune", half, *again, "--no-evaluation", "--overwrite"]) == 0
    assert "evaluated" not in capsys.readouterr().out


def test_pins_without_a_rate_is_platon(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    asked = ["prune", f"{text}/model", "--data", f"{text}/mine.txt", "--max-length", "32", "--batches", "2"]
    for more in (["--criterion", "platon"], [], ["--learning-rate", "10"]):
        target = tmp_path / str(len(results))
        assert main([*asked, "--sparsity", "0.5", *more, "--output-dir", str(target)]) == 0
        results.append((load_file(target / "model.safetensors"), capsys.readouterr().out))
    same = [all(torch.equal(t, results[0][0][name]) for name, t in tensors.items()) for tensors, _ in results]
    assert same == [True, True, False]
    assert ["is platon" in said for _, said in results] == [False, True, False]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("--sparsity 0.5", "calibration data is needed"),
        ("--data absent.csv", "absent.csv"),
        ("--data mine.txt --batches 0", "--batches must be at least 1"),
        ("--data mine.txt --learning-rate -1", "--learning-rate must not be negative, got -1.0"),
        ("--data mine.txt --warmup 3", "unrecognized arguments: --warmup"),
        ("--data mine.txt --task rte", "a task of its own"),
        ("--data mine.txt --criterion wanda --scope row --include *ln*", "no weight of nn.Linear"),
        ("--data mine.txt --sparsity 50", "did you mean 0.5?"),
        ("--data mine.txt --output-dir model", "is the model itself"),
    ],
)
def test_what_it_refuses(
    asked: str, reason: str, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(text)
    assert main(["prune", "model", *asked.split()]) == 2
    assert reason in capsys.readouterr().err
    assert not (text / "model.pruned").exists()


def test_train_refuses_wanda_before_it_loads_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--criterion", "wanda"]) == 2
    assert "pins-ext prune" in capsys.readouterr().err
    assert main(["plan", "--task", "rte", "--scope", "row"]) == 2
    assert "one-shot" in capsys.readouterr().err


def test_progress_is_shown_on_a_terminal_and_in_a_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs_once, "_SECONDS_BETWEEN_LINES", -1.0)
    for terminal in (True, False):
        with (tmp_path / "log").open("w") as file:
            console = Console(file=file, force_terminal=terminal, width=100)
            with runs_once._shown(console, 2) as progress:
                for done in (1, 2):
                    progress("calibrating", done)
                progress("pruning", 1)
        said = (tmp_path / "log").read_text()
        assert ("2/2" if terminal else "calibrating  2/2 batches\npruning  1 tensors") in said
    assert PruneConfig(criterion="wanda").scope == "row"
