"""Where the local part of a DTensor lies in the whole tensor: own index arithmetic, right for uneven cuts too.

torch's `compute_local_shape_and_global_offset` is wrong where FSDP2 cuts unevenly what tensor parallelism has cut
unevenly before (pytorch#161368).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from pins_ext import ops

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


_PLAIN = (Tensor, nn.Parameter)
"""The types of nearly all tensors."""


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; torch.distributed.tensor is not imported for the question."""
    # To ask one for what it lacks takes ten times as long.
    if type(tensor) in _PLAIN:
        return False
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; a plain tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    # Not a decorator: entering no_grad takes longer than all the rest of a small plain tensor's step.
    with torch.no_grad():
        return tensor.to_local()


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each."""
    # Without a call for each plain one, of which there may be thousands in every step.
    return [x if type(x) in _PLAIN else local(x) for x in tensors]


def local_gradient(parameter: Tensor) -> Tensor | None:
    """The part of a parameter's gradient that belongs to this rank's part of the parameter."""
    grad = parameter.grad
    if grad is None or not is_dtensor(grad):
        return grad
    placements = cast("DTensor", parameter).placements
    with torch.no_grad():
        # Sums that are still to be made, of a replicated weight in a tensor-parallel layer.
        return local(grad if grad.placements == placements else grad.redistribute(placements=placements))


def like(parameter: Tensor, part: Tensor, coded: bool = False) -> Tensor:
    """This rank's part as the tensor of which all parts are one: a DTensor where the parameter is one.

    Args:
        parameter: cut like it.
        part: of the shape of the parameter's part, or of that in 8 bits.
        coded: whether it is in 8 bits.
    """
    if not is_dtensor(parameter):
        return part
    from torch.distributed.tensor import DTensor

    whole = torch.empty(ops.coded_shape(parameter.shape), device="meta") if coded else parameter
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        # Without them an uneven cut gets another shape.
        shape=whole.shape,
        stride=whole.stride(),
    )


def forget_gathered(model: nn.Module) -> None:
    """Let FSDP 2 gather the weights anew in the next forward pass, after weights were changed elsewhere than in a step.

    After a forward pass the outermost module keeps what it has gathered until a backward pass ends.
    """
    for module in model.modules():
        reshard: Any = getattr(module, "reshard", None)
        if reshard is not None and hasattr(module, "set_reshard_after_forward"):
            reshard()


def layout_of(parameters: Mapping[str, Tensor]) -> ops.Layout:
    """The places of this rank's parts among all weights, by the parameters' names.

    Raises:
        ValueError: see shard_of.
    """
    shards = [shard_of(name, p) for name, p in parameters.items()]
    return ops.Layout.of([local(p) for p in parameters.values()], shards)


def shard_of(name: str, tensor: Tensor) -> ops.Shard | None:
    """Where this rank's part of a tensor lies; None for a plain tensor, which is whole.

    Args:
        name: what to call the tensor in errors.
        tensor: a parameter.

    Raises:
        ValueError: parts that are sums (Partial), an order of cuts that is not known here, a local part of another
            size than the arithmetic says, or one that is offloaded.
    """
    if not is_dtensor(tensor):
        return None
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"{name} lies on a mesh that this rank is no part of: {mesh}")
    where = local(tensor).device.type
    if where not in (mesh.device_type, "meta"):
        raise ValueError(
            f"{name} lies on a {where} while its ranks talk on {mesh.device_type}: offloading (CPUOffloadPolicy, "
            f"cpu_offload) is not supported; leave it out"
        )
    start, size = box(name, tuple(tensor.shape), tuple(mesh.shape), coordinate, tensor.placements)
    there = tuple(local(tensor).shape)
    # An empty part may keep its other dimensions or not.
    if there != size and torch.Size(there).numel() + torch.Size(size).numel() > 0:
        raise ValueError(
            f"{name}: {tuple(tensor.shape)} cut as {tensor.placements} over {tuple(mesh.shape)} ranks should be {size} "
            f"here and is {there}"
        )
    return ops.Shard(tuple(tensor.shape), start)


def box(
    name: str, shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First index and size, per dimension, of the part at a coordinate of the mesh.

    Every cut is into equal parts rounded up, the last ones shorter or empty (torch.chunk). Cuts of one dimension follow
    each other from left to right of the mesh; _StridedShard says that its own comes after those on its right.

    Raises:
        ValueError: see shard_of.
    """
    start, size = [0] * len(shape), list(shape)
    for dim, place in _cuts(name, mesh, placements):
        part = -(-size[dim] // mesh[place])
        begin = min(coordinate[place] * part, size[dim])
        start[dim] += begin
        size[dim] = min(part, size[dim] - begin)
    return tuple(start), tuple(size)


def _cuts(name: str, mesh: Sequence[int], placements: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """The cuts in their order: which dimension of the tensor, by which of the mesh."""
    late: list[tuple[int, int]] = []
    done: dict[int, int] = {}
    for place, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if not hasattr(placement, "dim"):
            raise ValueError(f"{name} is placed as {placement}, whose parts are no parts of a weight: {placements}")
        if getattr(placement, "split_factor", 1) > 1:
            late.append((placement.dim, place))
        else:
            done[placement.dim] = done.get(placement.dim, 1) * mesh[place]
            yield placement.dim, place
    for dim, place in reversed(late):
        right = [q for q in range(place + 1, len(mesh)) if getattr(placements[q], "dim", None) == dim]
        expected = torch.Size([mesh[q] for q in right]).numel()
        if placements[place].split_factor != expected:
            raise ValueError(
                f"{name} is placed as {placements} over {tuple(mesh)} ranks: an order of cuts that isn't known"
            )
        yield dim, place


def check_codes(option: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError where a tensor's states can't be kept in 8 bits.

    Args:
        option: what asks for it.
        name: what to call the tensor.
        tensor: a parameter.
    """
    if local(tensor).device.type not in ("cpu", "cuda"):
        raise ValueError(f"{option} is there on the CPU and on CUDA, and {name} is on {tensor.device}: use bfloat16")
    shard = shard_of(name, tensor)
    if shard is not None:
        ops.check_cut(name, local(tensor).shape, shard)
