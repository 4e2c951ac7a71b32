"""The operators of CUDA tensors in Triton: importance, selection, packing; and one that CUDA C++ has, for builds
without it. Installed as `pins_ext.triton_kernels`.

Triton itself is imported by the first operator that runs, not by importing this package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

if __name__ != "pins_ext.triton_kernels":
    raise ImportError(
        f"this package is pins_ext.triton_kernels, not {__name__}: install pins_ext and import that, "
        "not the folder in a checkout"
    )

LAUNCHERS = {
    "accumulate_": "importance",
    "fold_": "importance",
    "fold_moments_": "importance",
    "sample": "select",
    "count_": "select",
    "collect_": "select",
    "count_regions_": "regions",
    "tie_index": "select",
    "bracket_of": "bracket",
    "narrow": "bracket",
    "settle": "bracket",
    "cutoff": "bracket",
    "eligible_": "eligible",
    "pack_": "pack",
    "grouped_linear": "grouped",
}
"""Operator and the module of its launcher, which has its name without the underscore."""

FALLBACKS = ("grouped_linear",)
"""Operators of CUDA tensors that are Triton's only where the build has no CUDA C++ for them."""


def _launch(module: str, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(import_module(f".{module}", __name__), name)(*args, **kwargs)


def launcher(op: str) -> Callable[..., Any]:
    """The implementation of `pins_ext::<op>`, which imports its kernels when it is first called."""
    return partial(_launch, LAUNCHERS[op], op.rstrip("_"))


def register(library: torch.library.Library, key: str = "CUDA") -> None:
    """Make the Triton kernels those of a dispatch key.

    Args:
        library: a `torch.library.Library("pins_ext", "IMPL")`, which keeps them registered while it lives.
        key: "CUDA"; or "CPU", for tests under Triton's interpreter, in place of the C++ kernels.
    """
    for op in LAUNCHERS:
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"pins_ext::{op}", key)
        if op not in FALLBACKS or key != "CUDA" or not compiled:
            library.impl(op, launcher(op), key)
