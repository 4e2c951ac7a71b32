"""`pins-ext train --lora`: adapters learn, the base is pruned below them, and the merged result holds its zeros."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import assert_same, flags, weights
from small_models import decoder_folder
from transformers import AutoModel

from pins_ext import PruneConfig
from pins_ext.cli.main import main
from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.meta import meta_model
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.memory import memory
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.runs.adapters import LoraOptions, adapter_shapes
from pins_ext.runs.errors import StoppedError
from pins_ext.runs.record import read_record

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LORA = ("--lora", "2", "--criterion", "platon")


def stop_at(step: int, on_log: Any) -> Any:
    """As a signal in this step."""

    def stopping(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step >= step:
            raise StoppedError("stopped")
        on_log(self, args, state, *rest, **kwargs)

    return stopping


@pytest.mark.parametrize("teacher", ["none", pytest.param("latest", marks=pytest.mark.slow)])
def test_the_merged_result_holds_its_zeros(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: str
) -> None:
    assert main(["train", *flags(tiny, tmp_path / "run", *LORA, "--teacher", teacher)]) == 0
    said = capsys.readouterr().out
    assert "LoRA of rank 2:" in said
    assert main(["verify", str(tmp_path / "run")]) == 0
    record, end = read_record(tmp_path / "run"), weights(tmp_path / "run")
    assert record.final.zeros == round(0.75 * record.final.weights)
    assert record.model.kind == "BertForSequenceClassification"
    assert record.config.training["lora"] == 2
    assert any(note.startswith("merged:") for note in record.notes)
    assert not any("lora" in name or "base_layer" in name for name in end)
    # Adapters have moved the weights that were kept, and nothing but them.
    start = weights(tiny / "model")
    moved = 0
    for name in record.final.tensors:
        before, after = start[name.removeprefix("bert.")], end[name]
        assert int((after == 0).sum()) == record.final.tensors[name].zeros
        moved += int(((before != after) & (after != 0)).sum())
    assert moved > 100
    assert torch.equal(end["bert.embeddings.word_embeddings.weight"], start["embeddings.word_embeddings.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 10])
def test_a_run_that_stops_goes_on_to_the_same_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """From a checkpoint of the adapters alone: the base is loaded as it was, and its masks put on it."""
    asked = (*LORA, "--teacher", "none")
    assert main(["train", *flags(tiny, tmp_path / "whole", *asked)]) == 0
    with monkeypatch.context() as patch:
        # Behind the checkpoints of the sixth step, and of the ninth, at which the base is at its target.
        patch.setattr(PinsCallback, "on_log", stop_at(step, PinsCallback.on_log))
        assert main(["train", *flags(tiny, tmp_path / "half", *asked)]) == 130
    assert f"checkpoint-{step // 3 * 3}" in capsys.readouterr().err
    assert main(["train", "--output-dir", str(tmp_path / "half"), "--resume"]) == 0
    assert f"resuming from checkpoint-{step // 3 * 3}" in capsys.readouterr().out
    assert_same(tmp_path / "half", tmp_path / "whole")


@pytest.mark.slow
def test_language_models_learn_by_adapters(tmp_path: Path) -> None:
    decoder_folder(tmp_path / "decoder")
    (tmp_path / "text.txt").write_text("some words and some more words\n" * 30)
    flags = ["--model", f"{tmp_path}/decoder", "--random-init", "--train-file", f"{tmp_path}/text.txt", "--use-cpu"]
    length = ["--max-steps", "8", "--max-length", "24", "--delta-t", "1", "--state-dtype", "8bit"]
    run = tmp_path / "run"
    assert main(["train", *flags, *length, *LORA, "--sparsity", "0.5", "--output-dir", str(run)]) == 0
    assert main(["verify", str(run)]) == 0
    assert read_record(run).final.sparsity == pytest.approx(0.5)


def test_a_sparse_checkpoint_is_pruned_further_below_adapters(tiny: Path, unbroken: Path, tmp_path: Path) -> None:
    asked = flags(tiny, tmp_path / "run", *LORA, "--from-sparse", "--sparsity", "0.9", "--teacher", "none")
    asked[asked.index("--model") + 1] = str(unbroken)
    assert main(["train", *asked, "--lora-targets", "query", "dense", "--lora-alpha", "1"]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    start, end = weights(unbroken), weights(tmp_path / "run")
    assert record["config"]["training"]["lora_targets"] == ["query", "dense"]
    assert record["final"]["zeros"] == round(0.9 * record["final"]["weights"])
    for name in record["final"]["tensors"]:
        assert not torch.count_nonzero(end[name][start[name] == 0])
        adapted = ".query." in name or ".dense." in name
        kept = end[name] != 0
        moved = not torch.equal(start[name][kept], end[name][kept])
        assert moved == (adapted and bool(kept.any()))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--lora", "0"), "--lora must be a rank of at least 1; got 0"),
        (("--lora", "2", "--lora-alpha", "-1"), "--lora-alpha must be above 0"),
        (("--lora-targets", "query"), "--lora-targets is of --lora"),
        (("--lora", "2", "--lora-targets", "query", "nothing"), "like bert.encoder.layer.0.attention.self.query"),
        (("--lora", "2", "--criterion", "fisher"), "use platon, movement or magnitude"),
        (("--lora", "2", "--release-gradients", "--max-grad-norm", "0"), "leave out --release-gradients"),
        (("--lora", "2", "--pattern", "2:4"), "leave --pattern out"),
        (("--lora", "2", "--score-gradient", "task"), "use joint"),
        (("--lora", "2", "--dtype", "float16"), "use bfloat16"),
        (("--lora", "2", "--delta-t", "1", "--gradient-accumulation-steps", "2"), "a delta_t of 2 or more"),
    ],
)
def test_what_can_not_go_together_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], reason: str
) -> None:
    assert main(["train", *flags(tiny, tmp_path / "run", *more)]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_peft_it_says_what_to_install(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["train", *flags(tiny, tmp_path / "run", *LORA)]) == 2
    assert "--lora needs peft: pip install peft" in capsys.readouterr().err


def test_several_processes_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *flags(tiny, tmp_path / "run", *LORA)]) == 2
    assert "--lora trains in one process" in capsys.readouterr().err


def test_plan_knows_adapters(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With data what learns; of a model alone what a frozen base takes."""
    asked = flags(tiny, tmp_path / "run", *LORA, "--state-dtype", "8bit")
    place = asked.index("--output-dir")
    assert main(["plan", *asked[:place], *asked[place + 2 :]]) == 0
    said = capsys.readouterr().out
    assert "LoRA of rank 2:" in said
    assert "  bert.encoder.layer.0.attention.self.query.weight  (16, 16)" in said
    pages = []
    for own in (["--lora", "2"], ["--frozen-base"]):
        assert main(["plan", "--model", f"{tiny}/model", "--criterion", "platon", *own]) == 0
        pages.append(capsys.readouterr().out.splitlines())
    more = [line for line in pages[0] if line not in pages[1]]
    assert [line.split()[0] for line in more if "fits" not in line] == ["adapters", "together"]
    assert not any(line.strip().startswith("moments") for line in pages[0])


