"""`pins-ext train` with small states, from a sparse checkpoint, with released gradients; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import assert_same, flags, weights

from pins_ext.cli.main import main
from pins_ext.integrations import callback
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.pruner import Pruner

ALONE = ("--teacher", "none", "--max-grad-norm", "0")


@pytest.mark.parametrize(
    ("small", "dtype"), [("8bit", "bfloat16"), pytest.param("bfloat16", "float32", marks=pytest.mark.slow)]
)
def test_small_states_train_and_hold(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: str, dtype: str
) -> None:
    """The flags reach the states: what is stored is as small as it says."""
    made: list[Pruner] = []
    new = callback.PinsCallback.new_pruner
    monkeypatch.setattr(callback.PinsCallback, "new_pruner", lambda *args: made.append(pruner := new(*args)) or pruner)
    asked = ("--state-dtype", small, "--moment-dtype", small, "--dtype", dtype, "--teacher", "none")
    assert main(["train", *flags(tiny, tmp_path / "run", *asked)]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    (pruner,) = made
    optimizer: Any = pruner.slots[0].optimizer
    assert isinstance(optimizer, PinsAdamW)
    moments = {state["exp_avg_sq"].dtype for state in optimizer.state.values()}
    stored = {"bfloat16": torch.bfloat16, "8bit": torch.uint8}[small]
    assert moments == {stored} == {t.dtype for tensors in pruner.importance.tensors().values() for t in tensors}
    config = json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]
    assert config["pruning"]["state_dtype"] == config["training"]["moment_dtype"] == small


def test_statistics_on_the_host_are_asked_for_by_a_flag(tiny: Path, unbroken: Path, tmp_path: Path) -> None:
    """On a machine without a GPU they are there already: the same run, which goes on where the other one stopped."""
    assert main(["train", *flags(tiny, tmp_path / "run", "--state-device", "cpu")]) == 0
    assert_same(unbroken, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]
    assert config["pruning"]["state_device"] == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--state-dtype", "8bit", "--moment-dtype", "8bit", "--dtype", "bfloat16")])
def test_released_gradients_end_at_the_same_weights(tiny: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    for name, own in (("kept", ()), ("released", ("--release-gradients",))):
        assert main(["train", *flags(tiny, tmp_path / name, *ALONE, *more, *own)]) == 0
    assert_same(tmp_path / "kept", tmp_path / "released")
    clipped = ("--release-gradients", "--release-norm", "0.01", "--release-clip", "tensor")
    assert main(["train", *flags(tiny, tmp_path / "clipped", *ALONE, *more, *clipped)]) == 0
    kept, other = weights(tmp_path / "kept"), weights(tmp_path / "clipped")
    assert any(not torch.equal(kept[name], other[name]) for name in kept)


def test_a_sparse_checkpoint_is_pruned_further(
    tiny: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = flags(tiny, tmp_path / "run", "--from-sparse", "--sparsity", "0.9", "--teacher", "none")
    asked[asked.index("--model") + 1] = str(unbroken)
    assert main(["train", *asked]) == 0
    assert "12 tensors; 75.0 % to step 1, 90.0 % from step 9" in capsys.readouterr().out
    place = asked.index("--output-dir")
    assert main(["plan", *asked[:place], *asked[place + 2 :]]) == 0
    assert "schedule cubic: 75.0% to step 1" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    start, end = weights(unbroken), weights(tmp_path / "run")
    assert record["schedule"][0]["target_sparsity"] == pytest.approx(0.75, abs=1e-3)
    for name in record["final"]["tensors"]:
        assert not torch.count_nonzero(end[name][start[name] == 0])
    assert record["final"]["zeros"] == round(0.9 * record["final"]["weights"])


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--from-sparse", "--sparsity", "0"), "--sparsity as the model has keeps just these"),
        (("--from-sparse", "--random-init"), "--random-init has none"),
        (("--from-sparse", "--compare"), "no dense run to compare with"),
        (("--from-sparse",), "the model has no zeros in its prunable parameters"),
        (("--from-sparse", "--pattern", "1:4"), "leave --pattern out to prune further"),
        (("--from-sparse", "--state-dtype", "8bit", "--max-density", "0.9"), "leave min_density and max_density out"),
        (("--release-norm", "1"), "--release-norm is of --release-gradients"),
        (("--release-gradients", "--release-clip", "tensor"), "--release-norm to which norm"),
        (("--release-gradients",), "max_grad_norm=1 clips by this step's norm"),
        (("--release-gradients", "--max-grad-norm", "0", "--score-gradient", "task"), "use joint"),
        (
            ("--release-gradients", "--max-grad-norm", "0", "--optimizer", "adamax"),
            "--release-gradients is of --optimizer adamw",
        ),
        (("--release-gradients", "--max-grad-norm", "0", "--gradient-accumulation-steps", "2"), "set it to 1"),
        (("--release-gradients", "--max-grad-norm", "0", "--criterion", "movement"), "criterion='movement'"),
        (("--moment-dtype", "8bit", "--optimizer", "sgd"), "--moment-dtype 8bit is of --optimizer adamw"),
        (("--state-dtype", "8bit", "--criterion", "pins-signed"), "8bit stores none"),
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
