"""The pruner's own state: plain data and tensors, apart from the optimizer's, in one checked safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pins_ext.files import tensor_file
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.masks import Masks

FORMAT = "pins_ext.pruner"
VERSION = 2

_CUTOFF = "threshold"  # its name in the file


def gather(
    config: PruneConfig, total_steps: int, step: int, names: Sequence[str], importance: Importance, masks: Masks
) -> dict[str, Any]:
    """All that resuming needs. `tensors` maps kind/parameter to a tensor; the rest is JSON."""
    tensors: dict[str, Tensor] = {_CUTOFF: masks.cutoff, "seen": importance.seen, "folded": importance.folded}
    tensors |= {f"accepted/{part}": accepted for part, accepted in enumerate(importance.accepted)}
    for kind, states in (importance.tensors() | {"mask": masks.bits}).items():
        tensors |= {f"{kind}/{name}": t for name, t in zip(names, states, strict=True)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": json.loads(json.dumps(config.to_dict())),  # as it will come back from a file
        "total_steps": total_steps,
        "step": step,
        **masks.state(),
        "tensors": tensors,
    }


@torch.no_grad()
def restore(state: Mapping[str, Any], own: Mapping[str, Any], masks: Masks) -> None:
    """Go on where another state was gathered; nothing is changed when something does not fit.

    Args:
        state: the other state.
        own: what `gather` returns here and now: its tensors are written to.
        masks: whose plain data are replaced.

    Raises:
        ValueError: see Pruner.load_state_dict.
    """
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(
            f"not a pruner state of this version: {state.get('format')!r} version {state.get('version')!r}"
        )
    theirs, mine = dict(state["config"]), own["config"]
    differences = [f"{k}: {theirs.get(k)!r} there, {mine[k]!r} here" for k in mine if theirs.get(k) != mine[k]]
    if state["total_steps"] != own["total_steps"]:
        differences.append(f"total_steps: {state['total_steps']} there, {own['total_steps']} here")
    saved = state["tensors"]
    if sorted(saved) != sorted(own["tensors"]):
        odd = sorted(set(saved) ^ set(own["tensors"]))
        differences.append(f"{len(odd)} states exist on one side only, {odd[0]} first")
    for name in set(saved) & set(own["tensors"]) - {_CUTOFF}:
        there, here = saved[name], own["tensors"][name]
        if there.shape != here.shape or there.dtype != here.dtype:
            differences.append(
                f"{name}: {there.dtype} {tuple(there.shape)} there, {here.dtype} {tuple(here.shape)} here"
            )
    if differences:
        raise ValueError("the saved pruner state does not fit this one:\n  " + "\n  ".join(differences))
    for name, tensor in own["tensors"].items():
        if name != _CUTOFF:
            tensor.copy_(saved[name])
    masks.load_state(state, saved[_CUTOFF])


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write what `gather` returned; `path` holds the old state or the new one, never a part."""
    data = {name: value for name, value in state.items() if name != "tensors"}
    tensor_file.write(path, FORMAT, data, state["tensors"])


def read(path: Path) -> dict[str, Any]:
    """Read and check what `write` wrote."""
    data, tensors = tensor_file.read(path, FORMAT)
    return data | {"tensors": tensors}
