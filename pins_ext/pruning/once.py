"""One-shot pruning: scores from calibration batches, one exact selection, no optimizer and no training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.distributed.ranks import Ranks
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.gathered import Gathered, gathered
from pins_ext.pruning.inputs import output_dims
from pins_ext.pruning.masks import Masks
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.pruning.patterns import fitted
from pins_ext.pruning.plan import ConflictWarning
from pins_ext.pruning.rows import prune_rows
from pins_ext.pruning.scopes import Scopes
from pins_ext.pruning.streamed import GradientStream
from pins_ext.wrappers import is_sharded, unwrapped

LossFunction = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class PrunedOnce:
    """What one-shot pruning did.

    Attributes:
        weights: that could be pruned.
        zeros: how many of them are zero now.
        pruned: how many the selection pruned; there are more zeros where others were zero already.
        per_layer: sparsity of each pruned tensor by name.
        batches: that were looked at.
        loss: their mean loss, of the dense model; None where the criterion asks for none.
    """

    weights: int
    zeros: int
    pruned: int
    per_layer: dict[str, float]
    batches: int
    loss: float | None

    @property
    def sparsity(self) -> float:
        """Share of the weights that is zero now."""
        return self.zeros / self.weights


def prune_once(
    model: nn.Module,
    batches: Iterable[Any],
    config: PruneConfig,
    *,
    loss: LossFunction | None = None,
    learning_rate: float = 0.0,
    progress: Progress | None = None,
) -> PrunedOnce:
    """Prune a model in one shot, by any criterion, from calibration batches; no optimizer is needed.

    The score of a weight is the mean over the batches of the criterion's instant score (movement: the sum; fisher and
    moments: made of the means of g and g²; magnitude: |w|, and no batch is read). wanda is |w| times the 2-norm of the
    input feature over all tokens (Sun et al. 2023), an expert's over those that are routed to it, compared within each
    output of a layer; all inputs are those of the dense model, where the authors' code looks anew behind every block
    that it has pruned. Padding is left out where a batch has an attention_mask. Gradients are freed one by one inside
    backward: beside the weights there is one state per prunable weight (moments: two; wanda and magnitude: none). The
    model runs in evaluation mode, without dropout, and its own gradients, modes and requires_grad come back as they
    were.

    Args:
        model: in one process, on one device; frozen weights are pruned like others.
        batches: mappings that the model takes as keywords, tuples or tensors; moved to the model's device. The size of
            a batch matters to criteria with gradients: each is scored by its mean gradient.
        config: what to prune, how much, criterion and scope; without what concerns training.
        loss: of (model, batch), a scalar; the model's own `loss` when None. wanda needs none.
        learning_rate: of the step that pins and pins-signed look ahead to. At 0 pins is platon.
        progress: told ("calibrating", batches) and ("pruning", tensors) so far, for jobs that take long.

    Raises:
        ValueError: options that only training has, a model that is sharded, nothing to prune, batches that hold no loss
            or none at all; weights whose layer is not known where rows or inputs are asked for. See PruneConfig.
        RuntimeError: a loss or an input that is not finite. Nothing has been pruned.
    """
    config.check_once()
    if is_sharded(model):
        raise ValueError("prune_once runs in one process: give it the model before it is sharded")
    model = unwrapped(model)
    parameters = prunable_parameters(model, config, frozen_too=True)
    by_rows = config.scope == "row"
    if by_rows and (config.min_density or config.max_density or config.ties != "exact"):
        raise ValueError("scope='row' prunes the same number in every row: leave out densities and ties")
    purpose = f"criterion={config.criterion!r}" if config.rule.reads_inputs else "scope='row'"
    dims = output_dims(model, parameters, purpose) if by_rows or config.rule.reads_inputs else []
    fits, misfits = fitted(model, parameters, config)
    for misfit in misfits:
        warnings.warn(misfit, ConflictWarning, stacklevel=2)
    scopes = None if by_rows else Scopes(list(parameters), [p.numel() for p in parameters.values()], config, fits)
    say = progress or (lambda stage, done: None)
    with torch.no_grad():
        source = gathered(model, parameters, config, dims, learning_rate)
    seen, total = 0, 0.0
    if source.needs_batches:
        with _calibrating(model, parameters, source) as look:
            for seen, batch in enumerate(batches, 1):
                total += look(seen, batch, loss)
                say("calibrating", seen)
        if not seen:
            raise ValueError("there are no calibration batches")
    with torch.no_grad():
        source.finish()
        pruned = _by_rows(source, config, dims, say) if scopes is None else _by_scopes(source, config, scopes)
        zeros = {name: p.numel() - int(torch.count_nonzero(p)) for name, p in parameters.items()}
    return PrunedOnce(
        weights=sum(p.numel() for p in parameters.values()),
        zeros=sum(zeros.values()),
        pruned=pruned,
        per_layer={name: zeros[name] / p.numel() for name, p in parameters.items()},
        batches=seen,
        loss=total / seen if source.needs_gradients else None,
    )


def _by_rows(source: Gathered, config: PruneConfig, dims: list[int], say: Progress) -> int:
    pruned = 0
    for i, (p, dim) in enumerate(zip(source.weights, dims, strict=True)):
        pruned += prune_rows(p, source.score(i), config.sparsity, dim)
        say("pruning", i + 1)
    return pruned


def _by_scopes(source: Gathered, config: PruneConfig, scopes: Scopes) -> int:
    masks = Masks(source.weights, source.layout, scopes, config, Ranks(source.weights))
    masks.choose(source.operands(), 1 - config.sparsity)
    masks.apply(source.weights, range(len(source.weights)), source.layout)
    return sum(scopes.sizes) - masks.counts()[0]


@contextmanager
def _calibrating(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], source: Gathered
) -> Iterator[Callable[[int, Any, LossFunction | None], float]]:
    """A function that shows one batch to the source; afterwards the model is as it was."""
    learning = set(map(id, parameters.values())) if source.needs_gradients else set()
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training = [module for module in model.modules() if module.training]
    device = next(iter(parameters.values())).device
    stream: GradientStream | None = None
    try:
        model.eval()
        for p, _, _ in before:
            # No other gradient is computed, and where there was one already, hooks would see the sum.
            p.grad = None
            p.requires_grad_(id(p) in learning)
        if source.needs_gradients:
            stream = GradientStream(list(parameters.values()), source.take)

        def look(number: int, batch: Any, loss: LossFunction | None) -> float:
            batch = _moved(batch, device)
            source.begin_batch(_tokens(batch))
            if stream is None:
                with torch.no_grad():
                    _forward(model, batch) if loss is None else loss(model, batch)
                return 0.0
            stream.begin()
            with torch.enable_grad():
                value = _loss(model, batch) if loss is None else loss(model, batch)
                if not bool(torch.isfinite(value)):
                    raise RuntimeError(
                        f"the loss of batch {number} is {float(value.detach())}: nothing has been pruned"
                    )
                value.backward()
            with torch.no_grad():
                source.end_batch(stream.came)
            return float(value.detach())

        yield look
    finally:
        if stream is not None:
            stream.detach()
        source.detach()
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad
        for module in training:
            module.training = True


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    return tuple(_moved(value, device) for value in batch) if isinstance(batch, (tuple, list)) else batch


def _tokens(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    value = getattr(_forward(model, batch), "loss", None)
    if not isinstance(value, Tensor):
        raise ValueError(
            "the model's output has no loss: give labels with every batch, or loss=a function of (model, batch)"
        )
    return value
