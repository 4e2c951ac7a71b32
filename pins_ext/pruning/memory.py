"""How many bytes a training run keeps on each rank, counted from shapes: nothing is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pins_ext import ops
from pins_ext.distributed import select
from pins_ext.patterns import Fit
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.kept import folds_at_once, host_bytes, moves_states, state_bytes, state_size
from pins_ext.pruning.scopes import Scopes
from pins_ext.pruning.selection import search_bytes
from pins_ext.pruning.units import units_bytes
from pins_ext.wrappers import named_parameters

Shape = tuple[int, ...]

_FLOAT32 = 4
_ROW, _CHUNK = 14 * 8, 2 * 8
"""Bytes of a tensor's row and of a chunk in a layout."""


def _per_weight(count: int) -> Callable[[Shape, int], int]:
    return lambda shape, size: count * size * math.prod(shape)


def _adafactor(shape: Shape, size: int) -> int:
    """A running mean of squared gradients per row and per column in float32; of a vector, per weight."""
    if len(shape) < 2:
        return _FLOAT32 * math.prod(shape)
    return _FLOAT32 * math.prod(shape[:-2]) * (shape[-2] + shape[-1])


MOMENTS: dict[str, Callable[[Shape, int], int]] = {
    "float32": lambda shape, size: 8 * math.prod(shape),
    "bfloat16": lambda shape, size: 4 * math.prod(shape),
    "8bit": lambda shape, size: 2 * ops.coded_bytes(shape),
}
"""PinsAdamW's moment_dtype -> bytes of both moments of a parameter."""

OPTIMIZERS: dict[str, Callable[[Shape, int], int]] = {
    "adamw": MOMENTS["float32"],
    "adamw_torch": _per_weight(2),
    "adamw_torch_fused": _per_weight(2),
    "adafactor": _adafactor,
    "adagrad": _per_weight(1),
    "adamax": _per_weight(2),
    "rmsprop": _per_weight(1),
    "sgd": _per_weight(0),
}
"""Optimizer, as `pins-ext train --optimizer` names it -> bytes of its state for a parameter, from the parameter's shape
and the bytes of one of its elements."""


@dataclass(frozen=True)
class Memory:
    """Bytes that stay allocated on one rank while it trains, on its GPU where it has one. Activations come on top.

    Attributes:
        weights: parameters and buffers.
        gradients: of the parameters that learn; where they are freed inside backward, the largest, and its score if
            that is folded at once.
        buckets: copies of the gradients that DistributedDataParallel reduces.
        moments: the optimizer's state.
        statistics: importance of the pruned weights: window mean, its running averages, unmasked values.
        masks: one bit per pruned weight.
        teacher: the model's earlier self, for self-regularization.
        selection: counts, candidates and work lists, and what patterns ask for, while a mask is chosen; with one
            threshold over several ranks where most is asked for, see `distributed.select.most_bytes`, and with several
            thresholds see `selection.search_bytes`.
        adapters: their weights, gradients and moments.
        host: what is in host memory instead, where state_device="cpu"; not part of `total`.
    """

    weights: int
    gradients: int
    buckets: int
    moments: int
    statistics: int
    masks: int
    teacher: int
    selection: int
    adapters: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All of it but what is in host memory."""
        return sum(dataclasses.astuple(self)) - self.host


def memory(
    model: nn.Module,
    pruned: Collection[str],
    config: PruneConfig,
    *,
    optimizer: str = "adamw",
    moment_dtype: str = "float32",
    teacher: str = "none",
    release: bool = False,
    frozen_base: bool = False,
    adapters: Iterable[Shape] = (),
    ranks: int = 1,
    replicas: int = 1,
    fits: Mapping[str, Fit | None] | None = None,
) -> Memory:
    """Count the bytes on the rank that holds most.

    Args:
        model: its parameters' shapes, dtypes and `requires_grad` are all that is used, so it may be on the meta device.
        pruned: names of the parameters to prune.
        config: which statistics are kept, and in which dtype.
        optimizer: one of OPTIMIZERS; but for "adamw", PinsAdamW, its state has the parameters' dtype.
        moment_dtype: PinsAdamW's, one of MOMENTS.
        teacher: a policy of SelfRegularizer, or anything else for a fixed model of the same size.
        release: gradients are freed inside backward, see FusedOptimizer.release_gradients.
        frozen_base: no parameter of this model learns, and the pruned ones' gradients are freed inside backward, see
            Pruner; adapters come on top.
        adapters: shapes of the float32 tensors that learn in its place.
        ranks: processes, each with a GPU of its own.
        replicas: how many whole copies of the model the ranks hold together. 1 shards every tensor by rows over all
            ranks (FSDP2), `ranks` gives each rank a copy (DDP), anything between is HSDP.
        fits: pruned parameter -> its pattern, where there are any.

    Raises:
        ValueError: an unknown optimizer or moment_dtype, ranks that can't be divided among the replicas, or several of
            them where gradients are freed inside backward or states are on the host.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"the size of {optimizer}'s state is not known; known are {', '.join(OPTIMIZERS)}")
    state_of = OPTIMIZERS[optimizer]
    if optimizer == "adamw":
        if moment_dtype not in MOMENTS:
            raise ValueError(f"moment_dtype must be one of {', '.join(MOMENTS)}; got {moment_dtype!r}")
        state_of = MOMENTS[moment_dtype]
    if not 1 <= replicas <= ranks or ranks % replicas:
        raise ValueError(f"{ranks} ranks cannot hold {replicas} copies of the model: ranks must be a multiple of them")
    if ranks > 1 and (release or frozen_base):
        raise ValueError(f"gradients that are freed inside backward are of one process, not of {ranks} ranks")
    shards = ranks // replicas
    moved = moves_states(config, frozen_base)
    if shards > 1 and moved:
        raise ValueError("state_device='cpu' is for weights that one process holds whole: leave it out, or use DDP")
    if release and moved:
        raise ValueError(
            "state_device='cpu' is not for gradients that are freed inside backward: leave one of them out"
        )
    parameters = dict(named_parameters(model))
    buffers = sum(b.nbytes for b in model.buffers())
    weights = sum(_local_bytes(p, shards) for p in parameters.values())
    learning = [p for p in parameters.values() if p.requires_grad and not frozen_base]
    if frozen_base:
        gradients = max((_passing(p, config) for name, p in parameters.items() if name in pruned), default=0)
    else:
        each = [_local_bytes(p, shards) for p in learning]
        gradients = max(each, default=0) if release else sum(each)
    whole = {name: p.numel() for name, p in parameters.items() if name in pruned}
    scopes = Scopes(list(whole), list(whole.values()), config, [(fits or {}).get(name) for name in whole])
    shapes = [(_local(parameters[name], shards), parameters[name].element_size()) for name in whole]
    sizes = [math.prod(shape) for shape, _ in shapes]
    # The "ema" teacher of 16-bit weights averages in float32.
    average = sum(_FLOAT32 * math.prod(_local(p, shards)) for p in parameters.values() if p.element_size() < _FLOAT32)
    statistics = sum(state_bytes(config, shape, size, frozen_base) for shape, size in shapes)
    selection = _selection(sizes, ranks if shards > 1 else 1, scopes)
    selection += _patterned(fits or {}, parameters, shards, config)
    host = 0
    if moved:
        element, each_shape = max(size for _, size in shapes), [shape for shape, _ in shapes]
        own = host_bytes(config, each_shape, element, frozen_base, lambda shape: state_of(tuple(shape), element))
        statistics -= sum(state_bytes(config, shape, 0, frozen_base) for shape in each_shape)
        host, selection = selection + own, _tables(sizes)
    return Memory(
        weights=weights + buffers,
        gradients=gradients,
        buckets=gradients if shards == 1 and ranks > 1 else 0,
        moments=sum(state_of(_local(p, shards), p.element_size()) for p in learning),
        statistics=statistics,
        masks=sum(ops.mask_bytes(n) for n in sizes),
        teacher=0 if teacher == "none" else weights + buffers + (average if teacher == "ema" else 0),
        selection=selection,
        adapters=sum(2 * _FLOAT32 * math.prod(shape) + state_of(shape, _FLOAT32) for shape in adapters),
        host=host,
    )


