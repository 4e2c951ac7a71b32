"""Pruning inside other people's trainers.

transformers has the callback, the fused optimizers and clipping in their pass for any Trainer, loss a base for
Trainers of one's own, lora the merge of adapters that keeps zeros, trainer a Trainer that resumes exactly.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = ("callback", "clipping", "lora", "loss", "timing", "trainer", "transformers")


def __getattr__(name: str) -> Any:
    """Import on first use: transformers takes seconds."""
    if name in _MODULES:
        return import_module(f"pins_ext.integrations.{name}")
    raise AttributeError(f"module 'pins_ext.integrations' has no attribute {name!r}")
