"""Results of a stock Trainer and of an own loop: `verify` and `report` take them as they take those of `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bert import model as tiny_bert
from helpers.small_models import characters
from torch import nn
from transformers import Trainer, TrainingArguments

from pins_ext import PruneConfig, Pruner
from pins_ext.cli.main import main
from pins_ext.integrations.callback import PinsCallback
from pins_ext.runs.record import read_record
from pins_ext.runs.saving import SaveResult, save_result

CONFIG = PruneConfig(sparsity=0.75, delta_t=2)


class Collator:
    """As a padding collator: it holds a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([f[name] for f in features]) for name in features[0]}


def batches(n: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 12, (n, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in ids]


def train(folder: Path, result: Path, collator: Any = None, **arguments: Any) -> Trainer:
    model = tiny_bert()
    pins = PinsCallback(CONFIG)
    args = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, logging_steps=2, report_to="none", use_cpu=True,
        disable_tqdm=True, **({"save_strategy": "no"} if "save_steps" not in arguments else {}), **arguments,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=batches(40), eval_dataset=batches(8), callbacks=[pins, SaveResult(result, pins)],
        data_collator=collator,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    trainer.train()
    return trainer


def test_the_collators_tokenizer_is_saved(tmp_path: Path) -> None:
    """As a Trainer saves it with a checkpoint, whether or not it wraps the collator."""
    for i, wrapped in enumerate((True, False)):
        result = tmp_path / f"result{i}"
        train(tmp_path / "trainer", result, Collator(characters()), remove_unused_columns=wrapped)
        assert (result / "tokenizer.json").is_file()


def test_a_stock_trainer_leaves_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result"
    train(tmp_path / "trainer", result, eval_strategy="steps", eval_steps=4)
    assert {"model.safetensors", "metrics.json", "report.html"} <= {file.name for file in result.iterdir()}
    assert main(["verify", str(result)]) == 0
    assert "75.0000 %" in capsys.readouterr().out
    record = read_record(result)
    assert record.final.metric == "eval_accuracy"
    assert record.final.zeros == record.final.weights * 3 // 4
    assert [entry["step"] for entry in record.evaluations] == [4, 8]
    assert record.history
    assert record.masks
    (result / "report.html").unlink()
    assert main(["report", str(result)]) == 0
    assert "accuracy" in (result / "report.html").read_text()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "save_steps": 4}],
    ids=["no evaluation", "the best model's weights are put back"],
)
def test_an_evaluation_of_another_model_does_not_count(tmp_path: Path, arguments: dict[str, Any]) -> None:
    train(tmp_path / "trainer", tmp_path / "result", **arguments)
    record = read_record(tmp_path / "result")
    assert record.final.score is None
    assert main(["report", str(tmp_path / "result")]) == 0


def test_an_own_loop_leaves_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = Pruner(model, optimizer, CONFIG, total_steps=8)
    history = []
    for step in range(8):
        rows = batches(4)
        loss = model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({"step": step + 1, "loss": loss.item()})
    record = save_result(tmp_path / "own", model, pruner, history=history, metrics={"eval_f1": 0.5}, label="mine")
    assert record == read_record(tmp_path / "own")
    assert (record.label, record.final.metric, len(record.history)) == ("mine", "eval_f1", 8)
    assert main(["verify", str(tmp_path / "own")]) == 0
    with torch.no_grad():
        pruner.parameters[0].fill_(1.0)
    model.save_pretrained(tmp_path / "own")
    assert main(["verify", str(tmp_path / "own")]) == 1
    assert "recorded are" in capsys.readouterr().out


def test_what_can_not_be_saved_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), PruneConfig(sparsity=0.5), total_steps=3)
    with pytest.raises(TypeError, match="Linear is no model of transformers"):
        save_result(tmp_path / "own", model, pruner)
    bert = tiny_bert()
    pruner = Pruner(bert, torch.optim.SGD(bert.parameters()), PruneConfig(sparsity=0.5), total_steps=3)
    with pytest.raises(ValueError, match="'eval_f1' is not among the metrics"):
        save_result(tmp_path / "own", bert, pruner, metric="eval_f1")
    assert not (tmp_path / "own").exists()
