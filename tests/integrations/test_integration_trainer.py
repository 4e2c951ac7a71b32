"""Pruning inside the Hugging Face Trainer: resumed runs end as unbroken ones do, best models are sparse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bert import CONFIG, STEPS, arguments, assert_same, collate, data, model, weights
from transformers import BertForSequenceClassification, EarlyStoppingCallback, TrainerCallback

from pins_ext.files import random_state
from pins_ext.files.atomic import IncompleteError, SaveError, newest_complete
from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.logs import AT_TARGET, NEW_MASK
from pins_ext.integrations.timing import StepTimer, plain_step_seconds
from pins_ext.integrations.trainer import PinsTrainer
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.config import PruneConfig
from pins_ext.regularization.self_regularizer import SelfRegularizer


def trainer(
    folder: Path,
    config: PruneConfig | None = CONFIG,
    teacher: str = "none",
    fused: bool = True,
    callbacks: tuple[TrainerCallback, ...] = (),
    **changes: Any,
) -> PinsTrainer:
    net, args = model(), arguments(folder, **changes)
    regularizer = SelfRegularizer(net, teacher=teacher, every=3) if teacher != "none" else None
    return PinsTrainer(
        pins=PinsCallback(config, regularizer),
        model=net,
        args=args,
        train_dataset=data(),
        eval_dataset=data(9),
        data_collator=collate,
        callbacks=list(callbacks),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        optimizer_cls_and_kwargs=(PinsAdamW, {"lr": args.learning_rate}) if fused else None,
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "fused": {},
    "hooks": {"fused": False, "optim": "adamw_torch"},
    "adafactor": {"fused": False, "optim": "adafactor"},
    "latest teacher": {"teacher": "latest"},
    "ema teacher": {"teacher": "ema"},
    "strict masks in bfloat16": {
        "config": PruneConfig(0.75, mask_policy="strict", state_dtype="bfloat16", delta_t=2, warmup=2, cooldown=4)
    },
    "by length, evaluated": {"train_sampling_strategy": "group_by_length", "eval_strategy": "epoch", "save_steps": 5},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path, variant: str) -> None:
    unbroken = trainer(tmp_path, **VARIANTS[variant])
    unbroken.train()
    expected = weights(unbroken)
    regularizer = unbroken.pins.self_regularizer
    assert regularizer is None or regularizer.teacher.snapshot_step is not None
    saved = sorted(int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*"))
    assert saved[-1] == STEPS
    for step in saved:
        resumed = trainer(tmp_path / "other", **VARIANTS[variant])
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == STEPS
        assert_same(weights(resumed), expected)
        assert resumed.pins.final == unbroken.pins.final


def test_the_final_model_has_its_sparsity_to_the_last_weight(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    pruner = run.pins.pruner
    assert pruner is not None
    assert run.pins.final is not None
    assert run.pins.final["zeros"] == pruner.n_weights - round(0.25 * pruner.n_weights)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert all(
        {"pins/sparsity", "pins/zeros", "pins/target_sparsity", "pins/pruning_ms"} <= entry.keys() for entry in logged
    )
    masks = [entry for entry in run.state.log_history if NEW_MASK in entry]
    assert [entry["step"] for entry in masks] == [5, 7, 9, 11, 12, 13]
    assert all(entry["pins/sparsity"] == pytest.approx(entry["pins/target_sparsity"], abs=1e-3) for entry in masks)


def test_resuming_takes_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    unbroken = trainer(tmp_path)
    unbroken.train()
    (tmp_path / "checkpoint-14" / "optimizer.pt").write_bytes(b"cut short")
    (tmp_path / "checkpoint-12" / "checkpoint.json").unlink()
    (tmp_path / ".aside").mkdir()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._resumed_from == tmp_path / "checkpoint-8"
    assert not (tmp_path / ".aside").exists()
    assert_same(weights(resumed), weights(unbroken))
    with pytest.raises(IncompleteError, match="no whole checkpoint"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(IncompleteError, match="damaged"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_another_configuration_can_not_resume(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    changed = trainer(tmp_path, config=PruneConfig(sparsity=0.5, delta_t=2, warmup=2, cooldown=4))
    with pytest.raises(ValueError, match=r"sparsity: 0\.75 there, 0\.5 here"):
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    quiet = trainer(tmp_path / "a")
    quiet.train()
    watched = trainer(tmp_path / "b", eval_strategy="steps", eval_steps=1)
    watched.train()
    assert_same(weights(quiet), weights(watched))


def test_checkpoints_rotate(tmp_path: Path) -> None:
    trainer(tmp_path, save_total_limit=1, save_steps=2).train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-14"]


class Falling(TrainerCallback):
    """Pretends that every evaluation is worse than the one before: the dense model would always win."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_accuracy"] = -float(state.global_step)


BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
}


def test_only_a_model_at_its_target_becomes_the_best(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=(Falling(),), **BEST)
    run.train()
    # The cool-down is the last four steps: 12 is the first evaluation at the target.
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")
    flags = {entry["step"]: entry[AT_TARGET] for entry in run.state.log_history if "eval_loss" in entry}
    assert flags[12]
    assert not flags[8]
    best = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-12").state_dict()
    assert_same(weights(run), best)
    assert run.pins.final is not None
    assert run.pins.final["zeros"] == round(0.75 * run.pins.final["weights"])


def test_early_stopping_waits_for_the_target(tmp_path: Path) -> None:
    early = (Falling(), EarlyStoppingCallback(1))
    settings = BEST | {"max_steps": 30, "restore_callback_states_from_checkpoint": True}
    config = PruneConfig(sparsity=0.75, delta_t=2, warmup=2, cooldown=18)
    run = trainer(tmp_path, config=config, callbacks=early, **settings)
    run.train()
    assert run.state.global_step == 16
    assert run.state.best_global_step == 14
    expected = weights(run)
    again = trainer(tmp_path / "b", config=config, callbacks=(Falling(), EarlyStoppingCallback(1)), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    assert again.state.global_step == 16
    assert_same(weights(again), expected)


def test_a_failing_disk_ends_training_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path)
    save = torch.save

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-8" in str(file):
            raise OSError(28, "No space left on device")
        save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SaveError, match=r"checkpoint-8: .*No space left"):
        run.train()
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-4", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4"]


def test_a_checkpoint_tells_where_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path).train()
    manifest = json.loads((tmp_path / "checkpoint-4" / "checkpoint.json").read_text())
    assert manifest["step"] == 4
    assert manifest["numerics"]["threads"] == torch.get_num_threads()
    said: list[str] = []
    monkeypatch.setattr("pins_ext.integrations.trainer.logger.warning", said.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert any("threads" in text and "77" in text for text in said)


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    other = trainer(tmp_path)
    other.model.extra = torch.nn.Linear(2, 2)  # type: ignore[union-attr]
    with pytest.raises(IncompleteError, match=r"missing \['extra"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_random_numbers_come_back() -> None:
    import random

    import numpy as np

    state = random_state.capture()

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with random_state.untouched():
        first = draw()
    assert draw() == first
    random_state.restore(state)
    assert draw() == first


def test_steps_are_timed(tmp_path: Path) -> None:
    timer = StepTimer()
    run = trainer(tmp_path, callbacks=(timer,))
    run.train()
    assert timer.steps == STEPS
    assert 0 < timer.optimizer_seconds < timer.seconds
    before = weights(run)
    assert run.model is not None
    plain = plain_step_seconds(run.optimizer, run.model)
    assert plain is not None
    assert plain > 0
    assert_same(weights(run), before)
    hooks = trainer(tmp_path, fused=False)
    hooks.create_optimizer()
    assert plain_step_seconds(hooks.optimizer, hooks.model) is None
    shutil.rmtree(tmp_path)