def ranks_needed(fits: Callable[[int], bool], limit: int = 4096) -> int | None:
    """The fewest ranks that `fits` accepts, among 1, 2, 4, ... up to `limit`; None: not even that many do."""
    counts: Iterator[int] = (2**i for i in range(limit.bit_length()))
    return next((count for count in counts if fits(count)), None)


def _passing(p: Tensor, config: PruneConfig) -> int:
    """Bytes of a frozen base's gradient, and of the window's mean that is made of it alone."""
    return p.nbytes + (state_size(config, p.shape) if folds_at_once(config) else 0)


def _local(p: Tensor, shards: int) -> Shape:
    """The first rank's part of a parameter cut by rows: no other part is larger."""
    return (-(-p.shape[0] // shards), *p.shape[1:]) if p.dim() else ()


def _local_bytes(p: Tensor, shards: int) -> int:
    return math.prod(_local(p, shards)) * p.element_size()


def _patterned(
    fits: Mapping[str, Fit | None], parameters: Mapping[str, Tensor], shards: int, config: PruneConfig
) -> int:
    return units_bytes(list(fits.values()), [_local(parameters[name], shards) for name in fits], config)


def _selection(sizes: list[int], ranks: int, scopes: Scopes) -> int:
    """What is asked for while a mask is chosen, without patterns' scores.

    With one threshold: counts of the pass that rides on the fold and of the one that does not, candidates, and what is
    drawn and written down on the CPU, more than a GPU draws.

    Args:
        sizes: weights of each tensor's part.
        ranks: those that share the tensors.
        scopes: which weights compete.
    """
    counts, candidates = 2 * (1 + ops.BINS), 4 * ops.CANDIDATES
    asked = 8 * (counts + candidates) + ops.listed_bytes(sum(sizes))
    if not scopes.is_global:
        asked = search_bytes(scopes, together=ranks > 1)
    elif ranks > 1:
        asked = 8 * (1 + ops.BINS) + select.most_bytes(ranks, sizes, sum(scopes.sizes))
    return asked + _tables(sizes)


def _tables(sizes: list[int]) -> int:
    """Work lists of tensors of these sizes."""
    return _ROW * len(sizes) + _CHUNK * sum(-(-n // ops.CHUNK) for n in sizes)
