"""Copies of an optimizer whose steps a pruner follows by hooks: torch leaves hooks out of them, so they warn."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from pins_ext.optim.fused import COPY_WARNING


def warn_copies(optimizer: Optimizer) -> None:
    """Make copies of the optimizer warn at their first step, unless a pruner follows them."""
    _drop_warning(optimizer)
    vars(optimizer)["__getstate__"] = partial(_state_of_copy, optimizer)


def let_copies_be(optimizer: Optimizer) -> None:
    """Stop warning: a copy is like that of any other optimizer."""
    vars(optimizer).pop("__getstate__", None)


def _drop_warning(optimizer: Optimizer) -> None:
    """A pruner follows this optimizer, which may be a copy itself."""
    hooks = optimizer._optimizer_step_pre_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook, _CopyWarning)]:
        del hooks[number]


def _state_of_copy(optimizer: Optimizer) -> dict[str, Any]:
    """What a copy begins with."""
    state = type(optimizer).__getstate__(optimizer)
    return {**state, "_optimizer_step_pre_hooks": OrderedDict({-1: _CopyWarning()})}


class _CopyWarning:
    """A step hook: tells of the first step of a copy that no pruner follows."""

    told = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.told:
            self.told = True
            warnings.warn(COPY_WARNING, stacklevel=4)
