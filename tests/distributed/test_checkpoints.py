"""torch.distributed.checkpoint: saved on one number of ranks, training goes on on another, to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import Network
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, digest, inject, masks, sharded, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from pins_ext import PruneConfig, Pruner, ShardedState

# One process needs no group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HALF = STEPS // 2 + 1
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def trainee(how: str, optimizer: str, options: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    model = sharded(how)
    made = OPTIMIZERS[optimizer](model.named_parameters())  # with names, as torchtitan has them
    return model, made, Pruner(model, made, PruneConfig(**(CONFIG | options)), STEPS)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT),
        "pruner": ShardedState(pruner),
    }


def first_half(how: str, optimizer: str, options: dict[str, Any], folder: Path, later: bool = False) -> None:
    """Train and save; later: in the background, while everything changes."""
    model, made, pruner = trainee(how, optimizer, options)
    for step in range(HALF):
        inject(model, step)
        made.step()
    alone = not dist.is_initialized()
    if later:
        # A group of its own: the thread that writes talks to the other ranks while training does.
        group = dist.new_group(backend="gloo")
        saving: Any = dcp.async_save(everything(model, made, pruner), checkpoint_id=folder, process_group=group)
        inject(model, 99)
        made.step()
        for state in pruner.state_dict()["tensors"].values():
            state.zero_()
        saving.result()
    else:
        dcp.save(everything(model, made, pruner), checkpoint_id=folder, no_dist=alone)


def second_half(how: str, optimizer: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load and go on to the end."""
    model, made, pruner = trainee(how, optimizer, options)
    state = everything(model, made, pruner)
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, made, state["optimizer"], options=FLAT)
    assert pruner.step == HALF
    # torchtitan names parameters by them.
    (group,) = made.param_groups
    learning = dict(model.named_parameters())
    assert [learning[name] for name in group["param_names"]] == group["params"]
    told: dict[str, Any] = {"loaded": masks(pruner), "masks": []}
    for step in range(HALF, STEPS):
        inject(model, step)
        made.step()
        told["masks"].append(masks(pruner))
    return told | {"final": pruner.finalize(), "weights": digest(whole(p) for p in model.parameters())}


def unbroken(optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    model, made, pruner = trainee("whole", optimizer, options)
    told: dict[str, Any] = {"masks": []}
    for step in range(STEPS):
        if step == HALF:
            told["loaded"] = masks(pruner)
        inject(model, step)
        made.step()
        if step >= HALF:
            told["masks"].append(masks(pruner))
    return told | {"final": pruner.finalize(), "weights": digest(whole(p) for p in model.parameters())}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("ranks") / "checkpoint"
    run(2, first_half, "rows", "PinsAdamW", {}, folder)
    return folder


def test_one_process_goes_on_from_two_ranks_to_the_same_bits(saved: Path) -> None:
    expected = unbroken("PinsAdamW", {})
    assert len(set(expected["masks"])) > 1
    assert second_half("whole", "PinsAdamW", {}, saved) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "optimizer", "options"),
    [
        ((4, "both"), (2, "rows"), "PinsAdamW", {}),
        ((4, "hybrid"), (1, "whole"), "PinsSGD", {"state_dtype": "bfloat16", "scope": "layer"}),
        ((1, "whole"), (2, "parallel"), "AdamW", {"beta2": 0.0}),
        ((2, "columns"), (4, "both"), "PinsAdamW", {"criterion": "magnitude"}),
        ((6, "rows"), (3, "columns"), "PinsAdamW", {"mask_policy": "strict", "criterion": "platon"}),
    ],
)
def test_training_goes_on_on_other_ranks_to_the_same_bits(
    before: tuple[int, str], after: tuple[int, str], optimizer: str, options: dict[str, Any], tmp_path: Path
) -> None:
    told = []
    for (size, how), half in ((before, first_half), (after, second_half)):
        case = (how, optimizer, options, tmp_path / "checkpoint")
        told.append([half(*case)] if size == 1 else run(size, half, *case))
    expected = unbroken(optimizer, options)
    assert len(set(expected["masks"])) > 1
    assert told[1] == [expected] * after[0]


