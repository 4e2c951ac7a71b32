"""The pruner's own state: plain data and tensors, apart from the optimizer's, in one checked safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pins_ext.files import tensor_file

if TYPE_CHECKING:
    from pins_ext.pruning.pruner import Pruner

FORMAT = "pins_ext.pruner"
VERSION = 2


def state_dict(pruner: Pruner) -> dict[str, Any]:
    """All that resuming needs. `tensors` maps kind/parameter to a tensor; the rest is JSON."""
    importance = pruner.importance
    tensors = {"threshold": pruner.threshold, "seen": importance.seen, "folded": importance.folded}
    tensors |= {f"accepted/{part}": accepted for part, accepted in enumerate(importance.accepted)}
    for kind, states in (importance.tensors() | {"mask": pruner.masks}).items():
        tensors |= {f"{kind}/{name}": t for name, t in zip(pruner.names, states, strict=True)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": _plain(pruner.config.to_dict()),
        "total_steps": pruner.schedule.total,
        "step": pruner.step,
        "frozen": pruner.frozen,
        "masked": pruner.masked,
        "selected_for": list(pruner._selected_for) if pruner._selected_for else None,
        "tensors": tensors,
    }


@torch.no_grad()
def load_state_dict(pruner: Pruner, state: Mapping[str, Any]) -> None:
    """Go on where `state_dict` was taken; nothing is changed when something does not fit.

    Raises:
        ValueError: see Pruner.load_state_dict.
    """
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(
            f"not a pruner state of this version: {state.get('format')!r} version {state.get('version')!r}"
        )
    own = state_dict(pruner)
    theirs, mine = dict(state["config"]), own["config"]
    differences = [f"{k}: {theirs.get(k)!r} there, {mine[k]!r} here" for k in mine if theirs.get(k) != mine[k]]
    if state["total_steps"] != own["total_steps"]:
        differences.append(f"total_steps: {state['total_steps']} there, {own['total_steps']} here")
    saved = state["tensors"]
    if sorted(saved) != sorted(own["tensors"]):
        odd = sorted(set(saved) ^ set(own["tensors"]))
        differences.append(f"{len(odd)} states exist on one side only, {odd[0]} first")
    for name in set(saved) & set(own["tensors"]) - {"threshold"}:
        there, here = saved[name], own["tensors"][name]
        if there.shape != here.shape or there.dtype != here.dtype:
            differences.append(
                f"{name}: {there.dtype} {tuple(there.shape)} there, {here.dtype} {tuple(here.shape)} here"
            )
    if differences:
        raise ValueError("the saved pruner state does not fit this one:\n  " + "\n  ".join(differences))
    for name, tensor in own["tensors"].items():
        if name != "threshold":
            tensor.copy_(saved[name])
    pruner.threshold = saved["threshold"].to(pruner.threshold.device).clone()
    pruner.step, pruner.frozen, pruner.masked = state["step"], state["frozen"], state["masked"]
    pruner._selected_for = tuple(state["selected_for"]) if state["selected_for"] else None


def save(pruner: Pruner, path: Path) -> None:
    """`path` holds the old state or the new one, never a part."""
    state = state_dict(pruner)
    tensors = state.pop("tensors")
    tensor_file.write(path, FORMAT, state, tensors)


def load(pruner: Pruner, path: Path) -> None:
    """Read and check what `save` wrote, then `load_state_dict`."""
    state, tensors = tensor_file.read(path, FORMAT)
    load_state_dict(pruner, state | {"tensors": tensors})


def _plain(data: Any) -> Any:
    """As it will come back from JSON."""
    return json.loads(json.dumps(data))
