"""Where a shard lies, by our own arithmetic, against what torch gathers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import box, local, shard_of


def agrees(name: str, whole: Tensor, tensor: Tensor, gathers: bool = True) -> None:
    """The rank's part of an arange is where the arithmetic says.

    Args:
        gathers: whether torch can put the whole together again: not where tensor parallelism leaves ranks without rows.
    """
    shard = shard_of(name, tensor)
    part = local(tensor)
    assert not gathers or torch.equal(tensor.full_tensor(), whole)  # type: ignore[attr-defined]
    assert shard is not None
    assert shard.full == tuple(whole.shape)
    expected = whole[tuple(slice(s, s + n) for s, n in zip(shard.start, part.shape, strict=True))]
    assert torch.equal(part, expected), (name, shard, part, expected)
    layout = ops.Layout.of([part], [shard])
    if part.numel():
        assert torch.equal(layout.global_index(0, torch.arange(part.numel())), part.flatten().long())


def wholes() -> list[Tensor]:
    shapes = [(8, 4), (7, 5), (13, 6), (1, 3), (2, 9), (12,), (3, 6, 4)]
    return [torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) for shape in shapes]


def placed_by_hand(rows: int, columns: int) -> None:
    mesh = init_device_mesh("cpu", (rows, columns))
    for whole in wholes():
        last = whole.dim() - 1
        for placements in (
            (Shard(0), Replicate()),
            (Replicate(), Shard(0)),
            (Shard(0), Shard(0)),
            (Shard(0), Shard(last)),
            (Shard(last), Shard(0)),
            (Replicate(), Shard(last)),
        ):
            agrees(f"{tuple(whole.shape)} {placements}", whole, distribute_tensor(whole, mesh, placements))


def fully_sharded_and_parallel(rows: int, columns: int) -> None:
    """FSDP2 over what tensor parallelism has cut: by columns, and by rows, whose second cut is strided."""
    mesh = init_device_mesh("cpu", (rows, columns), mesh_dim_names=("dp", "tp"))
    for outputs in (7, 8, 13, 2):
        model = nn.Sequential(nn.Linear(6, outputs, bias=False), nn.Linear(outputs, 6, bias=False))
        for layer in model:
            whole = torch.arange(layer.weight.numel(), dtype=torch.float32).reshape(layer.weight.shape)
            layer.weight.data.copy_(whole)
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        for name, p in model.named_parameters():
            whole = torch.arange(p.numel(), dtype=torch.float32).reshape(p.shape)
            agrees(f"{name} {tuple(p.shape)} {p.placements}", whole, p.detach(), gathers=columns < 4)


def hybrid() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = nn.Linear(5, 7, bias=False)
    model.weight.data.copy_(torch.arange(35.0).reshape(7, 5))
    fully_shard(model, mesh=mesh)
    agrees("weight", torch.arange(35.0).reshape(7, 5), model.weight.detach())


def sharded_by_columns() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(6, 5, bias=False)
    model.weight.data.copy_(torch.arange(30.0).reshape(5, 6))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1))
    agrees("weight", torch.arange(30.0).reshape(5, 6), model.weight.detach())


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_every_placement(rows: int, columns: int) -> None:
    run(rows * columns, placed_by_hand, rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_fsdp_over_tensor_parallelism_with_uneven_rows(rows: int, columns: int) -> None:
    """3 x 2 ranks and 7 rows: torch's own offsets are wrong there."""
    run(rows * columns, fully_sharded_and_parallel, rows, columns)


def test_hybrid_and_by_columns() -> None:
    run(4, hybrid)
    run(2, sharded_by_columns)


def test_what_is_not_understood_is_refused() -> None:
    from torch.distributed.tensor.placement_types import _StridedShard

    with pytest.raises(ValueError, match=r"w is placed as P\(sum\), whose parts"):
        box("w", (4, 4), (2,), (0,), (Partial(),))
    with pytest.raises(ValueError, match="an order of cuts that isn't known"):
        box("w", (4, 4), (2, 2), (0, 0), (_StridedShard(0, split_factor=4), Shard(0)))
    assert box("w", (7, 4), (3, 2), (2, 1), (_StridedShard(0, split_factor=2), Shard(0))) == ((6, 0), (1, 4))
    assert shard_of("w", torch.zeros(3)) is None


def test_offloaded_parameters_are_refused() -> None:
    """As CPUOffloadPolicy leaves them; a stand-in, for there is no mesh of GPUs here."""
    mesh = SimpleNamespace(device_type="cuda", shape=(1,), get_coordinate=lambda: [0])
    parameter: Any = SimpleNamespace(
        device_mesh=mesh, placements=(Shard(0),), shape=torch.Size((4, 4)), to_local=lambda: torch.zeros(4, 4)
    )
    with pytest.raises(ValueError, match=r"w lies on a cpu while its ranks talk on cuda: offloading .* leave it out"):
        shard_of("w", parameter)


def on_meshes_that_cross() -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensors = [distribute_tensor(torch.ones(4, 4), mesh[name], [Shard(0)]) for name in ("dp", "tp")]
    with pytest.raises(ValueError, match="none of them covers the others") as caught:
        Ranks(tensors)
    # Beside one that covers both it is clear who counts what.
    everyone = Ranks([*tensors, distribute_tensor(torch.ones(4, 4), mesh, [Replicate(), Shard(0)])])
    assert everyone.size == 4
    return str(caught.value)


@pytest.mark.slow
def test_meshes_of_which_none_covers_the_others_are_refused_on_every_rank() -> None:
    told = run(4, on_meshes_that_cross)
    assert "ranks [0, 2] and [0, 1]" in told[0]
    assert "ranks [1, 3] and [2, 3]" in told[3]