def leg(how: str, folder: Path, begin: int, end: int) -> list[str]:
    """Go on from the checkpoint of step `begin` up to step `end`, and save; the mask of every step."""
    model, made, pruner = trainee(how, "PinsAdamW", {})
    alone = not dist.is_initialized()
    if begin:
        state = everything(model, made, pruner)
        dcp.load(state, checkpoint_id=folder / str(begin), no_dist=alone)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, made, state["optimizer"], options=FLAT)
    told = []
    for step in range(begin, end):
        inject(model, step)
        made.step()
        told.append(masks(pruner))
    dcp.save(everything(model, made, pruner), checkpoint_id=folder / str(end), no_dist=alone)
    return [*told, digest(whole(p) for p in model.parameters())]


@pytest.mark.slow
def test_from_one_process_to_four_and_back_and_to_four_again(tmp_path: Path) -> None:
    """In the middle of a window, before the schedule begins and within it, and in the cool-down."""
    begin, seen = 0, []
    final = STEPS - CONFIG["cooldown"]
    for size, how, end in ((1, "whole", 2), (4, "both", 14), (1, "whole", final + 1), (4, "hybrid", STEPS)):
        assert end % CONFIG["delta_t"] or end == STEPS
        told = [leg(how, tmp_path, begin, end)] if size == 1 else run(size, leg, how, tmp_path, begin, end)
        assert told == [told[0]] * size
        *of_steps, weights = told[0]
        seen += of_steps
        begin = end
    model, made, pruner = trainee("whole", "PinsAdamW", {})
    for step in range(STEPS):
        inject(model, step)
        made.step()
        assert masks(pruner) == seen[step], step
    assert len(set(seen)) > 4
    assert digest(whole(p) for p in model.parameters()) == weights


@pytest.mark.slow
def test_what_changes_after_async_save_is_not_saved(tmp_path: Path) -> None:
    run(2, first_half, "rows", "PinsAdamW", {}, tmp_path / "checkpoint", True)
    assert second_half("whole", "PinsAdamW", {}, tmp_path / "checkpoint") == unbroken("PinsAdamW", {})


def test_a_checkpoint_of_another_configuration_is_refused_by_name(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"delta_t: 3 there, 4 here"):
        second_half("whole", "PinsAdamW", {"delta_t": 4, "sparsity": 0.6}, saved)


def test_it_becomes_an_ordinary_checkpoint(saved: Path, tmp_path: Path) -> None:
    """Loaded without ranks, written as one file each, and read as if there never had been any."""
    model, made, pruner = trainee("whole", "PinsAdamW", {})
    state = everything(model, made, pruner)
    dcp.load(state, checkpoint_id=saved, no_dist=True)
    set_model_state_dict(model, state["model"])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    pruner.save(tmp_path / "pruner.safetensors")
    other = Network(13)
    again = Pruner(other, OPTIMIZERS["PinsAdamW"](other.parameters()), PruneConfig(**CONFIG), STEPS)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    again.load(tmp_path / "pruner.safetensors")
    assert masks(again) == unbroken("PinsAdamW", {})["loaded"]
    assert digest(other.parameters()) == digest(model.parameters())


def refused() -> list[str]:
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    said = []
    for rows in (7, 13, 8):
        model = nn.Sequential(nn.Linear(6, rows, bias=False), nn.Linear(rows, 6, bias=False))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
        try:
            ShardedState(pruner).state_dict()
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("fine")
    return said


@pytest.mark.slow
def test_cuts_that_torch_gets_wrong_are_refused_on_every_rank() -> None:
    """Saved all the same, torch loads 7 rows on 3 x 2 ranks back wrong on one of them, without a word."""
    told = run(6, refused)
    for said in told:
        assert said[2] == "fine"
        assert all("takes parts for others" in text and "Pruner.save" in text for text in said[:2])
    assert any("0.weight (7, 6)" in said[0] for said in told)
