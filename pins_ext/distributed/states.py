"""States of all ranks as one process has them, and this rank's part of such states: a checkpoint knows no ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import is_dtensor, like, local, shard_of

_MASKS = ("mask", "fixed")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def whole(
    states: Mapping[str, Tensor], names: Sequence[str], parameters: Sequence[Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    """Put together what every rank has of each state; every rank calls it and gets all of it.

    Args:
        states: by kind/parameter, of this rank's parts; masks as bits, anything else of the part's shape.
        names: of the pruned parameters.
        parameters: the pruned parameters.
        ranks: the processes that hold them.
    """
    if ranks.alone:
        return dict(states)
    places = {name: i for i, name in enumerate(names)}
    found = dict(states)
    for key, state in states.items():
        kind, _, name = key.partition("/")
        if name in places and is_dtensor(parameters[places[name]]):
            found[key] = _whole(kind, state, places[name], name, parameters[places[name]], ranks)
    return found


def _whole(kind: str, state: Tensor, i: int, name: str, parameter: Tensor, ranks: Ranks) -> Tensor:
    shape = tuple(local(parameter).shape)
    part = ops.unpack_bits(state, shape).to(torch.uint8) if kind in _MASKS else state
    # Bits are summed with zeros as integers: a float's -0 would come back as +0.
    coded = _is_coded(kind, state)
    sizes = ops.coded_shape(parameter.shape) if coded else parameter.shape
    sent = torch.int64 if part.element_size() == 8 else torch.int32
    full = torch.zeros(sizes, dtype=sent, device=part.device)
    if ranks.counts(i):
        full[_box(name, parameter, coded)] = part.contiguous().view(_BITS[part.element_size()]).to(sent)
    bits = ranks.sum(full).to(_BITS[part.element_size()])
    return ops.pack_bits(bits.bool()) if kind in _MASKS else bits.view(part.dtype)


def parts(states: Mapping[str, Tensor], names: Sequence[str], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """This rank's parts of whole states; one of another shape than its parameter is left as it is."""
    by_name = dict(zip(names, parameters, strict=True))
    found = dict(states)
    for key, state in states.items():
        kind, _, name = key.partition("/")
        p = by_name.get(name)
        if p is None or not is_dtensor(p):
            continue
        if kind in _MASKS and len(state) == ops.mask_bytes(p.numel()):
            found[key] = ops.pack_bits(ops.unpack_bits(state, p.shape)[_box(name, p)])
        elif state.shape == p.shape:
            found[key] = state[_box(name, p)]
        elif ops.is_coded(state, p.shape):
            found[key] = state[_box(name, p, coded=True)]
    return found


def spread(
    states: Mapping[str, Tensor], names: Sequence[str], parameters: Sequence[Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    """States cut like their parameters, for torch.distributed.checkpoint: DTensors where those are, no copies.

    Args:
        states: see `whole`; masks become one byte a weight, for a cut falls between any two.
        names: of the pruned parameters.
        parameters: the pruned parameters.
        ranks: the processes that hold them.

    Raises:
        ValueError: on every rank, where torch would take a part for another one.
    """
    shapes = {name: tuple(p.shape) for name, p in zip(names, parameters, strict=True)}
    wrong = [name for name, p in zip(names, parameters, strict=True) if not _agrees(name, p)]
    if ranks.any(bool(wrong)):
        which = f"{wrong[0]} {shapes[wrong[0]]} here" if wrong else "a parameter on another rank"
        raise ValueError(
            f"torch.distributed.checkpoint takes parts for others where both FSDP2 and tensor parallelism cut unevenly "
            f"(pytorch#161368), the model's own too: {which}. Choose sizes that the ranks divide, or save whole "
            f"states: Pruner.save, get_model_state_dict with full_state_dict=True"
        )
    by_name = dict(zip(names, parameters, strict=True))
    found = dict(states)
    for key, state in states.items():
        kind, _, name = key.partition("/")
        if name in by_name:
            p = by_name[name]
            part = ops.unpack_bits(state, local(p).shape).to(torch.uint8) if kind in _MASKS else state
            found[key] = like(p, part, _is_coded(kind, state))
    return found


def collected(states: Mapping[str, Tensor], names: Sequence[str], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """This rank's parts of what `spread` made."""
    known, found = set(names), {}
    for key, state in states.items():
        kind, _, name = key.partition("/")
        part = local(state)
        found[key] = ops.pack_bits(part.bool()) if kind in _MASKS and name in known else part
    return found


def _agrees(name: str, parameter: Tensor) -> bool:
    """Whether torch finds this rank's part where it is."""
    if not is_dtensor(parameter) or not local(parameter).numel():
        return True
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shard = shard_of(name, parameter)
    assert shard is not None
    try:
        shape, start = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    except (AssertionError, RuntimeError, ValueError, IndexError):
        return False
    return (tuple(shape), tuple(start)) == (tuple(local(parameter).shape), shard.start)


def _is_coded(kind: str, state: Tensor) -> bool:
    """Whether a state is in 8 bits; masks are bytes, too."""
    return kind not in _MASKS and state.dtype in ops.CODED


def _box(name: str, parameter: Tensor, coded: bool = False) -> tuple[slice, ...]:
    """Where this rank's part lies, of the weights or of their groups in 8 bits."""
    shard = shard_of(name, parameter)
    assert shard is not None
    if coded:
        return ops.coded_box(local(parameter).shape, shard)
    return tuple(slice(s, s + n) for s, n in zip(shard.start, local(parameter).shape, strict=True))
