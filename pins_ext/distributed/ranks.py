"""The processes that hold the pruned tensors between them, and the collectives that pruning needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pins_ext.distributed.shards import is_dtensor


class Ranks:
    """One process, or those of the meshes that the tensors lie on.

    Of a tensor that several ranks hold, whole or the same part of it, one rank counts: the first along every dimension
    of its mesh that replicates it.

    Args:
        tensors: the pruned parameters, DTensors or plain; in the same order on every rank.

    Attributes:
        size: how many processes.
        alone: whether there is one: then nothing is ever sent.
        owned: places of the tensors whose part this rank counts.
        writes: whether this is the one rank that writes files.

    Raises:
        ValueError: DTensors on meshes that no single one of them covers.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        meshes = [t.device_mesh if is_dtensor(t) else None for t in tensors]
        covered = {frozenset(mesh.mesh.flatten().tolist()): mesh for mesh in meshes if mesh is not None}
        everyone = max(covered, key=len, default=frozenset())
        if not all(ranks <= everyone for ranks in covered):
            sets = " and ".join(str(sorted(ranks)) for ranks in covered)
            raise ValueError(f"pruned parameters lie on meshes of ranks {sets}, and none of them covers the others")
        self.size = max(1, len(everyone))
        self.alone = self.size == 1
        self._group = _group_of(everyone, covered[everyone]) if self.size > 1 else None
        self._device = torch.device(covered[everyone].device_type) if self.size > 1 else None
        first = min(everyone, default=0)
        self.writes = self.alone or dist.get_rank() == first
        self.owned = owned = tuple(i for i, t in enumerate(tensors) if self.size == 1 or _is_first(t, first))
        self._owned = frozenset(owned)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        # Process groups can't be copied, and a copy of the tensors lies on the same ranks.
        return self

    def counts(self, i: int) -> bool:
        """Whether this rank counts the tensor at this place."""
        return i in self._owned

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, the same on each.

        Args:
            values: of one shape and dtype on every rank; left as it is.
        """
        if self.alone:
            return values
        total = values.detach().to(self._device, copy=True)
        dist.all_reduce(total, group=self._group)
        return total.to(values.device)

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's values, stacked in a new first dimension.

        Args:
            values: of one shape and dtype on every rank.
        """
        if self.alone:
            return values[None]
        own = values.to(self._device).contiguous()
        everyone = own.new_empty((self.size, *own.shape))
        # torch 2.13 has renamed it, and warns of the old name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(everyone.flatten(0, 1) if own.dim() else everyone, own, group=self._group)
        return everyone.to(values.device)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; one synchronisation where there are several."""
        return flag if self.alone else bool(self.sum(torch.tensor(int(flag), device="cpu")))

    def write(self, action: Callable[[], None]) -> None:
        """Have the rank that writes act, while the others wait: they may read at once what it wrote.

        Raises:
            Exception: what the action raised, there.
            RuntimeError: that it raised anything, on the other ranks.
        """
        failed: Exception | None = None
        if self.writes:
            try:
                action()
            except Exception as error:
                failed = error
        if self.any(failed is not None):
            raise failed or RuntimeError("a file could not be written; the rank that writes says why")


def _is_first(tensor: Tensor, first: int) -> bool:
    """Whether this rank is the one that counts a tensor."""
    if not is_dtensor(tensor):
        return dist.get_rank() == first
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    replicated = (c for c, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate())
    return first in mesh.mesh and not any(replicated)


def _group_of(ranks: frozenset[int], mesh: Any) -> Any:
    """A process group of these ranks, an existing one where there is."""
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    return dist.new_group(sorted(ranks), use_local_synchronization=True)
