"""Resuming self-regularization: bitwise, and what a checkpoint holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from regularized import Net, batches, same, weights
from safetensors.torch import save_file
from torch import nn

from pins_ext.regularization.self_regularizer import SelfRegularizer


@pytest.mark.parametrize("policy", ["latest", "best", "ema"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 5])
def test_resuming_is_bitwise(policy: str, dtype: torch.dtype, at: int, tmp_path: Path) -> None:
    def run(model: nn.Module, reg: SelfRegularizer, optimizer: Any, first: int, last: int) -> None:
        for i in range(first, last):
            torch.manual_seed(i)
            inputs = batches(1, i)[0]
            inputs["x"] = inputs["x"].to(dtype)
            optimizer.zero_grad()
            reg(model(**inputs), inputs).backward()
            optimizer.step()
            reg.step()
            reg.evaluated((0.5, 0.2, 0.7, 0.6, 0.8, 0.1)[i % 6])

    def fresh() -> tuple[nn.Module, SelfRegularizer, Any]:
        model = Net(dtype=dtype)
        return model, SelfRegularizer(model, policy, every=2), torch.optim.AdamW(model.parameters(), lr=0.02)

    unbroken, reg, optimizer = fresh()
    run(unbroken, reg, optimizer, 0, at)
    reg.save(tmp_path / "teacher.safetensors")
    kept = weights(unbroken), copy.deepcopy(optimizer.state_dict())
    run(unbroken, reg, optimizer, at, 9)

    resumed, again, second = fresh()
    resumed.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    again.load(tmp_path / "teacher.safetensors")
    run(resumed, again, second, at, 9)
    assert same(weights(resumed), weights(unbroken))
    assert same(again.state_dict()["tensors"], reg.state_dict()["tensors"])
    assert again.state_dict()["meta"] == reg.state_dict()["meta"]


def test_state_has_tied_tensors_once_and_no_passing_buffers() -> None:
    model = Net()
    reg = SelfRegularizer(model, every=1)
    assert reg.state_dict()["tensors"] == {}
    reg.step()
    names = reg.state_dict()["tensors"].keys()
    assert "first.weight" in names
    assert "norm.running_mean" in names
    assert "again.weight" not in names
    assert "scratch" not in names


def test_foreign_state_is_refused() -> None:
    reg = SelfRegularizer(Net(), every=1)
    reg.step()
    state = reg.state_dict()
    with pytest.raises(ValueError, match=r"teacher='latest' \(now 'best'\), temperature=2.0 \(now 3.0\)"):
        SelfRegularizer(Net(), "best", temperature=3.0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"2 of another shape, classifier\.weight first"):
        SelfRegularizer(Net(classes=4), every=1).load_state_dict(state)
    del state["tensors"]["first.bias"]
    with pytest.raises(ValueError, match=r"1 tensors missing, 0 foreign, 0 of another shape, first\.bias first"):
        SelfRegularizer(Net(), every=1).load_state_dict(state)


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    reg = SelfRegularizer(Net(), every=1)
    reg.step()
    path = tmp_path / "teacher.safetensors"
    reg.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match="is damaged"):
        reg.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        reg.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        reg.load(tmp_path / "nothing")
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"is no pins_ext\.teacher file"):
        reg.load(path)
