"""A teacher of a model that is cut over ranks: losses, masks, weights and its file are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, digest, masks, sharded, whole
from torch import nn

from pins_ext import PruneConfig, Pruner, SelfRegularizer
from pins_ext.regularization.borrowed import Borrowed

CASES: list[tuple[int, str, dict[str, Any]]] = [
    (2, "rows", {"teacher": "latest", "every": 4}),
    (2, "columns", {"teacher": "best"}),
    (2, "rows", {"teacher": "ema", "every": 3, "weight": 0.5}),
    (2, "parallel", {"teacher": "latest", "every": 5}),
    (4, "hybrid", {"teacher": "ema", "every": 4}),
    (4, "both", {"teacher": "latest", "every": 4}),
    (3, "rows", {"teacher": "best", "teacher_init": True}),
    (3, "rows", {"teacher": "ema", "every": 4, "teacher_init": True}),
]


def trained(how: str, settings: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Train on the same batches everywhere, an evaluation in some steps; save in the middle."""
    model = sharded(how, 16)  # tensor parallelism computes with even parts alone
    if settings.get("teacher_init"):
        settings = settings | {"teacher_init": other()}
    optimizer = OPTIMIZERS["PinsAdamW"](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    regularizer = SelfRegularizer(model, head="classification", **settings)
    regularizer.teacher.snapshots_in = pruner.masked_view
    told: dict[str, Any] = {"losses": [], "masks": []}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, labels = torch.randn(6, 7, generator=generator), torch.randint(3, (6,), generator=generator)
        loss = regularizer({"logits": model(x)}, {"x": x, "labels": labels})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        regularizer.step()
        if step % 4 == 3:
            # FSDP stays gathered after it.
            with torch.no_grad():
                model(x)
            regularizer.evaluated(1.0 - abs(step - 15))
        told["losses"].append(regularizer.stats())
        told["masks"].append(masks(pruner))
        if step == STEPS // 2 and folder is not None:
            regularizer.save(folder / "teacher.safetensors")
    assert model.training
    assert isinstance(regularizer.teacher.module, Borrowed) == (how != "whole")
    told["teacher"] = tensors_of(regularizer)
    told["weights"] = digest(whole(p) for p in model.parameters())
    told["bytes"] = regularizer.plan()["memory"]
    return told


def tensors_of(regularizer: SelfRegularizer) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in regularizer.state_dict()["tensors"].items()}


def other() -> nn.Module:
    """A model of the same architecture with other weights."""
    from models import Network

    return Network(16, seed=5)


def agree(told: dict[str, Any], alone: dict[str, Any], exact: bool) -> None:
    """Tensor parallelism adds in another order."""
    if exact:
        assert {**told, "bytes": 0} == {**alone, "bytes": 0}
        return
    for here, there in zip(told["losses"], alone["losses"], strict=True):
        assert here == pytest.approx(there, rel=1e-3, abs=1e-5)
    for name, values in alone["teacher"].items():
        torch.testing.assert_close(torch.tensor(told["teacher"][name]), torch.tensor(values), rtol=1e-2, atol=1e-2)
    assert told["bytes"]["teacher"] < alone["bytes"]["teacher"]


def several(cases: list[tuple[str, dict[str, Any]]], folder: Path) -> list[dict[str, Any]]:
    return [trained(*case, folder) for case in cases]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_masks_are_those_of_one_process(size: int, tmp_path: Path) -> None:
    cases = [case[1:] for case in CASES if case[0] == size]
    found = run(size, several, cases, tmp_path)
    torch.set_num_threads(1)  # as ranks have
    for i, (how, settings) in enumerate(cases):
        alone = trained("whole", settings)
        assert "divergence" in alone["losses"][-1]
        for told in found:
            agree(told[i], alone, exact=how not in ("parallel", "both") and size != 3)


def saved(how: str, settings: dict[str, Any], folder: Path) -> None:
    trained(how, settings, folder)


def loaded(how: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    regularizer = SelfRegularizer(sharded(how, 16), head="classification", **settings)
    regularizer.load(folder / "teacher.safetensors")
    return tensors_of(regularizer)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"teacher": "latest", "every": 4}, {"teacher": "ema", "every": 3}], ids=str)
def test_its_file_knows_no_ranks(settings: dict[str, Any], tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "four"):
        folder.mkdir()
    saved("whole", settings, tmp_path / "one")
    run(4, saved, "hybrid", settings, tmp_path / "four")
    expected = loaded("whole", settings, tmp_path / "one")
    assert loaded("whole", settings, tmp_path / "four") == expected
    assert run(3, loaded, "rows", settings, tmp_path / "one") == [expected] * 3


def in_float64(folder: Path) -> list[bool]:
    """Of a model in float64, whether the teacher's file gives back every bit of its parts."""
    model = sharded("rows", 16).double()
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        part = p.to_local() if hasattr(p, "to_local") else p
        part.data.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float64))
    regularizer = SelfRegularizer(model, teacher="latest", every=1, head="classification")
    regularizer.step()
    regularizer.save(folder / "teacher.safetensors")
    before = regularizer.teacher.module
    assert isinstance(before, Borrowed)
    again = SelfRegularizer(model, teacher="latest", every=1, head="classification")
    again.load(folder / "teacher.safetensors")
    after = again.teacher.module
    assert isinstance(after, Borrowed)
    assert all(part.dtype == torch.float64 for part in after.parts.values())
    return [torch.equal(part, after.parts[name]) for name, part in before.parts.items()]


@pytest.mark.slow
def test_a_teacher_in_float64_is_saved_to_the_last_bit(tmp_path: Path) -> None:
    for told in run(2, in_float64, tmp_path):
        assert len(told) > 10
        assert all(told)
