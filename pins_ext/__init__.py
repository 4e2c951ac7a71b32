"""Iterative global pruning of pretrained language models during fine-tuning, exactly (PINS, Ren & Zhu 2023).

pruner = pins_ext.Pruner(model, optimizer, pins_ext.PruneConfig(sparsity=0.8), total_steps=n)
...                   # the training loop stays as it was
pruner.finalize()     # exactly 80 % of the prunable weights are zero
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pins_ext import integrations, ops, optim
    from pins_ext.integrations.lora import merge_lora
    from pins_ext.pruning.config import PruneConfig
    from pins_ext.pruning.graphs import StepGraphs
    from pins_ext.pruning.once import prune_once
    from pins_ext.pruning.pruner import Pruner
    from pins_ext.pruning.sharded_state import ShardedState
    from pins_ext.regularization.self_regularizer import SelfRegularizer
    from pins_ext.sparse.format import load_sparse, save_sparse
    from pins_ext.sparse.inference import sparsify_for_inference
    from pins_ext.sparse.semi_structured import to_semi_structured

_HOME = {
    "PruneConfig": "pruning.config",
    "Pruner": "pruning.pruner",
    "SelfRegularizer": "regularization.self_regularizer",
    "ShardedState": "pruning.sharded_state",
    "StepGraphs": "pruning.graphs",
    "load_sparse": "sparse.format",
    "merge_lora": "integrations.lora",
    "prune_once": "pruning.once",
    "save_sparse": "sparse.format",
    "sparsify_for_inference": "sparse.inference",
    "to_semi_structured": "sparse.semi_structured",
}
_MODULES = ("integrations", "ops", "optim")

__all__ = [
    "PruneConfig",
    "Pruner",
    "SelfRegularizer",
    "ShardedState",
    "StepGraphs",
    "__version__",
    "integrations",
    "load_sparse",
    "merge_lora",
    "ops",
    "optim",
    "prune_once",
    "save_sparse",
    "sparsify_for_inference",
    "to_semi_structured",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `pins-ext --help` and the reference need neither torch's time nor the extension."""
    if name in _MODULES:
        return import_module(f"pins_ext.{name}")
    if name in _HOME:
        return getattr(import_module(f"pins_ext.{_HOME[name]}"), name)
    raise AttributeError(f"module 'pins_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Also what is not imported yet."""
    return __all__
