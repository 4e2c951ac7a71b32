"""Which pruned tensors have which pattern, and what competes within it: weights of a group, or blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from pins_ext import ops
from pins_ext.distributed.shards import local, shard_of
from pins_ext.patterns import Fit, Pattern, recognised
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.importance import Operands
from pins_ext.wrappers import plain_name

_LOWEST = torch.finfo(torch.float32).min
_FIRST_NAN = torch.iinfo(torch.int32).max


def input_axes(model: nn.Module) -> dict[str, int]:
    """The dimension of the inputs, -1 or -2, of every parameter that is known to multiply activations, by name.

    Linear modules and attention keep [out, in], transformers' Conv1D [in, out]; stacks of experts say which. Where
    nothing says so, as in stacks of experts that modules of other kinds hold, a parameter is not listed.
    """
    axes: dict[str, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, p in module.named_parameters(recurse=False):
            axis = _axis(module, name, p)
            if axis is not None:
                axes[plain_name(f"{path}.{name}" if path else name)] = axis
    return axes


def _axis(module: nn.Module, name: str, p: Tensor) -> int | None:
    if p.dim() == 2 and (name == "weight" and isinstance(module, nn.Linear)):
        return -1
    if p.dim() == 2 and name == "weight" and type(module).__name__ == "Conv1D":
        return -2
    if p.dim() == 2 and isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
        return -1
    transposed = getattr(module, "is_transposed", None)
    if p.dim() == 3 and isinstance(transposed, bool):
        return -2 if transposed else -1
    return None


def fitted(
    model: nn.Module, parameters: Mapping[str, Tensor], config: PruneConfig
) -> tuple[list[Fit | None], list[str]]:
    """The pattern of each pruned tensor, and why tensors that were to have one are pruned without.

    Args:
        model: whose modules say which dimension is the input.
        parameters: the pruned ones, by name.
        config: its `pattern`.

    Raises:
        ValueError: a name pattern that matches nothing, or patterns of which none fits any tensor.
    """
    wanted = dict(config.pattern) if isinstance(config.pattern, Mapping) else {"*": config.pattern}
    for glob in wanted:
        if not any(fnmatchcase(name, glob) for name in parameters):
            raise ValueError(f"pattern: {glob!r} matches no pruned parameter")
    axes = input_axes(model) if config.patterned else {}
    fits: list[Fit | None] = []
    notes = []
    for name, p in parameters.items():
        found = next((text for glob, text in reversed(wanted.items()) if fnmatchcase(name, glob)), "none")
        pattern = Pattern.parse(found)
        fit = Fit(pattern, axes[name]) if pattern is not None and name in axes else None
        why = fit.misfit(p.shape) if fit is not None else "no module says which of its dimensions is the input"
        if pattern is not None and why is not None:
            notes.append(f"{name} is pruned without the pattern {found}: {why}")
        fits.append(fit if why is None else None)
    if notes and not any(fits):
        raise ValueError(f"pattern={config.pattern!r} fits no pruned tensor; {notes[0]}")
    return fits, notes


def fits_of_zeros(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    masks: Sequence[Tensor],
    config: PruneConfig,
    recognise: bool = True,
) -> list[Fit | None]:
    """The pattern that the zeros of each tensor have.

    Args:
        model: see `fitted`.
        parameters: the pruned ones, by name.
        masks: boolean, of this rank's part of each, True where a weight is not zero.
        config: the pattern that they must have, if it names one.
        recognise: otherwise look for one. Off where a rank sees parts only.

    Raises:
        ValueError: zeros without the pattern that the configuration names; see `fitted`.
    """
    if config.patterned:
        fits, _ = fitted(model, parameters, config)
        refuse_cut(list(parameters), list(parameters.values()), fits)
        for name, mask, fit in zip(parameters, masks, fits, strict=True):
            if fit is not None and (broken := fit.violations(mask)):
                raise ValueError(
                    f"{name} does not have the pattern {fit.pattern.name}: {broken:,} groups or blocks break it; "
                    f"leave out the pattern to keep the zeros as they are"
                )
        return fits
    axes = input_axes(model) if recognise else {}
    found = []
    for name, mask in zip(parameters, masks, strict=True):
        pattern = recognised(mask, axes[name]) if name in axes else None
        fit = None if pattern is None else Fit(pattern, axes[name])
        found.append(fit if fit is not None and fit.violations(mask) == 0 else None)
    return found


def refuse_cut(names: Sequence[str], parameters: Sequence[Tensor], fits: Sequence[Fit | None]) -> None:
    """Groups and blocks must lie on one rank each.

    Raises:
        ValueError: a sharded tensor of which a group or a block is cut.
    """
    for name, p, fit in zip(names, parameters, fits, strict=True):
        shard = shard_of(name, p) if fit is not None else None
        if fit is None or shard is None:
            continue
        part = tuple(local(p).shape)
        cut = any(x % cell for x, cell in zip((*shard.start[-2:], *part[-2:]), (*fit.cells, *fit.cells), strict=True))
        if cut and p.numel() and local(p).numel():
            raise ValueError(
                f"{name}: the pattern {fit.pattern.name} needs whole groups or blocks on every rank, and this one has "
                f"{part} from {shard.start} of {tuple(p.shape)}: shard along another dimension, use a smaller pattern, "
                f"or exempt the tensor with pattern={{'*': {fit.pattern.name!r}, {name!r}: 'none'}}"
            )


def unit_layout(parameters: Sequence[Tensor], names: Sequence[str], fits: Sequence[Fit | None]) -> ops.Layout:
    """The places of blocks among all blocks, and of weights of other tensors among all weights."""
    tensors, shards = [], []
    for name, p, fit in zip(names, parameters, fits, strict=True):
        shard, part = shard_of(name, p), local(p)
        if fit is not None and not fit.pattern.grouped:
            part = part.new_empty(fit.divided(part.shape))
            shard = shard and ops.Shard(fit.divided(shard.full), fit.divided(shard.start))
        tensors.append(part)
        shards.append(shard)
    return ops.Layout.of(tensors, shards)


class Units:
    """The scores of what competes in tensors that have a pattern, float32, made when they are asked for.

    Of N:M, the shape of the tensor: what is among the N best of its group is -inf and can't be pruned, however many
    compete below; a score of -inf itself counts as the lowest finite one. Of blocks, one score each: the sum.

    Args:
        score: of the weights.
        fits: pattern of each tensor.
    """

    def __init__(self, score: Operands, fits: Sequence[Fit | None]) -> None:
        self.score, self.fits = score, fits
        self._held: dict[int, Tensor] = {}

    def of(self, i: int, hold: bool = False) -> Tensor:
        """Scores of the units of the tensor at this place.

        Args:
            i: the place.
            hold: keep them for the next time.
        """
        if i in self._held:
            return self._held[i]
        fit = self.fits[i]
        assert fit is not None
        weights = values(self.score, i)
        found = eligible(weights, fit) if fit.pattern.grouped else block_sums(weights, fit)
        if hold:
            self._held[i] = found
        return found

    def kept(self, i: int, units: Tensor, above: Tensor) -> Tensor:
        """Boolean mask of the weights of the tensor at this place.

        Args:
            i: the place.
            units: scores of its units, as `of` returns them.
            above: which of them are at or above the cutoff.
        """
        fit = self.fits[i]
        assert fit is not None
        if fit.pattern.grouped:
            return above | (units == -torch.inf)
        a, b = fit.cells
        return above.repeat_interleave(a, -2).repeat_interleave(b, -1)


def values(score: Operands, i: int) -> Tensor:
    """Score of each weight of one tensor, float32: what the operators compute from the same operands."""
    kind, a, b = score.kind, _plain(score, score.a[i], i), _plain(score, score.b[i], i) if score.b else None
    if kind == "identity":
        return a
    if kind == "magnitude":
        return a.abs()
    assert b is not None
    if kind == "fisher":
        assert score.factors is not None
        return (a * a) * (b * score.factors[i])
    return a * b if kind == "product" else a * (b - a).abs()


def _plain(score: Operands, operand: Tensor, i: int) -> Tensor:
    """One tensor's operand in float32."""
    if operand.dtype not in ops.CODED:
        return operand.float()
    return ops.decode(operand, score.shapes[i])


