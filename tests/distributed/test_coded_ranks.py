"""Statistics and moments in 8 bits on several ranks: masks, weights and checkpoints of one process, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_checkpoints as checkpoints
import test_sharded_pruner as sharded_pruner
import torch
from ranks import run
from sharded import inject, sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pins_ext import PruneConfig, Pruner
from pins_ext.distributed.shards import is_dtensor
from pins_ext.optim import PinsAdamW

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

EIGHT = {"state_dtype": "8bit"}
# Rows of 13 to 52 weights on up to four ranks; columns are cut at multiples of 32 in a model of width 64.
CASES: list[tuple[int, str, str, dict[str, Any], int]] = [
    (2, "rows", "PinsAdamW8", EIGHT, 13),
    (2, "rows", "SGD", EIGHT | {"mask_policy": "strict", "mask_optimizer_state": True}, 13),
    (2, "columns", "PinsAdamW8", EIGHT, 64),
    (2, "parallel", "PinsAdamW8", EIGHT | {"mask_optimizer_state": True}, 64),
    (2, "rows", "PinsAdamW8", {"criterion": "fisher"}, 13),
    (3, "rows", "PinsAdamW8", EIGHT, 13),
    (4, "rows", "PinsAdamW8", EIGHT | {"criterion": "moments"}, 13),
    (4, "both", "PinsAdamW8", EIGHT, 64),
]


def several(cases: list[tuple[str, str, dict[str, Any], int]]) -> list[dict[str, Any]]:
    return [sharded_pruner.pruned(*case) for case in cases]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_masks_and_weights_in_8_bits_are_those_of_one_process(size: int) -> None:
    here = [case[1:] for case in CASES if case[0] == size]
    told = run(size, several, here)
    for i, (how, optimizer, options, width) in enumerate(here):
        alone = sharded_pruner.pruned("whole", optimizer, options, width)
        assert len(set(alone["masks"])) >= 4
        for rank in told:
            assert rank[i]["placements"] != ["None"]
            for part in ("masks", "view", "stats", "final", "weights"):
                assert rank[i][part] == alone[part], (how, optimizer, options, part)


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_checkpoint_in_8_bits_goes_on_on_other_ranks(before: int, after: int, tmp_path: Path) -> None:
    run(before, checkpoints.first_half, "rows", "PinsAdamW8", EIGHT, tmp_path)
    expected = checkpoints.unbroken("PinsAdamW8", EIGHT)
    if after == 1:
        told = [checkpoints.second_half("whole", "PinsAdamW8", EIGHT, tmp_path)]
    else:
        told = run(after, checkpoints.second_half, "rows", "PinsAdamW8", EIGHT, tmp_path)
    assert all(rank == expected for rank in told)


def one_file(how: str, folder: Path, resumed: bool) -> dict[str, Any]:
    """All states of ranks in one file, and what one process reads of it."""
    model = sharded(how)
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=1e-2), PruneConfig(**EIGHT, delta_t=2), 20)
    if resumed:
        pruner.load(folder / "pruner.safetensors")
    else:
        for step in range(5):
            inject(model, step)
            pruner.slots[0].optimizer.step()
        pruner.save(folder / "pruner.safetensors")
    return {name: x.tolist() for name, x in pruner.state_dict()["tensors"].items()}


def test_one_file_of_states_in_8_bits_knows_no_ranks(tmp_path: Path) -> None:
    alone = one_file("whole", tmp_path, False)
    assert all(told == alone for told in run(3, one_file, "rows", tmp_path, False))
    assert one_file("whole", tmp_path, True) == alone
    assert all(told == alone for told in run(2, one_file, "rows", tmp_path, True))


def refusals() -> list[str]:
    """What is said of a cut through groups: 40 of 80 columns, and 40 of 80 weights in one dimension."""
    mesh, said = init_device_mesh("cpu", (2,)), []
    model = nn.Linear(80, 6, bias=False)
    model.weight = nn.Parameter(distribute_tensor(torch.randn(6, 80), mesh, [Shard(1)]))
    optimizer = PinsAdamW(model.parameters(), lr=1e-2)
    try:
        Pruner(model, optimizer, PruneConfig(**EIGHT, include=("*",)), 10)
    except ValueError as error:
        said.append(str(error))
    vector = nn.Parameter(distribute_tensor(torch.randn(80), mesh, [Shard(0)]))
    vector.grad = distribute_tensor(torch.randn(80), mesh, [Shard(0)])
    assert isinstance(vector.grad, DTensor)
    assert is_dtensor(vector)
    small = PinsAdamW([vector], lr=1e-2, moment_dtype="8bit")
    try:
        small.step()
    except ValueError as error:
        said.append(str(error))
    return said


def test_a_cut_through_groups_is_refused_at_attach_with_the_sizes() -> None:
    for pruned, vector in run(2, refusals):
        assert "cut inside its rows of 80 weights: (6, 40) of (6, 80) from (0, " in pruned
        assert "cut inside its rows of 80 weights: (40,) of (80,) from (" in vector
        assert all("multiples of 32 weights, or use bfloat16" in text for text in (pruned, vector))
