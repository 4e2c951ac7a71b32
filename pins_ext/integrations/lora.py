"""Adapters on a pruned model: a merge that keeps its zeros. Needs `peft`, which nothing else here does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Merged:
    """A model with its adapters merged and its zeros kept.

    Attributes:
        model: the base model, of its own class and with its own names.
        weights: of the layers that had an adapter.
        zeros: how many of them are zero: those of before, and what the merge rounds to zero in 16 bits.
        refilled: how many of those the merge had filled.
        dropped: share of the update's squared norm that lay on the zeros and is lost; 0 where the update is 0.
    """

    model: Any
    weights: int
    zeros: int
    refilled: int
    dropped: float

    @property
    def sparsity(self) -> float:
        """Share of the adapted layers' weights that is zero."""
        return self.zeros / self.weights


@torch.no_grad()
def merge_lora(model: PeftModel, adapter_names: list[str] | None = None) -> Merged:
    """Merge adapters into the pruned model below them and put its zeros back.

    The product of two low-rank matrices is dense, so a plain `merge_and_unload` fills the zeros. Here every weight of
    an adapted layer that was zero is zero again. What the adapter had learned there is lost (`Merged.dropped`):
    evaluate the merged model.

    Args:
        model: a PeftModel; it is used up, as by its own `merge_and_unload`.
        adapter_names: the active ones if None.

    Raises:
        TypeError: no PeftModel.
        ValueError: no adapted layer, layers merged already, quantised weights, or adapters that hold NaN.
        RuntimeError: a zero is missing in the end, as where two layers share their weights.
    """
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("merge_lora needs peft: pip install peft") from error
    if not isinstance(model, PeftModel):
        raise TypeError(f"merge_lora takes a PeftModel, got {type(model).__name__}")
    tuner: Any = model.base_model
    layers = {name: m for name, m in tuner.model.named_modules() if isinstance(m, BaseTunerLayer)}
    before = {
        f"{name}.{own}".replace(".base_layer", ""): p.detach().clone()
        for name, layer in layers.items()
        for own, p in layer.get_base_layer().named_parameters(recurse=False)
        if p.dim() >= 2
    }
    _check(before, layers)
    for layer in layers.values():
        _merge_in_float32(layer)
    merged: nn.Module = tuner.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
    after = dict(merged.named_parameters())
    zeros = refilled = 0
    update = lost = 0.0
    for name, old in before.items():
        p, pruned = after[name], old == 0
        change = (p - old).float().square()
        update, lost = update + float(change.sum()), lost + float(change[pruned].sum())
        refilled += int(torch.count_nonzero(p[pruned]))
        p[pruned] = 0
        zeros += p.numel() - int(torch.count_nonzero(p))
    for name, p in merged.named_parameters():
        if name in before and bool(torch.count_nonzero(p[before[name] == 0])):
            raise RuntimeError(f"{name}: weights that were zero are not, although they were put back")
    return Merged(merged, sum(p.numel() for p in before.values()), zeros, refilled, lost / update if update else 0.0)


def _merge_in_float32(layer: Any) -> None:
    """Let a layer merge its adapters in float32, rounded once: in 16 bits weights and updates may cancel to zero."""
    merge: Callable[..., None] = layer.merge

    def rounded_once(*args: Any, **kwargs: Any) -> None:
        base = layer.get_base_layer()
        dtype = next(base.parameters()).dtype
        if dtype in (torch.float16, torch.bfloat16):
            layer.float()
        merge(*args, **kwargs)
        base.to(dtype)

    layer.merge = rounded_once


def _check(weights: dict[str, torch.Tensor], layers: dict[str, Any]) -> None:
    if not weights:
        raise ValueError("the model has no layer with an adapter: there is nothing to merge")
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(f"{merged[0]} is merged already, its zeros are gone: unmerge_adapter() first")
    if coded := [name for name, p in weights.items() if not p.is_floating_point()]:
        raise ValueError(f"{coded[0]} is quantised ({weights[coded[0]].dtype}): merge before quantising")
