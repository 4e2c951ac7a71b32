"""Importance and masks whose states are on the host while the weights are on a GPU: `state_device="cpu"`.

The CPU's operators compute there what the GPU's would, to the last bit. A tensor's weights and gradient come down
through two buffers, and a new mask goes up as bits. A step that takes no importance copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import local, shard_of
from pins_ext.optim.step import Rate, Scaling, scalars_on
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.kept import moves_states
from pins_ext.pruning.masks import ZERO, Masks
from pins_ext.pruning.scopes import Scopes
from pins_ext.pruning.scores import Counted, Operands
from pins_ext.pruning.staging import Staging

HOST = torch.device("cpu")


def offloads(config: PruneConfig, layout: ops.Layout, ranks: Ranks, frozen_base: bool) -> bool:
    """Whether states are on another device than the weights.

    Args:
        config: says where they are to be, and which there are.
        layout: of the weights, on their device.
        ranks: the processes that hold them.
        frozen_base: see Pruner.

    Raises:
        ValueError: weights that several ranks share.
    """
    if layout.places.device.type in ("cpu", "meta") or not moves_states(config, frozen_base):
        return False
    if not ranks.alone:
        raise ValueError(
            f"state_device='cpu' is for weights that one process holds whole (DDP is), and these are cut over "
            f"{ranks.size} ranks: leave it out; shards keep less on each GPU, and state_dtype='8bit' less again"
        )
    return True


def _down(x: Tensor) -> Tensor:
    """A copy on the host, which waits for it: of a few numbers, or once."""
    return x.to(HOST)


class HostImportance(Importance):
    """States on the host; see Importance for the rest.

    What an optimizer's pass writes on the device stays there: the unmasked values ("shadow").

    Args:
        parameters: see Importance.
        config: see Importance.
        layout: of the weights, on their device.
        parts: see Importance.
        ranks: see Importance.
        frozen_base: see Importance.
        staging: what weights and gradients come through.
    """

    on_host = True

    def __init__(
        self,
        parameters: Sequence[Tensor],
        config: PruneConfig,
        layout: ops.Layout,
        parts: Sequence[Sequence[int]],
        ranks: Ranks,
        frozen_base: bool,
        staging: Staging,
    ) -> None:
        self._staging = staging
        super().__init__(parameters, config, layout.on(HOST), parts, ranks, frozen_base)
        self._alone: dict[int, ops.Layout] = {}
        self._found: tuple[Tensor, Tensor] | None = None
        device = layout.places.device
        self._unused = torch.zeros(1, dtype=torch.float32, device=device)
        self._no_keys = torch.zeros(2, dtype=torch.int64, device=device)

    def _check_storage(self) -> None:
        if self.dtype in ops.CODED:
            for i, p in enumerate(self.parameters):
                if (shard := shard_of(str(i), p)) is not None:
                    ops.check_cut("a pruned parameter", local(p).shape, shard)

    @property
    def in_pass(self) -> bool:
        """No optimizer's pass reaches the states."""
        return False

    def pass_scalars(self, part: int, step: int, rounds: bool) -> tuple[Tensor, Tensor]:
        """See Importance; on the weights' device."""
        keys = ops.to_device(self.rng(step, rounds), self._no_keys.device) if rounds else self._no_keys
        return self._unused, keys

    def accumulate(
        self,
        indices: Sequence[int],
        layout: ops.Layout,
        grads: list[Tensor],
        lr: Sequence[Rate],
        part: int,
        step: int,
        scaling: Scaling,
    ) -> None:
        """See Importance; the host waits for each tensor's weights and gradient."""
        near = self._near(scaling)
        rates = scalars_on(lr, HOST).float()
        for at, (weights, scores) in enumerate(self._read(indices, grads, lr, scaling)):
            i = indices[at]
            self._enter([self.ipt[i]], weights, scores, self._layout_of(i), rates[at : at + 1], part, step, near)

    def _read(
        self, indices: Sequence[int], grads: Sequence[Tensor], lr: Sequence[Rate], scaling: Scaling
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Weights and gradients, or a user's scores alone, on the host, tensor by tensor."""

        def items() -> Iterator[list[Tensor]]:
            for i, grad, rate in zip(indices, grads, lr, strict=True):
                weights, scores = self._operands([i], [grad], [rate], scaling)
                yield [*scores, *weights]

        for scores, *weights in self._staging.read(items()):
            yield weights, [scores]

    def fold_at_once(self, i: int, layout: ops.Layout, grad: Tensor, part: int, step: int, skipped: Tensor) -> None:
        """See Importance; the host waits for the tensor's weights and gradient."""
        scaling = Scaling(found_inf=skipped)
        near = self._near(scaling)
        assert near.found_inf is not None
        for weights, scores in self._read([i], [grad], [0.0], scaling):
            self._fold_at_once(i, self._layout_of(i), weights, scores, part, step, near.found_inf)

    def _near(self, scaling: Scaling) -> Scaling:
        """The scalars on the host, which waits for them."""
        grad_scale, clip = (None if x is None else _down(x) for x in (scaling.grad_scale, scaling.clip))
        return Scaling(grad_scale, self._found_inf(scaling), clip)

    def _found_inf(self, scaling: Scaling) -> Tensor | None:
        found = scaling.found_inf
        if found is None:
            return None
        if self._found is None or self._found[0] is not found:
            self._found = found, _down(found)
        return self._found[1]

    def count_accepted(self, part: int, scaling: Scaling, scored: bool) -> None:
        """See Importance; the host waits for a gradient scaler's verdict, where it doesn't know it yet."""
        super().count_accepted(part, Scaling(found_inf=self._found_inf(scaling)), scored)
        self._found = None

    def fold(self, step: int, counted: Counted | None = None) -> Counted | None:
        """See Importance; tensor by tensor nothing is counted."""
        return super().fold(step, None if self.rule.reads_moments else counted)

    def _fold(
        self, indices: Sequence[int], layout: ops.Layout, accepted: Tensor, step: int, counted: Counted | None
    ) -> None:
        if not self.rule.reads_moments:
            super()._fold(indices, layout, accepted, step, counted)
            return
        moments = self.moments()
        factors = _down(moments.factors)
        rest = self._fold_arguments(accepted, step)
        items = ([local(x[i]) for x in (self.parameters, *moments[:2])] for i in indices)
        for i, (weights, first, second) in zip(indices, self._staging.read(items), strict=True):
            averages = [self.exp_avg_ipt[i]], [self.exp_avg_unc[i]] if self.exp_avg_unc else []
            lists, own = (*averages, [weights], [first], [second]), self._layout_of(i)
            torch.ops.pins_ext.fold_moments_(*lists, own.places, own.chunks, factors[i : i + 1], *rest)

    def _layout_of(self, i: int) -> ops.Layout:
        if i not in self._alone:
            self._alone[i] = self.layout.subset([i])
        return self._alone[i]


class HostMasks(Masks):
    """Masks that are chosen on the host, where the scores are, and applied where the weights are; see Masks.

    Args:
        parameters: see Masks.
        layout: of the weights, on their device.
        scopes: see Masks.
        config: see Masks.
        ranks: see Masks.
        staging: what the bits go through.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        layout: ops.Layout,
        scopes: Scopes,
        config: PruneConfig,
        ranks: Ranks,
        staging: Staging,
    ) -> None:
        self._staging = staging
        super().__init__(parameters, layout.on(HOST), scopes, config, ranks)
        self.weights_layout = layout
        self.packed = staging.near(self.bits)
        self._take_down()

    def _take_down(self) -> None:
        """Bits of the device to the host; one synchronisation."""
        self._staging.sent()
        for here, there in zip(self.packed, self.bits, strict=True):
            here.copy_(there)
        self.packed_fixed = None if self.fixed is None else [_down(bits) for bits in self.fixed]

    def _before_packing(self) -> None:
        self._staging.sent()

    def _packed(self) -> None:
        super()._packed()
        self._staging.send(self.bits, self.packed)

    def keep_nonzero(self, parameters: Sequence[Tensor]) -> list[int]:
        """See Masks; weights come to the host tensor by tensor."""
        cutoff = torch.tensor([[ZERO, 0]], device="cpu")
        self._before_packing()
        items = ([local(p)] for p in parameters)
        for i, (weights,) in enumerate(self._staging.read(items)):
            own, score = self.layout.subset([i]), Operands("magnitude", [weights], [])
            tables = (own.places, own.chunks, score.kind, cutoff)
            torch.ops.pins_ext.pack_([self.packed[i]], self.stats[i : i + 1], score.a, score.b, *tables)
        self.cutoff = cutoff
        self._packed()
        return self.pruned()

    def fix(self) -> None:
        """See Masks."""
        self.packed_fixed = [bits.clone() for bits in self.packed]
        super().fix()

    def _loaded(self) -> None:
        self._take_down()
        super()._loaded()
