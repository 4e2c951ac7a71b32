"""Resuming in mid-schedule, bit for bit, and files that are not what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Network, train

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW

STEPS = 60


def start(**options: Any) -> tuple[Network, Any, Pruner]:
    model = Network()
    optimizer = PinsAdamW(model.parameters(), lr=3e-3)
    config = PruneConfig(**({"sparsity": 0.8, "delta_t": 4, "warmup": 5, "cooldown": 20} | options))
    return model, optimizer, Pruner(model, optimizer, config, STEPS)


CASES: list[dict[str, Any]] = [
    {},
    {"state_dtype": "bfloat16"},
    {"mask_policy": "strict", "criterion": "platon"},
    {"beta2": 0},
    {"criterion": "movement"},
    {"criterion": "magnitude"},
    {"schedule": "one-shot"},
    {"scope": "layer"},
    {"scope": {"a": ("layers.0.*",)}},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("at", [3, 22, 50])
def test_resuming_equals_never_stopping(options: dict[str, Any], at: int, tmp_path: Path) -> None:
    whole, optimizer, pruner = start(**options)
    train(whole, optimizer, STEPS)
    first, optimizer, other = start(**options)
    train(first, optimizer, at)
    other.save(tmp_path / "pruner.safetensors")
    saved = (first.state_dict(), optimizer.state_dict())

    second, optimizer, resumed = start(**options)
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load(tmp_path / "pruner.safetensors")
    train(second, optimizer, STEPS, skip=at)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))
    assert torch.equal(pruner.masks.cutoff, resumed.masks.cutoff)
    assert resumed.step == STEPS


def test_another_configuration_is_refused_and_nothing_changes() -> None:
    _, _optimizer, pruner = start()
    state = pruner.state_dict()
    _, _, other = start(sparsity=0.7, delta_t=5)
    with pytest.raises(ValueError, match=r"sparsity: 0.8 there, 0.7 here\n  delta_t: 4 there, 5 here"):
        other.load_state_dict(state)
    _, _, other = start(state_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"torch\.float32"):
        other.load_state_dict(state)
    _, _, other = start(criterion="magnitude")
    with pytest.raises(ValueError, match="exist on one side only"):
        other.load_state_dict(state)
    assert other.step == 0


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model, optimizer, pruner = start()
    train(model, optimizer, 10)
    path = tmp_path / "pruner.safetensors"
    pruner.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["pruner.safetensors"]
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        pruner.load(path)
    path.write_bytes(content[:5000])
    with pytest.raises(ValueError, match="cannot be read"):
        pruner.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        pruner.load(tmp_path / "absent")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"is no pins_ext\.pruner file"):
        pruner.load(path)
    with pytest.raises(ValueError, match="not a pruner state of this version"):
        pruner.load_state_dict({"format": "other"})


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, pruner = start()
    path = tmp_path / "pruner.safetensors"
    pruner.save(path)
    old = path.read_bytes()
    train(model, optimizer, 10)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        pruner.save(path)
    assert path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    _, _, pruner = start()
    with pytest.raises(OSError, match=r"could not write .*pruner"):
        pruner.save(tmp_path / "missing" / "pruner.safetensors")