def eligible(weights: Tensor, fit: Fit) -> Tensor:
    """The scores of a tensor with -inf for the N best of each group in the order of (score, position)."""
    m, dim = fit.pattern.of, weights.dim() + fit.axis
    # Keys that are ordered as integers as the scores are, -0 == +0 and every NaN the highest.
    bits = (weights + 0.0).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ _FIRST_NAN, bits).masked_fill_(weights.isnan(), _FIRST_NAN)
    keys = keys.unflatten(dim, (weights.shape[dim] // m, m))
    columns = [column.contiguous() for column in keys.unbind(dim + 1)]
    ranks = [torch.zeros_like(column, dtype=torch.int8) for column in columns]
    for j in range(m):
        for i in range(j):
            first = columns[i] <= columns[j]
            ranks[j] += first
            ranks[i] += ~first
    best = torch.stack([rank >= m - fit.pattern.keep for rank in ranks], dim + 1).view(weights.shape)
    return weights.clamp(min=_LOWEST).masked_fill_(best, -torch.inf)


def block_sums(weights: Tensor, fit: Fit) -> Tensor:
    """The sum of the scores of each block, float32: in float64 by halves onto halves, the same on every device.

    To first order the loss changes by the sum of what is pruned, so it is blocks with the lowest sums that go.
    """
    sums = fit.split(weights.double())
    for dim in (-1, -3):
        while (n := sums.shape[dim]) > 1:
            half = (n + 1) // 2
            low, high = sums.narrow(dim, 0, half), sums.narrow(dim, half, n - half)
            together = low.clone()
            together.narrow(dim, 0, n - half).add_(high)
            sums = together
    return sums.squeeze(-1).squeeze(-2).float()
