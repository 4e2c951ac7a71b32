"""From scores to cutoffs: where in the order of (score, global index) each tensor's pruned weights end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.select import select
from pins_ext.ops.bracket import MAX_INDEX, MAX_KEY
from pins_ext.pruning.importance import Counted, Operands
from pins_ext.pruning.patterns import Units
from pins_ext.pruning.scopes import Part, Scopes


class Selection:
    """Chooses the weights to prune at a remaining ratio; exact, without concatenating or sorting scores.

    Args:
        scopes: which weights compete, and how many are pruned.
        layout: of this rank's parts of the pruned tensors.
        ranks: the processes that hold them.
        units: places of the units of tensors with a pattern, see `patterns.unit_layout`; None where none has one.
    """

    def __init__(self, scopes: Scopes, layout: ops.Layout, ranks: Ranks, units: ops.Layout | None = None) -> None:
        self.scopes, self.layout, self.ranks = scopes, layout, ranks
        self.units = layout if units is None else units
        self._parts = [self._layout_of(part).subset(self._owned(part.members)) for part in scopes.parts]
        parts = {i: r for r, part in enumerate(scopes.parts) for i in part.members}
        at = torch.tensor([parts[i] for i in range(len(parts))], dtype=torch.int64)
        self._part_of = ops.to_device(at, layout.places.device)
        self._all = ops.to_device(torch.tensor([MAX_KEY, MAX_INDEX]), layout.places.device)
        self._pointers = ops.PointerTables()
        # Bounds on densities also need each tensor alone.
        self._alone: dict[int, ops.Layout] = {}
        if scopes.bounded:
            self._alone = {i: self._layout_of(part).subset([i]) for part in scopes.parts for i in part.members}

    def _layout_of(self, part: Part) -> ops.Layout:
        return self.units if part.unit > 1 else self.layout

    def _owned(self, members: Sequence[int]) -> list[int]:
        """Those of the tensors that this rank counts."""
        return list(members) if self.ranks.alone else [i for i in members if self.ranks.counts(i)]

    def cutoffs(
        self,
        score: Operands,
        remaining_ratio: float,
        counted: Counted | None = None,
        before: Tensor | None = None,
        units: Units | None = None,
    ) -> Tensor:
        """Cutoff of each tensor, int64 [n, 2] or [1, 2] for all: (order key, tie index), see ops.select.

        Of a tensor that has a pattern it is that of its units.

        Args:
            score: kind and operands of the score.
            remaining_ratio: share kept.
            counted: a counting pass already made over all weights (one region without bounds only).
            before: the last cutoffs, which the new ones are near.
            units: the scores of what competes in tensors that have a pattern; None where none has one.
        """
        scopes, wanted = self.scopes, self.scopes.units_to_prune(remaining_ratio)
        if scopes.is_global:
            return self._select(scopes.parts[0], self._parts[0], score, wanted[0], counted, before).reshape(1, 2)
        table = torch.zeros(len(scopes.sizes), 2, dtype=torch.int64, device=self.layout.places.device)
        found = []
        for part, layout, count in zip(scopes.parts, self._parts, wanted, strict=True):
            settled = part.grouped and count == part.free
            operands = score if settled else self._operands(part, score, units)
            if scopes.bounded and not settled:
                self._fill_bounded(part, operands, count, table)
                continue
            if settled:
                # No competition: of every group all but the best go.
                cutoff = self._all
            else:
                near = before[part.members[0], None] if before is not None and not part.grouped else None
                cutoff = self._select(part, layout, operands, count, None, near)
            found.append(cutoff)
            if scopes.bounded:
                table[list(part.members)] = cutoff
        return table if scopes.bounded else torch.stack(found)[self._part_of]

    @property
    def packs(self) -> bool:
        """Whether the masks can be written while the cutoff is found: on the CPU, of one process, under one cutoff."""
        return self.layout.places.is_cpu and self.ranks.alone and self.scopes.is_global and self.scopes.exact

    def pack(
        self, masks: list[Tensor], stats: Tensor, score: Operands, remaining_ratio: float, counted: Counted | None
    ) -> Tensor:
        """Write the masks and their statistics in the pass that finds the cutoff; only where `packs`.

        Args:
            masks, stats: see ops.pack_; written.
            score, remaining_ratio, counted: see `cutoffs`.

        Returns:
            The cutoff, int64 [1, 2].
        """
        wanted, (bracket, counts) = self.scopes.n_prune(remaining_ratio)[0], counted or (None, None)
        return ops.pack_lowest_(
            masks,
            stats,
            score.a,
            score.b,
            self.layout.places,
            self.layout.chunks,
            score.kind,
            torch.tensor(wanted),
            factors=score.factors,
            bracket=bracket,
            counts=counts,
        )

    def _operands(self, part: Part, score: Operands, units: Units | None) -> Operands:
        """What the units of a part compete by; tensors of other parts are left out."""
        if not part.patterned:
            return score
        assert units is not None
        nothing = torch.empty(0, device=self.layout.places.device)
        own = {i: units.of(i, hold=True) for i in part.members}
        return Operands("identity", [own.get(i, nothing) for i in range(len(self.scopes.sizes))], [])

    def _fill_bounded(self, part: Part, score: Operands, count: int, table: Tensor) -> None:
        """Each tensor keeps its own top `least`, then the best of the rest up to `most`, as one exact water level.

        Variable fixing on a monotone budget: where clamping every tensor's share at a common cutoff keeps too many
        weights, the level must rise, so tensors below their floor stay there; and the other way round. Tensors so
        settled leave the competition with their own cutoff, the others compete again.
        """
        free, least, most = list(part.members), part.least, part.most
        loose = {i: part.units[i] - part.fixed[i] for i in free}
        keep = part.free - count
        keep = min(max(keep, sum(least[i] for i in free)), sum(most[i] for i in free))
        whole = self._layout_of(part)
        while free:
            among = replace(part, members=tuple(free))
            cutoff = self._select(among, whole.subset(self._owned(free)), score, among.free - keep)
            table[free] = cutoff
            kept = dict(zip(free, self._kept(free, score, cutoff), strict=True))
            low = [i for i in free if kept[i] < least[i]]
            high = [i for i in free if kept[i] > most[i]]
            missing = sum(least[i] - kept[i] for i in low)
            surplus = sum(kept[i] - most[i] for i in high)
            settled = (low if missing >= surplus else []) + (high if surplus >= missing else [])
            for i in settled:
                share = least[i] if kept[i] < least[i] else most[i]
                alone = replace(part, members=(i,))
                table[i] = self._select(alone, whole.subset(self._owned([i])), score, loose[i] - share)
                keep -= share
                free.remove(i)
            if missing == surplus:
                return

    def _select(
        self,
        part: Part,
        layout: ops.Layout,
        score: Operands,
        count: int,
        counted: Counted | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """The cutoff of a part below which `count` units go.

        Args:
            part: what competes.
            layout: of the tensors in it that this rank counts.
            score: operands, of all tensors.
            count: how many.
            counted: see `cutoffs`.
            before: see `cutoffs`.
        """
        device, own = layout.places.device, self._owned(part.members)
        # What is never pruned lies below everything else.
        count += sum(part.fixed[i] for i in part.members)
        target = ops.to_device(torch.tensor(count), device)
        a, b = ([x[i] for i in own] if x else [] for x in (score.a, score.b))
        bracket, counts = counted or (None, None)
        factors = score.factors
        if factors is not None and len(own) < len(factors):
            factors = factors[ops.to_device(torch.tensor(list(own)), device)]
        if not self.ranks.alone:
            if bracket is None and before is not None:
                bracket = ops.bracket_around(before)
            total = sum(part.units[i] for i in part.members)
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
            # Bounds on densities ask for ever other tensors together.
            pointers=None if self.scopes.bounded else self._pointers.of(part.members[0], layout.places, a, b),
        )

    def _kept(self, members: Sequence[int], score: Operands, cutoff: Tensor) -> list[int]:
        """Units of each tensor that the cutoff keeps; tensor by tensor, for one mask's worth of memory."""
        # A tensor that another rank counts has zeros here.
        kind, a, b, factors = score[:4]
        stats = torch.zeros(len(members), 3, dtype=torch.int64, device=cutoff.device)
        for row, i in zip(stats.split(1), members, strict=True):
            if not self.ranks.counts(i):
                continue
            layout = self._alone[i]
            bits = torch.zeros(ops.mask_bytes(layout.numel(0)), dtype=torch.uint8, device=cutoff.device)
            own = None if factors is None else factors[i : i + 1]
            operands = ([a[i]], [b[i]] if b else [], layout.places, layout.chunks, kind)
            torch.ops.pins_ext.pack_([bits], row, *operands, cutoff.reshape(1, 2), factors=own)
        return self.ranks.sum(stats[:, 0]).tolist()
