"""From scores to cutoffs: where in the order of (score, global index) each tensor's pruned weights end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.select import select
from pins_ext.pruning.importance import Counted, Operands
from pins_ext.pruning.scopes import Scopes


class Selection:
    """Chooses the weights to prune at a remaining ratio; exact, without concatenating or sorting scores.

    Args:
        scopes: which weights compete, and how many are pruned.
        layout: of this rank's parts of the pruned tensors.
        ranks: the processes that hold them.
    """

    def __init__(self, scopes: Scopes, layout: ops.Layout, ranks: Ranks) -> None:
        self.scopes, self.layout, self.ranks = scopes, layout, ranks
        self._regions = [layout.subset(self._owned(region)) for region in scopes.regions]
        regions = {i: r for r, region in enumerate(scopes.regions) for i in region}
        at = torch.tensor([regions[i] for i in range(len(regions))], dtype=torch.int64)
        self._region_of = ops.to_device(at, layout.places.device)
        # Bounds on densities also need each tensor alone.
        self._alone = [layout.subset([i]) for i in range(len(scopes.sizes))] if scopes.bounded else []

    def _owned(self, region: Sequence[int]) -> list[int]:
        """The tensors of a region that this rank counts."""
        return list(region) if self.ranks.alone else [i for i in region if self.ranks.counts(i)]

    def cutoffs(
        self, score: Operands, remaining_ratio: float, counted: Counted | None = None, before: Tensor | None = None
    ) -> Tensor:
        """Cutoff of each tensor, int64 [n, 2] or [1, 2] for all: (order key, tie index), see ops.select.

        Args:
            score: kind and operands of the score.
            remaining_ratio: share kept.
            counted: a counting pass already made over all weights (one region without bounds only).
            before: the last cutoffs, which the new ones are near.
        """
        scopes, wanted = self.scopes, self.scopes.n_prune(remaining_ratio)
        if scopes.is_global:
            return self._select(scopes.regions[0], self._regions[0], score, wanted[0], counted, before).reshape(1, 2)
        if not scopes.bounded:
            regions = zip(scopes.regions, self._regions, wanted, strict=True)
            near = [before[region[0], None] if before is not None else None for region in scopes.regions]
            found = [self._select(r, at, score, n, None, b) for (r, at, n), b in zip(regions, near, strict=True)]
            return torch.stack(found)[self._region_of]
        table = torch.zeros(len(scopes.sizes), 2, dtype=torch.int64, device=self.layout.places.device)
        for region, count in zip(scopes.regions, wanted, strict=True):
            self._fill_bounded(region, score, count, table)
        return table

    def _fill_bounded(self, region: Sequence[int], score: Operands, count: int, table: Tensor) -> None:
        """Each tensor keeps its own top `least`, then the best of the rest up to `most`, as one exact water level.

        Variable fixing on a monotone budget: where clamping every tensor's share at a common cutoff keeps too many
        weights, the level must rise, so tensors below their floor stay there; and the other way round. Tensors so
        settled leave the competition with their own cutoff, the others compete again.
        """
        scopes, free = self.scopes, list(region)
        least, most = scopes.least, scopes.most
        keep = scopes.size(region) - count
        keep = min(max(keep, sum(least[i] for i in free)), sum(most[i] for i in free))
        while free:
            cutoff = self._select(free, self.layout.subset(self._owned(free)), score, scopes.size(free) - keep)
            table[free] = cutoff
            kept = dict(zip(free, self._kept(free, score, cutoff), strict=True))
            low = [i for i in free if kept[i] < least[i]]
            high = [i for i in free if kept[i] > most[i]]
            missing = sum(least[i] - kept[i] for i in low)
            surplus = sum(kept[i] - most[i] for i in high)
            settled = (low if missing >= surplus else []) + (high if surplus >= missing else [])
            for i in settled:
                share = least[i] if kept[i] < least[i] else most[i]
                alone = self.layout.subset(self._owned([i]))
                table[i] = self._select([i], alone, score, scopes.sizes[i] - share)
                keep -= share
                free.remove(i)
            if missing == surplus:
                return

    def _select(
        self,
        region: Sequence[int],
        layout: ops.Layout,
        score: Operands,
        count: int,
        counted: Counted | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """The cutoff of a region; layout: of the tensors in it that this rank counts."""
        device, own = layout.places.device, self._owned(region)
        target = ops.to_device(torch.tensor(count), device)
        a, b = ([x[i] for i in own] if x else [] for x in (score.a, score.b))
        bracket, counts = counted or (None, None)
        factors = score.factors
        if factors is not None and len(own) < len(factors):
            factors = factors[ops.to_device(torch.tensor(list(own)), device)]
        if not self.ranks.alone:
            if bracket is None and before is not None:
                bracket = ops.bracket_around(before)
            total = self.scopes.size(region)
            exact = self.scopes.exact
            return select(self.ranks, a, b, layout, score.kind, target, total, exact, bracket, counts, factors)
        return torch.ops.pins_ext.select(
            a,
            b,
            layout.places,
            layout.chunks,
            score.kind,
            target,
            self.scopes.exact,
            factors=factors,
            bracket=bracket,
            counts=counts,
        )

    def _kept(self, region: Sequence[int], score: Operands, cutoff: Tensor) -> list[int]:
        """Weights of each tensor that the cutoff keeps; tensor by tensor, for one mask's worth of memory."""
        # A tensor that another rank counts has zeros here.
        kind, a, b, factors = score
        stats = torch.zeros(len(region), 3, dtype=torch.int64, device=cutoff.device)
        for row, i in zip(stats.split(1), region, strict=True):
            if not self.ranks.counts(i):
                continue
            layout, bits = self._alone[i], ops.new_mask(a[i])
            own = None if factors is None else factors[i : i + 1]
            operands = ([a[i]], [b[i]] if b else [], layout.places, layout.chunks, kind)
            torch.ops.pins_ext.pack_([bits], row, *operands, cutoff.reshape(1, 2), factors=own)
        return self.ranks.sum(stats[:, 0]).tolist()
