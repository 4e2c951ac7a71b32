"""Which pruned tensors have which pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from pins_ext.distributed.shards import local, shard_of
from pins_ext.patterns import Fit, Pattern, recognised
from pins_ext.pruning.config import PruneConfig
from pins_ext.wrappers import plain_name


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
