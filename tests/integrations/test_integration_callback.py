"""PinsCallback in a stock Trainer script: exact sparsity, what is logged, checkpoints, resuming, refusals."""

from __future__ import annotations

import dataclasses
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import stock_script
import torch
import transformers.trainer
from bert import (
    CONFIG,
    STEPS,
    arguments,
    assert_at_target,
    assert_same,
    model,
    pins,
    stock,
    weights,
)
from transformers import AutoModelForSequenceClassification, TrainerCallback

from pins_ext.files import tensor_file
from pins_ext.integrations.callback import (
    ORIGIN_FILE,
    PRUNER_FILE,
    TEACHER_FILE,
    PinsCallback,
)
from pins_ext.integrations.logs import NEW_MASK, as_named_now
from pins_ext.integrations.optimizer import optimizer
from pins_ext.integrations.unsupported import refuse_unsupported
from pins_ext.pruning.checkpoint import FORMAT
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.plan import ConflictWarning
from pins_ext.regularization.self_regularizer import SelfRegularizer


def command_line(tiny: Path, output: Path, *more: str) -> list[str]:
    """What the script is called with: 14 steps of two batches of 4."""
    data = ["--train_file", f"{tiny}/train.csv", "--validation_file", f"{tiny}/dev.csv", "--cache_dir", f"{tiny}/cache"]
    length = ["--max_steps", str(STEPS), "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    logs = ["--logging_steps", "3", "--save_steps", "4", "--disable_tqdm", "True", "--report_to", "none", "--use_cpu"]
    net = ["--model_name_or_path", f"{tiny}/model", "--output_dir", str(output), "--learning_rate", "1e-3"]
    return [*net, *data, *length, *logs, "--do_train", *more]


class Reporter(TrainerCallback):
    """Keeps what a reporter of `report_to` is given, as it is when it is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class PulledPlug(TrainerCallback):
    """Ends training in the middle, as a crash would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 10:
            raise KeyboardInterrupt


def test_a_stock_script_ends_at_its_sparsity_to_the_last_weight(tiny: Path, tmp_path: Path) -> None:
    run = stock_script.main(command_line(tiny, tmp_path, "--do_eval"))
    assert_at_target(pins(run))
    saved: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    blocks = [m.weight for m in saved.bert.encoder.modules() if isinstance(m, torch.nn.Linear)]
    n = sum(w.numel() for w in blocks)
    assert sum(int((w == 0).sum()) for w in blocks) == n - round(0.25 * n)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 8, 12, 14)}
    for folder in tmp_path.glob("checkpoint-*"):
        assert (folder / PRUNER_FILE).is_file()
        assert (folder / ORIGIN_FILE).is_file()


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_killed_script_started_again_ends_with_the_weights_of_an_unbroken_one(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    flags = ("--optim", name, "--learning_rate", "1e-2" if name == "sgd" else "1e-3")
    unbroken = stock_script.main(command_line(tiny, tmp_path / "unbroken", *flags))
    with pytest.raises(KeyboardInterrupt):
        stock_script.main(command_line(tiny, tmp_path / "killed", *flags), [PulledPlug()])
    assert sorted(p.name for p in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    resumed = stock_script.main(command_line(tiny, tmp_path / "killed", *flags))
    assert_same(weights(resumed), weights(unbroken))
    assert pins(resumed).final == pins(unbroken).final


@pytest.mark.parametrize("fused", [True, False])
def test_reporters_get_sparsity_threshold_churn_and_overhead(
    tmp_path: Path, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reporter stands before the user's callbacks in a Trainer's list, as TensorBoard's and W&B's do."""
    reporter = Reporter()
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, reporter])
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=7, save_strategy="no")
    run = stock(model(), args, PinsCallback(CONFIG), optimizer_cls_and_kwargs=optimizer(args) if fused else None)
    run.train()
    training = [log for log in reporter.logs if "loss" in log]
    assert len(training) == 4
    for log in training:
        assert 0 <= log["pins/zeros"] <= log["pins/sparsity"] + 0.01 <= 0.76
        assert log["pins/pruning_ms"] > 0
        assert 0 < log["pins/pruning_share"] < 1
        # The first mask comes with the fifth step.
        assert (
            ("pins/threshold" in log) == ("pins/churn" in log) == (log["pins/sparsity"] > 0) == (log is not training[0])
        )
        own = {name for name in log if not name.startswith("pins/")}
        assert own <= {"loss", "grad_norm", "learning_rate", "epoch", "total_flos", "num_input_tokens_seen"}
    assert training[-1]["pins/threshold"] > 0
    assert training[-1]["pins/sparsity"] == training[-1]["pins/zeros"] == pytest.approx(0.75, abs=1e-3)
    assert any(0 < log["pins/churn"] < 1 for log in training[1:])
    history = [{**entry} for entry in run.state.log_history if "loss" in entry]
    assert [log["pins/pruning_share"] for log in training] == [entry["pins/pruning_share"] for entry in history]
    assert all("eval_pins/zeros" in log for log in reporter.logs if "eval_loss" in log)


def test_between_two_masks_the_log_says_what_the_mask_prunes_and_what_is_zero(tmp_path: Path) -> None:
    """Weights grow back in between: the mask's sparsity is that of the schedule all the same."""
    args = arguments(tmp_path, save_strategy="no", logging_steps=1)
    run = stock(model(), args, PinsCallback(dataclasses.replace(CONFIG, delta_t=4)))
    run.train()
    logged = {entry["step"]: entry for entry in run.state.log_history if "loss" in entry}
    masks = {entry["step"]: entry for entry in run.state.log_history if NEW_MASK in entry}
    first, *_ = masks
    assert masks[first]["pins/sparsity"] == pytest.approx(masks[first]["pins/target_sparsity"], abs=1e-3)
    after = logged[first + 1]
    assert after["pins/sparsity"] == masks[first]["pins/sparsity"] > 0
    assert after["pins/zeros"] < 0.01


def test_the_history_of_an_earlier_version_is_read() -> None:
    history = [
        {"step": 0, "pins_run": "a"},
        {"step": 4, "loss": 1.0, "sparsity": 0.1, "target_sparsity": 0.3, "pruning_ms": 2.0},
        {"step": 5, "mask_sparsity": 0.4, "target_sparsity": 0.4, "threshold": 0.1, "churn": 0.2},
        {"step": 5, "eval_loss": 1.0, "eval_sparsity": 0.4, "at_target": True},
    ]
    now = as_named_now(history)
    assert now == [
        {"step": 0, "pins/run": "a"},
        {"step": 4, "loss": 1.0, "pins/zeros": 0.1, "pins/target_sparsity": 0.3, "pins/pruning_ms": 2.0},
        {
            "step": 5,
            "pins/sparsity": 0.4,
            "pins/target_sparsity": 0.4,
            "pins/threshold": 0.1,
            "pins/churn": 0.2,
            NEW_MASK: 4,
        },
        {"step": 5, "eval_loss": 1.0, "eval_pins/zeros": 0.4, "pins/at_target": True},
    ]
    assert as_named_now(now) == now
    own = [{"step": 1, "loss": 1.0, "sparsity": 0.5}]
    assert as_named_now(own) == own  # no history of ours


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path, report_to="tensorboard", save_strategy="no")
    stock(model(), args, PinsCallback(CONFIG)).train()
    folders = {file.parent for file in tmp_path.rglob("events.out.tfevents*")}
    tags = {tag for folder in folders for tag in EventAccumulator(str(folder)).Reload().Tags()["scalars"]}
    assert {f"train/{n}" for n in map("pins/{}".format, ("sparsity", "zeros", "churn", "pruning_ms"))} <= tags


def test_resuming_finds_the_checkpoint_of_this_run_or_says_so(tmp_path: Path) -> None:
    whole = stock(model(), arguments(tmp_path / "a"), PinsCallback(CONFIG))
    whole.train()
    elsewhere = tmp_path / "a" / "checkpoint-8"
    moved = stock(model(), arguments(tmp_path / "b"), PinsCallback(CONFIG, resume_from=elsewhere))
    moved.train(resume_from_checkpoint=str(elsewhere))
    assert_same(weights(moved), weights(whole))
    lost = stock(model(), arguments(tmp_path / "c"), PinsCallback(CONFIG))
    with pytest.raises(ValueError, match="does not hold that step of this run"):
        lost.train(resume_from_checkpoint=str(elsewhere))
    # Another run's checkpoint of the same step lies where the callback looks.
    stock(model(), arguments(tmp_path / "d"), PinsCallback(CONFIG)).train()
    mistaken = stock(model(), arguments(tmp_path / "d"), PinsCallback(CONFIG))
    with pytest.raises(ValueError, match="does not hold that step of this run"):
        mistaken.train(resume_from_checkpoint=str(elsewhere))


def test_the_teacher_is_in_every_checkpoint_too(tmp_path: Path) -> None:
    def run() -> Any:
        net = model()
        return stock(net, arguments(tmp_path), PinsCallback(CONFIG, SelfRegularizer(net, every=3)))

    whole = run()
    whole.train()
    assert all((folder / TEACHER_FILE).is_file() for folder in tmp_path.glob("checkpoint-*"))
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same(weights(resumed), weights(whole))


class Rising(TrainerCallback):
    """Pretends that the loss only grows: the dense model would always be the best."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_loss"] = float(state.global_step)


def test_a_stock_trainer_s_best_model_is_sparse_too(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    args = arguments(tmp_path, metric_for_best_model="loss", greater_is_better=False, **settings)
    run = stock(model(), args, PinsCallback(CONFIG), Rising())
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")
    assert_at_target(pins(run))


def test_ways_of_training_that_would_go_wrong_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {}}
    with pytest.raises(ValueError, match="DeepSpeed steps its optimizer inside backward"):
        refuse_unsupported(args)


@pytest.mark.parametrize("other", ["step", "run"])
def test_a_pruner_file_of_another_step_or_run_is_refused(tmp_path: Path, other: str) -> None:
    stock(model(), arguments(tmp_path / "a"), PinsCallback(CONFIG)).train()
    stock(model(), arguments(tmp_path / "b"), PinsCallback(CONFIG)).train()
    folder = tmp_path / "a" / "checkpoint-8"
    theirs = tmp_path / ("b/checkpoint-8" if other == "run" else "a/checkpoint-4")
    shutil.copy(theirs / PRUNER_FILE, folder / PRUNER_FILE)
    resumed = stock(model(), arguments(tmp_path / "a"), PinsCallback(CONFIG))
    with pytest.raises(ValueError, match=f"{PRUNER_FILE} belongs to .*'step': {4 if other == 'step' else 8}"):
        resumed.train(resume_from_checkpoint=str(folder))


def test_a_pruner_file_that_does_not_say_is_taken_with_a_warning(tmp_path: Path) -> None:
    whole = stock(model(), arguments(tmp_path / "a"), PinsCallback(CONFIG))
    whole.train()
    path = tmp_path / "a" / "checkpoint-8" / PRUNER_FILE
    tensor_file.write(path, FORMAT, *tensor_file.read(path, FORMAT))
    resumed = stock(model(), arguments(tmp_path / "a"), PinsCallback(CONFIG))
    with pytest.warns(UserWarning, match="doesn't say what it belongs to"):
        resumed.train(resume_from_checkpoint=str(path.parent))
    assert_same(weights(resumed), weights(whole))


def test_a_run_too_short_for_its_schedule_says_so(tmp_path: Path) -> None:
    short = stock(
        model(), arguments(tmp_path, max_steps=3, save_strategy="no"), PinsCallback(PruneConfig(sparsity=0.8))
    )
    with (
        pytest.warns(ConflictWarning, match="no mask falls between warm-up and cool-down"),
        pytest.warns(UserWarning, match=r"jumped from 0\.0% to 80\.0% after 3 of 3 steps.*too short for windows of 10"),
    ):
        short.train()
