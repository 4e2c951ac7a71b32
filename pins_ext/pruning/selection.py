"""From scores to cutoffs: where in the order of (score, global index) each tensor's pruned weights end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.select import select
from pins_ext.pruning.scopes import Scopes
from pins_ext.pruning.scores import Counted, Operands
from pins_ext.pruning.units import ScoredUnits


class Selection:
    """Chooses the weights to prune at a remaining ratio; exact, without concatenating or sorting scores.

    Args:
        scopes: which weights compete, and how many are pruned.
        layout: of this rank's parts of the pruned tensors.
        ranks: the processes that hold them.
        units: places of the units of tensors with a pattern, see `Units.layout`; None where none has one.

    Attributes:
        held: of each part, how many weights are pruned already whose score is NaN, above all others; they count among
            those to prune, and the caller takes them out of its masks.
    """

    def __init__(self, scopes: Scopes, layout: ops.Layout, ranks: Ranks, units: ops.Layout | None = None) -> None:
        self.scopes, self.layout, self.ranks = scopes, layout, ranks
        self._pointers, self._kept = ops.PointerTables(), ops.KeptLists()
        self.held = [0] * len(scopes.parts)
        self._whole, self._owned = layout, list(ranks.owned)
        if scopes.is_global:
            self._whole = layout.subset(self._owned)
            return
        self._fields = [
            Field(scopes, parts, (units or layout) if blocked else layout, ranks)
            for (_, blocked), parts in _read_alike(scopes).items()
        ]

    def cutoffs(
        self,
        score: Operands,
        remaining_ratio: float,
        counted: Counted | None = None,
        before: Tensor | None = None,
        units: ScoredUnits | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Cutoff of each tensor, int64 [n, 2] or [1, 2] for all: (order key, tie index), see ops.select.

        Of a tensor that has a pattern it is that of its units.

        Args:
            score: kind and operands of the score.
            remaining_ratio: share kept.
            counted: a counting pass already made over all weights (one region without bounds only).
            before: the last cutoffs, which the new ones are near.
            units: the scores of what competes in tensors that have a pattern; None where none has one.
            target: int64 [1], on the device, how many weights of all are pruned, where all compete together; None: as
                the ratio says.
        """
        wanted = [n - held for n, held in zip(self.scopes.units_to_prune(remaining_ratio), self.held, strict=True)]
        if self.scopes.is_global:
            if target is None:
                target = ops.to_device(torch.tensor(wanted[0], device="cpu"), self.layout.places.device)
            else:
                target = target - self.held[0]
            return self._select(score, target, counted, before).reshape(1, 2)
        found = [field.cutoffs(score, wanted, before, units) for field in self._fields]
        if len(found) == 1:
            return found[0]
        table = torch.zeros(len(self.scopes.sizes), 2, dtype=torch.int64, device=self.layout.places.device)
        for field, cutoffs in zip(self._fields, found, strict=True):
            table.index_copy_(0, field.members, cutoffs)
        return table

    @property
    def one_cutoff(self) -> bool:
        """Whether one process prunes all tensors under one cutoff, so that an optimizer's pass can choose the masks."""
        return self.ranks.alone and self.scopes.is_global and self.scopes.exact

    @property
    def packs(self) -> bool:
        """Whether the masks can be written while the cutoff is found: on the CPU, where there is one."""
        return self.layout.places.is_cpu and self.one_cutoff

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
        wanted, (bracket, counts) = self.scopes.n_prune(remaining_ratio)[0] - self.held[0], counted or (None, None)
        (packed,), (a, b) = self._kept.of("masks", masks), self._kept.of("scores", score.a, score.b)
        return ops.pack_lowest_(
            packed,
            stats,
            a,
            b,
            self.layout.places,
            self.layout.chunks,
            score.kind,
            torch.tensor(wanted, device="cpu"),
            factors=score.factors,
            bracket=bracket,
            counts=counts,
        )

    def around(self, score: Operands, remaining_ratio: float, counted: Counted | None) -> Tensor | None:
        """A bracket of few weights around the cutoff, which a pass can settle while it writes; only where `packs`.

        Args:
            score, remaining_ratio, counted: see `cutoffs`.

        Returns:
            int64 [5]; None where it takes `pack`.
        """
        wanted, (bracket, counts) = self.scopes.n_prune(remaining_ratio)[0], counted or (None, None)
        (a, b), tables = self._kept.of("scores", score.a, score.b), (self.layout.places, self.layout.chunks)
        return ops.bin_of(a, b, *tables, score.kind, torch.tensor(wanted, device="cpu"), bracket=bracket, counts=counts)

    def bin_or_cutoff(
        self, score: Operands, remaining_ratio: float, counted: Counted | None, known: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """What an optimizer's pass prunes by, see ops.bin_or_cutoff; on a GPU, only where there is `one_cutoff`.

        Args:
            score, remaining_ratio, counted: see `cutoffs`.
            known: bool [1], whether the score tells weights apart.

        Returns:
            int64 [5] and [1, 2]; None where nothing or everything is pruned.
        """
        wanted, total = self.scopes.n_prune(remaining_ratio)[0], sum(self.scopes.sizes)
        if not 0 < wanted < total:
            return None
        (kind, a, b), layout, (bracket, counts) = score[:3], self.layout, counted or (None, None)
        target = ops.to_device(torch.tensor(wanted, device="cpu"), layout.places.device)
        pointers = self._pointers.of("select", layout.places, a, b)
        tables = (layout.places, layout.chunks)
        return ops.bin_or_cutoff(
            a, b, *tables, kind, target, known, total, bracket=bracket, counts=counts, pointers=pointers
        )

    def _select(self, score: Operands, target: Tensor, counted: Counted | None, before: Tensor | None) -> Tensor:
        """The cutoff below which `target` of all weights go; see `cutoffs`."""
        layout = self._whole
        a, b, factors = _of(score, self._owned)
        bracket, counts = counted or (None, None)
        if not self.ranks.alone:
            if bracket is None and before is not None:
                bracket = ops.bracket_around(before)
            total, exact = sum(self.scopes.sizes), self.scopes.exact
            return select(self.ranks, a, b, layout, score.kind, target, total, exact, bracket, counts, factors)
        return torch.ops.pins_ext.select(
            *self._kept.of("scores", a, b),
            layout.places,
            layout.chunks,
            score.kind,
            target,
            self.scopes.exact,
            factors=factors,
            bracket=bracket,
            counts=counts,
            pointers=self._pointers.of("select", layout.places, a, b),
            total=sum(self.scopes.sizes),
        )


def _read_alike(scopes: Scopes) -> dict[tuple[bool, bool], list[int]]:
    """Places of the parts that compete in one search: weights, groups N:M and blocks are read in different ways."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for place, part in enumerate(scopes.parts):
        kinds.setdefault((part.patterned, part.unit > 1), []).append(place)
    return kinds


def search_bytes(scopes: Scopes, together: bool) -> int:
    """Bytes that the search for several cutoffs asks for at most; where all weights have one, none.

    Args:
        scopes: which weights compete.
        together: whether several ranks hold the tensors.
    """
    if scopes.is_global:
        return 0
    parts = scopes.parts
    members = [[len(parts[place].members) for place in places] for places in _read_alike(scopes).values()]
    return max(
        ops.search_bytes(sum(each) if scopes.bounded else len(each), len(each), scopes.bounded, together)
        for each in members
    )


class Field:
    """The parts whose units are read alike, and what finds their cutoffs together.

    Args:
        scopes: all parts.
        parts: places of these in the list of the parts.
        layout: of the units of all tensors.
        ranks: the processes that hold the tensors.

    Attributes:
        members: int64 [m], places of the tensors.
    """

    def __init__(self, scopes: Scopes, parts: Sequence[int], layout: ops.Layout, ranks: Ranks) -> None:
        self._scopes, self._ranks, self._places = scopes, ranks, list(parts)
        self._parts = [scopes.parts[place] for place in parts]
        device = layout.places.device
        owner = {i: r for r, part in enumerate(self._parts) for i in part.members}
        self._tensors = sorted(owner)
        self.members = ops.to_device(torch.tensor(self._tensors, device="cpu"), device)
        self._owner = ops.to_device(torch.tensor([owner[i] for i in self._tensors], device="cpu"), device)
        self._first = ops.to_device(torch.tensor([part.members[0] for part in self._parts], device="cpu"), device)
        # Of several ranks each reads what it counts.
        self._owned = [i for i in self._tensors if ranks.counts(i)]
        self._layout = layout.subset(self._owned)
        self._pointers = ops.PointerTables()
        spans = {i: layout.span(i) for i in self._tensors}
        ends = [[spans[i] for i in part.members] for part in self._parts]
        of_parts = [(min(first for first, _ in each), max(last for _, last in each)) for each in ends]
        self._regions = ops.Regions.of(of_parts, [sum(part.units.values()) for part in self._parts], device)
        self._bounds = self._bounds_of(spans, device) if scopes.bounded else None
        row = {i: place for place, i in enumerate(self._tensors)} if scopes.bounded else owner
        self._rows = ops.to_device(torch.tensor([row[i] for i in self._owned], dtype=torch.int64, device="cpu"), device)
        self._levels: Tensor | None = None
        self._all_but_best = ops.to_device(torch.tensor([[ops.MAX_KEY, 0]] * len(self._tensors), device="cpu"), device)

    def _bounds_of(self, spans: Mapping[int, tuple[int, int]], device: torch.device) -> ops.Bounds:
        """How many units of each tensor are pruned at least and at most; what is fixed lies above all cutoffs."""
        limits = {
            i: (part.units[i] - part.fixed[i] - part.most[i], part.units[i] - part.fixed[i] - part.least[i])
            for part in self._parts
            for i in part.members
        }
        sums = [
            (sum(limits[i][0] for i in part.members), sum(limits[i][1] for i in part.members)) for part in self._parts
        ]
        units = {i: n for part in self._parts for i, n in part.units.items()}
        each = ops.Regions.of([spans[i] for i in self._tensors], [units[i] for i in self._tensors], device)
        low, high = ops.to_device(
            torch.tensor([limits[i] for i in self._tensors], device="cpu").t().contiguous(), device
        )
        return ops.Bounds(self._owner, low, high, tuple(sums), self._regions, each)

    def cutoffs(
        self, score: Operands, wanted: Sequence[int], before: Tensor | None, units: ScoredUnits | None
    ) -> Tensor:
        """Cutoff of each of these tensors, int64 [m, 2].

        Args:
            score: see Selection.cutoffs.
            wanted: units to prune of each part of all.
            before: see Selection.cutoffs.
            units: see Selection.cutoffs.
        """
        counts = [wanted[place] for place in self._places]
        # No competition where of every group all but the best, which are NaN, go.
        settled = all(part.grouped and count == part.free for part, count in zip(self._parts, counts, strict=True))
        if settled:
            return self._all_but_best
        operands = self._operands(score, units)
        search = ops.Search(self._counting(operands), self._scopes.exact, together=not self._ranks.alone)
        if self._bounds is None:
            near = None if before is None else before.expand(len(self._scopes.sizes), 2)[self._first]
            return search.cutoffs(self._regions, counts, near)[self._owner]
        near = None if before is None else before.expand(len(self._scopes.sizes), 2)[self.members]
        pair = None if near is None or self._levels is None else (near, self._levels)
        table, self._levels = search.bounded(self._bounds, counts, pair)
        return table

    def _operands(self, score: Operands, units: ScoredUnits | None) -> Operands:
        """What the units of these tensors compete by; other tensors are left out."""
        if not self._parts[0].patterned:
            return score
        assert units is not None
        nothing = torch.empty(0, device=self._rows.device)
        own = dict(zip(self._owned, units.hold(self._owned), strict=True))
        return Operands("identity", [own.get(i, nothing) for i in range(len(self._scopes.sizes))], [])

    def _counting(self, score: Operands) -> ops.Count:
        """The counting pass over these operands, of all ranks."""
        layout, (a, b, factors) = self._layout, _of(score, self._owned)
        # Scores of units are made anew each time: no table of addresses to keep.
        pointers = None if self._parts[0].patterned else self._pointers.of("count", layout.places, a, b)

        def count(counts: Tensor, brackets: Tensor) -> Tensor:
            torch.ops.pins_ext.count_regions_(
                counts,
                a,
                b,
                layout.places,
                layout.chunks,
                score.kind,
                self._rows,
                brackets,
                factors=factors,
                pointers=pointers,
            )
            return self._ranks.sum(counts)

        return count


def _of(score: Operands, places: Sequence[int]) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Operands and factors of some of the tensors."""
    a, b = ([x[i] for i in places] if x else [] for x in (score.a, score.b))
    factors = score.factors
    if factors is not None and len(places) < len(factors):
        factors = factors[ops.to_device(torch.tensor(list(places), dtype=torch.int64, device="cpu"), factors.device)]
    return a, b, factors