@pytest.mark.parametrize("targets", [(), ("dense", "query"), ("embeddings.word_embeddings",)])
def test_plan_counts_the_adapters_that_peft_makes(tiny: Path, targets: tuple[str, ...]) -> None:
    options, pruning = LoraOptions(lora=3, lora_targets=targets), PruneConfig(0.75)
    planned = adapter_shapes(meta_model(f"{tiny}/model"), options, pruning)
    model = AutoModel.from_pretrained(tiny / "model", local_files_only=True)
    targets = targets or tuple(name.removesuffix(".weight") for name in prunable_parameters(model, pruning))
    under = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=list(targets)))
    learning = [p for p in under.parameters() if p.requires_grad]
    assert sum(map(math.prod, planned)) == sum(p.numel() for p in learning)
    optimizer = PinsAdamW(learning)
    for p in learning:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    counted = memory(model, (), PruneConfig(), frozen_base=True, adapters=planned).adapters
    assert counted == moments + sum(p.nbytes + p.grad.nbytes for p in learning)


def test_plan_refuses_an_adapter_of_what_is_no_matrix(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", f"{tiny}/model", "--criterion", "platon", "--lora", "2", "--lora-targets", "LayerNorm"]
    assert main(["plan", *asked]) == 2
    assert "embeddings.LayerNorm, a LayerNorm, is no linear layer" in capsys.readouterr().err


def test_patterns_are_of_the_model_s_own_names(tiny: Path, tmp_path: Path) -> None:
    """Not of those that peft gives it; and adapters, whose names lie below those of their layers, are not meant."""
    name = "bert.encoder.layer.0.attention.self.query.weight"
    asked = ("--include", "bert.*.query.weight", "--exclude", "bert.encoder.layer.1.*", "--teacher", "none")
    assert main(["train", *flags(tiny, tmp_path / "run", *LORA, *asked)]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert list(read_record(tmp_path / "run").final.tensors) == [name]


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--load-best-model-at-end",), ("--sparsity", "0"), ("--compare",)])
def test_other_ends_of_a_run_are_merged_too(tiny: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert main(["train", *flags(tiny, tmp_path / "run", *LORA, *more), "--eval-steps", "3"]) == 0
    folders = sorted(path.parent for path in (tmp_path / "run").rglob("metrics.json"))
    assert [folder.name for folder in folders] == (["dense", "magnitude", "platon"] if "--compare" in more else ["run"])
    for folder in folders:
        assert main(["verify", str(folder)]) == 0
        record = read_record(folder)
        assert any(note.startswith("merged:") for note in record.notes)
        dense = "--sparsity" in more or folder.name == "dense"
        assert record.final.zeros == (0 if dense else round(0.75 * record.final.weights))
        assert not any("lora" in name for name in weights(folder))
