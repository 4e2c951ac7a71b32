"""The plain task loss of a batch, and the check that a model's own loss is that one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.regularization import heads

_CHECKED_BATCHES = 3
"""Batches whose loss is compared with the model's: a batch of one class alone can't show class weights."""

_OWN_LOSS = (
    "compute such a loss yourself beside reg(outputs, inputs), which takes plain labels, or train without attach"
)


def mean_of_rows(values: Tensor, valid: Tensor, num_items: int | float | Tensor | None = None) -> Tensor:
    """Sum over the rows that count, divided by the number of items, or of those rows (at least 1).

    Args:
        values: one for each row.
        valid: which rows count, bool of the same shape.
        num_items: rows that count in all batches of the optimizer step.

    Returns:
        A scalar of the dtype of values.
    """
    items = valid.sum().clamp(min=1) if num_items is None else num_items
    if isinstance(items, Tensor):
        items = items.to(values.device)
    return torch.where(valid, values, 0.0).sum() / items


def plain_loss(head: str, rows: list[heads.Rows], num_items: int | float | Tensor | None) -> Tensor:
    """Cross-entropy or squared error without class weights or smoothing, averaged over the lists of rows.

    Args:
        head: one of `heads.HEADS`.
        rows: what `heads.rows` made of a batch.
        num_items: see `mean_of_rows`.

    Returns:
        A float32 scalar.
    """
    return torch.stack([mean_of_rows(heads.task_loss(head, row), row.valid, num_items) for row in rows]).mean()


class PlainLoss:
    """Refuses a model whose own loss is another than the plain one: where a module says so, or a first batch shows it.

    Args:
        model: whose outputs have a `.loss`.

    Raises:
        ValueError: a loss module of the model has class weights or label smoothing.
    """

    def __init__(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            weighted = isinstance(module, nn.modules.loss._WeightedLoss) and module.weight is not None
            if weighted or getattr(module, "label_smoothing", False):
                raise ValueError(f"{name} ({type(module).__name__}) has class weights or label smoothing: {_OWN_LOSS}")
        self._unchecked = _CHECKED_BATCHES

    def check(self, head: str, outputs: Any, inputs: Mapping[str, Any], num_items: Any) -> None:
        """Compare the model's loss, and its gradient by the logits, with the plain mean or sum.

        Args:
            head: one of `heads.HEADS`.
            outputs: the model's outputs for a batch, its own loss in them; without one nothing is compared.
            inputs: the batch by argument name, labels included.
            num_items: see `mean_of_rows`.

        Raises:
            ValueError: they differ.
        """
        own = heads.field(outputs, "loss")
        if not self._unchecked or own is None or not bool(torch.isfinite(own)):
            return
        self._unchecked -= 1
        rows, logits = heads.rows(head, outputs, inputs), heads.raw_logits(head, outputs)
        for items in (num_items, None):
            plain = plain_loss(head, rows, items)
            if _agree(own, plain, logits):
                return
        raise ValueError(
            f"the model's loss is {own.item():.6g}, the plain loss of its logits and labels {plain.item():.6g}, or "
            f"their gradients differ: class weights, label smoothing or an auxiliary loss; {_OWN_LOSS}"
        )


def _agree(own: Tensor, plain: Tensor, logits: list[Tensor]) -> bool:
    """Whether two losses have the same value and pull the logits the same way, where they come from these tensors."""
    pairs: list[tuple[Tensor | None, Tensor | None]] = [(own.detach(), plain.detach())]
    if own.requires_grad and all(x.requires_grad for x in logits):
        pulls = [torch.autograd.grad(x, logits, retain_graph=True, allow_unused=True) for x in (own, plain)]
        pairs += zip(*pulls, strict=True)
    # A loss that the model computed in 16 bits agrees to a few of its 8 bits.
    tolerance = 1e-3 if logits[0].dtype in (torch.float32, torch.float64) else 5e-2
    return all(
        a is None or b is None or bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max() + 1e-8)
        for a, b in pairs
    )
