"""The masks of the pruned tensors: bits, the cutoff that chose them, and when a new choice is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import local
from pins_ext.patterns import Fit
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.scopes import Scopes
from pins_ext.pruning.scores import Counted, Operands
from pins_ext.pruning.selection import Selection
from pins_ext.pruning.units import ScoredUnits, Units

ZERO = 0x80000001
"""Order key of the smallest positive float32: below it lies only zero."""


@dataclass(frozen=True)
class Coming:
    """A choice that is made in an optimizer's pass.

    Attributes:
        around: int64 [5], a bracket around the cutoff; the pass orders the weights inside. Its rank is negative where
            the cutoff is known.
        cutoff: int64 [1, 2], which the pass writes where it is not.
        ratio: share of the weights that is kept.
        t: pruner step.
        chosen_for: see Masks.
    """

    around: Tensor
    cutoff: Tensor
    ratio: float
    t: int
    chosen_for: tuple[int, ...]


class Masks:
    """One bit a weight (1 = keep), and what chose it.

    Args:
        parameters: the pruned tensors, DTensors or plain.
        layout: of this rank's parts.
        scopes: which weights compete.
        config: mask policy, ties.
        ranks: the processes that hold the tensors.
        capturable: write a new cutoff over the last one, where the steps of a CUDA graph read it.

    Attributes:
        sizes: weights of this rank's part of each tensor.
        bits: per tensor, of this rank's part, uint8 [ops.mask_bytes].
        cutoff: int64 [n, 2], or [1, 2] for all tensors: (order key, tie index); weights before it, in the order of
            (score, global index), are pruned.
        fixed: bits of the same form: what they prune is pruned by every mask and zero after every step, from the start
            on; None where nothing is fixed.
        fits: the pattern of each tensor, None where it has none.
        frozen: whether the masks never change again.
        applied: whether pruned weights are zero at this moment, and stay so.
        in_view: whether they are zero only as long as a view is open, see `view.masked`.
        coming: what the optimizer's pass of the step under way chooses; None: bits and cutoff are final.
        weights_layout: of the parts, where the weights are: what `apply` is called with.
        packed: `bits`, or where selections write them if that is another device.
        packed_fixed: `fixed` likewise.
        stats: int64 [n, 3], of each tensor and the last selection: kept weights, flipped bits, NaN scores.
        chosen_for: what the last selection was made for, another one for every new selection; None before the first.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        layout: ops.Layout,
        scopes: Scopes,
        config: PruneConfig,
        ranks: Ranks,
        capturable: bool = False,
    ) -> None:
        self.layout, self.scopes, self.config, self.ranks = layout, scopes, config, ranks
        self.weights_layout = layout
        self.fits = list(scopes.fits)
        patterned = any(scopes.fits)
        self._units = Units(parameters, scopes.names, scopes.fits, layout) if patterned else None
        self.selection = Selection(scopes, layout, ranks, None if self._units is None else self._units.layout)
        device = layout.places.device
        self.sizes = [local(p).numel() for p in parameters]
        self.bits = self.packed = [ops.new_mask(local(p)) for p in parameters]
        self._pointers, self._kept = ops.PointerTables(), ops.KeptLists()
        self.cutoff = torch.zeros(1, 2, dtype=torch.int64, device=device)
        self.fixed: list[Tensor] | None = None
        self.packed_fixed: list[Tensor] | None = None
        self.frozen = False
        self.applied = False
        self.in_view = False
        self._in_place = capturable
        self.chosen_for: tuple[int, ...] | None = None
        self.coming: Coming | None = None
        self.stats = torch.zeros(len(self.bits), 3, dtype=torch.int64, device=device)
        self._counts: Tensor | None = None
        self._marked_by_nan = config.dtype in ops.CODED and config.smoothed
        self._held: Tensor | None = None

    @property
    def chosen(self) -> bool:
        """Whether there has been a selection."""
        return self.chosen_for is not None

    def refuse_in_view(self, what: str = "an optimizer steps") -> None:
        """Raise RuntimeError where something would change the weights, or the masks, by which a view puts them back."""
        if self.in_view:
            raise RuntimeError(f"{what} inside masked_view, which puts the weights back afterwards: leave it")

    def wanted(self, mask_due: bool) -> bool:
        """Whether a step, at which the schedule asks for a mask or not, ends with pruned weights at zero."""
        return mask_due or self.frozen or (self.config.mask_policy == "strict" and self.chosen)

    def renew(
        self,
        importance: Importance,
        ratio: float,
        t: int,
        counted: Counted | None = None,
        in_pass: bool = False,
        target: Tensor | None = None,
    ) -> None:
        """Choose anew, unless neither the scores nor the number to prune changed since the last time.

        Args:
            importance: what scores the weights.
            ratio: share of the weights that is kept.
            t: pruner step.
            counted: see Selection.cutoffs.
            in_pass: leave it to the optimizer's pass where that can do it, see `coming`.
            target: see Selection.cutoffs.
        """
        wanted = self.choice(importance, ratio, t)
        if wanted == self.chosen_for:
            return
        score = importance.score()
        if self.selection.packs and bool(importance.known):
            if in_pass and self.fixed is None:
                around = self.selection.around(score, ratio, counted)
                if around is not None:
                    self.coming = Coming(around, torch.empty_like(self.cutoff), ratio, t, wanted)
                    return
            self._before_packing()
            self.cutoff = self.selection.pack(self.packed, self.stats, score, ratio, counted)
            self._packed()
            self.chosen_for = wanted
            return
        if in_pass and self.fixed is None and not self.selection.packs:
            found = self.selection.bin_or_cutoff(score, ratio, counted, importance.known)
            if found is not None:
                self.coming = Coming(*found, ratio, t, wanted)
                return
        units = self._units.scored(score) if self._units is not None else None
        before = self.cutoff if self.chosen else None
        cutoff = self.selection.cutoffs(score, ratio, counted, before, units, target)
        if self.scopes.exact:
            # Before any score is known an exact count could only be met by position; the lowest cutoff prunes nothing.
            # The released rule, strictly below zero, prunes nothing by itself.
            cutoff = cutoff * importance.known
        self._pack(score, cutoff, units)
        self.chosen_for = wanted

    def choice(self, importance: Importance, ratio: float, t: int) -> tuple[int, ...]:
        """What a selection at this step would be made for; an equal one need not be made again."""
        window = t // self.config.delta_t if importance.constant_in_window else t
        return (window, *self.scopes.n_prune(ratio))

    def came(self) -> None:
        """The optimizer's pass has made the choice."""
        assert self.coming is not None
        self.cutoff, self.chosen_for, self.coming = self.coming.cutoff, self.coming.chosen_for, None

    def settle(self, importance: Importance) -> None:
        """Make a choice that no pass will make."""
        if self.coming is not None:
            coming, self.coming = self.coming, None
            self.renew(importance, coming.ratio, coming.t)

    def chosen_at(self, ratio: float) -> bool:
        """Whether the last selection pruned as many weights as this ratio asks for."""
        return self.chosen_for is not None and self.chosen_for[1:] == tuple(self.scopes.n_prune(ratio))

    def choose(self, score: Operands, ratio: float) -> None:
        """Choose by these scores, once.

        Args:
            score: what the score is made of.
            ratio: share of the weights that is kept.
        """
        units = self._units.scored(score) if self._units is not None else None
        self._pack(score, self.selection.cutoffs(score, ratio, units=units), units)
        self.chosen_for = (0, *self.scopes.n_prune(ratio))

    def counting(self) -> Counted | None:
        """A bracket around the last cutoff and room for its counts; None where no single cutoff can be narrowed so."""
        near = self.cutoff if self.coming is None else self.coming.around[:2]
        if not self.scopes.is_global or not (self.chosen or self.coming):
            return None
        if self._counts is None:
            self._counts = torch.zeros(1 + ops.BINS, dtype=torch.int64, device=self.layout.places.device)
        return ops.bracket_around(near), self._counts

    def keep_nonzero(self, parameters: Sequence[Tensor]) -> list[int]:
        """Keep what is not zero. Returns the number of zeros per tensor; one synchronisation."""
        cutoff = ops.to_device(torch.tensor([[ZERO, 0]], device="cpu"), self.layout.places.device)
        self._pack(Operands("magnitude", [local(p) for p in parameters], []), cutoff)
        return self.pruned()

    def fix(self) -> None:
        """Keep what is pruned now pruned in every later mask."""
        if self.fixed is None:
            self.fixed = [bits.clone() for bits in self.bits]
        else:
            torch._foreach_copy_(self.fixed, self.bits)
        if self.packed is self.bits:
            self.packed_fixed = self.fixed
        self._count_held()

    def _count_held(self) -> None:
        """8-bit averages mark what stays pruned by NaN, which the selection leaves out. One synchronisation."""
        if self.packed_fixed is None or not self._marked_by_nan:
            return
        pruned = self.pruned(self.packed_fixed)
        self.selection.held = [sum(pruned[i] for i in part.members) for part in self.scopes.parts]
        here = ops.to_device(torch.tensor(self.sizes, device="cpu"), self.stats.device)
        self._held = (here - torch.stack([ops.set_bits(bits) for bits in self.packed_fixed]))[:, None]

    def forget_choice(self) -> None:
        """Let the next `renew` select whatever was selected before."""
        self.chosen_for = None

    def _pack(self, score: Operands, cutoff: Tensor, units: ScoredUnits | None = None) -> None:
        self._before_packing()
        if self._in_place and self.cutoff.shape == cutoff.shape:
            cutoff = self.cutoff.copy_(cutoff)
        self.cutoff = cutoff
        if units is None:
            kind, a, b, factors = score[:4]
            tables = (self.layout.places, self.layout.chunks)
            pointers = self._pointers.of("pack", self.layout.places, self.packed, a, b)
            packed, *scores = self._kept.of("pack", self.packed, a, b)
            torch.ops.pins_ext.pack_(
                packed, self.stats, *scores, *tables, kind, cutoff, factors=factors, pointers=pointers
            )
        else:
            units.pack(self.packed, self.stats, cutoff)
        self._packed()

    def _before_packing(self) -> None:
        """`packed` is going to be written."""

    def _packed(self) -> None:
        """`packed` has been written: what is fixed stays pruned."""
        for bits, fixed in zip(self.packed, self.packed_fixed or (), strict=False):
            bits &= fixed
        if self._held is not None:
            # By the scores they were kept, flipped and NaN.
            self.stats -= self._held

    def apply(
        self,
        tensors: list[Tensor],
        indices: Sequence[int],
        layout: ops.Layout,
        bits: list[Tensor] | None = None,
        of: str = "weights",
    ) -> None:
        """Zero the pruned elements of tensors that are shaped like the pruned ones at these places.

        Args:
            tensors: parameters, or states of an optimizer.
            indices: their places in the whole list.
            layout: theirs.
            bits: the masks of all tensors; None: those of the last choice.
            of: what is zeroed: weights, or the name of a state.
        """
        own = [(self.bits if bits is None else bits)[i] for i in indices]
        use = (of, bits is None, indices[0] if indices else None)
        pointers = self._pointers.of(use, layout.places, tensors, own)
        lists = self._kept.of(use, tensors, own)
        torch.ops.pins_ext.apply_mask_(*lists, layout.places, layout.chunks, pointers=pointers)
        torch.autograd.graph.increment_version(tensors)

    def pruned(self, masks: list[Tensor] | None = None) -> list[int]:
        """Weights that the last mask, or another one, prunes, per tensor, on all ranks; one synchronisation."""
        kept = torch.stack([ops.set_bits(bits) for bits in masks or self.packed])
        counted = [self.ranks.counts(i) for i in range(len(self.bits))]
        kept = self.ranks.sum(kept * ops.to_device(torch.tensor(counted, device="cpu"), kept.device))
        return [n - k for n, k in zip(self.scopes.sizes, kept.tolist(), strict=True)]

    def pattern_now(self, i: int) -> Fit | None:
        """The pattern that the mask of this tensor has at this moment; groups N:M fill up on the way.

        A synchronisation where there is one.
        """
        fit = self.fits[i]
        if fit is None or self.chosen_for is None:
            return fit if self.frozen else None
        final = self.chosen_for[1:] == tuple(self.scopes.n_prune(self.scopes.final_ratio))
        # A cutoff of zero has pruned nothing: no score was known.
        return None if fit.pattern.grouped and not (final and bool(self.cutoff[i].any())) else fit

    def keep(self, i: int, shape: Sequence[int]) -> Tensor:
        """Boolean mask of this rank's part of one tensor, of its shape (True = keep); a copy."""
        return ops.unpack_bits(self.bits[i], shape)

    # ---- statistics and checkpoints ---------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int, int]:
        """Kept weights, flipped bits and NaN scores of the last selection; one synchronisation."""
        kept, flipped, nan = self.ranks.sum(self.stats[list(self.ranks.owned)].sum(0)).tolist()
        return kept, flipped, nan

    def threshold(self) -> float | None:
        """The score below which weights are pruned, the highest where tensors differ; one synchronisation.

        Returns:
            None before the first mask, and where no score decides: all but the best of every group N:M are pruned, or
            in 8 bits nothing but what stays pruned for good.
        """
        if not self.chosen:
            return None
        # No score has the key 0, with which nothing is pruned.
        found = ops.score_of_key(self.cutoff).masked_fill(self.cutoff[:, 0] == 0, -torch.inf)
        if self._units is not None:
            found = found.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        highest = found.max().item()
        return None if highest == -torch.inf else highest

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint; the tensors are `bits` and `cutoff`."""
        chosen_for = list(self.chosen_for) if self.chosen_for else None
        return {"frozen": self.frozen, "masked": self.applied, "selected_for": chosen_for}

    def load_state(self, state: Mapping[str, Any], cutoff: Tensor) -> None:
        """Go on from a checked `state`; `bits` are copied by the caller."""
        self.cutoff = cutoff.to(self.cutoff.device).clone()
        self.frozen, self.applied = state["frozen"], state["masked"]
        self.chosen_for = tuple(state["selected_for"]) if state["selected_for"] else None
        self.coming = None
        self._loaded()

    def _loaded(self) -> None:
        """`bits` and `fixed` are those of a checkpoint."""
        if self.packed is self.bits:
            self.packed_fixed = self.fixed
        self._count_held()
