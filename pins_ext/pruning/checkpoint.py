"""The pruner's own state: plain data and tensors, apart from the optimizer's, in one checked safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext.files import tensor_file
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.importance import Importance
from pins_ext.pruning.masks import Masks
from pins_ext.wrappers import plain_name

FORMAT = "pins_ext.pruner"
VERSION = 2

_LATER_OPTIONS = ("importance_every", "pattern", "state_device")
"""Options of PruneConfig that earlier states lack: those were made with what is the default now."""

_FREE_OPTIONS = ("state_device",)
"""Options that may be others when a state is loaded: they change no value."""

_CUTOFF = "threshold"  # its name in the file


def gather(
    config: PruneConfig, total_steps: int, step: int, names: Sequence[str], importance: Importance, masks: Masks
) -> dict[str, Any]:
    """All that resuming needs. `tensors` maps kind/parameter to a tensor; the rest is JSON."""
    tensors: dict[str, Tensor] = {_CUTOFF: masks.cutoff, "seen": importance.seen, "folded": importance.folded}
    tensors |= {f"accepted/{part}": accepted for part, accepted in enumerate(importance.accepted)}
    fixed = {} if masks.fixed is None else {"fixed": masks.fixed}
    for kind, states in (importance.tensors() | {"mask": masks.bits} | fixed).items():
        tensors |= {f"{kind}/{name}": t for name, t in zip(names, states, strict=True)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": _plain(config),
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
    saved = {plain_name(str(name)): tensor for name, tensor in _mapping(state, "tensors").items()}
    differences = [*_other_settings(state, own), *_other_tensors(saved, own["tensors"]), *_impossible(state, saved)]
    for kind in ("mask/", "fixed/"):
        names = [name for name in own["tensors"] if name.startswith(kind)]
        differences += _other_bits({name: saved.get(name) for name in names}, masks.sizes) if names else []
    if differences:
        raise ValueError("the saved pruner state does not fit this one:\n  " + "\n  ".join(differences))
    for name, tensor in own["tensors"].items():
        if name != _CUTOFF:
            tensor.copy_(saved[name])
    masks.load_state(state, saved[_CUTOFF])


def _other_settings(state: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    later = {name: value for name, value in _plain(PruneConfig()).items() if name in _LATER_OPTIONS}
    theirs, mine = later | dict(_mapping(state, "config")), own["config"]
    differing = [k for k in mine if theirs.get(k) != mine[k] and k not in _FREE_OPTIONS]
    yield from (f"{k}: {theirs.get(k)!r} there, {mine[k]!r} here" for k in differing)
    if (total := state.get("total_steps")) != own["total_steps"]:
        yield f"total_steps: {total} there, {own['total_steps']} here"


def _other_tensors(saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> Iterator[str]:
    if odd := sorted(set(saved) ^ set(own)):
        yield f"{len(odd)} states exist on one side only, {odd[0]} first"
    for name in sorted(set(saved) & set(own)):
        there, here = saved[name], own[name]
        if not isinstance(there, Tensor):
            yield f"{name}: no tensor"
        elif there.dtype != here.dtype or (name != _CUTOFF and there.shape != here.shape):
            yield f"{name}: {there.dtype} {tuple(there.shape)} there, {here.dtype} {tuple(here.shape)} here"


def _impossible(state: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    """What no pruner can have written."""
    tensors = {name: tensor for name, tensor in saved.items() if isinstance(tensor, Tensor)}
    if not _is_count(state.get("step")):
        yield f"step: {state.get('step')!r}"
    yield from (f"{k}: {state.get(k)!r}" for k in ("frozen", "masked") if not isinstance(state.get(k), bool))
    chosen_for = state.get("selected_for", "missing")
    if chosen_for is not None and not (
        isinstance(chosen_for, list) and len(chosen_for) > 1 and all(map(_is_count, chosen_for))
    ):
        yield f"selected_for: {chosen_for!r}"
    for name, tensor in tensors.items():
        counts = name.startswith("accepted/") and tensor.dtype == torch.float32
        if counts and not bool(((tensor >= 0) & (tensor.frac() == 0)).all()):
            yield f"{name}: {tensor.tolist()}"
    if _CUTOFF in tensors and tensors[_CUTOFF].dtype == torch.int64:
        cutoff, n = tensors[_CUTOFF], sum(name.startswith("mask/") for name in tensors)
        if cutoff.shape not in ((1, 2), (n, 2)):
            yield f"{_CUTOFF}: shape {tuple(cutoff.shape)}"
        elif not bool(((cutoff >= 0) & (cutoff[:, :1] <= ops.MAX_KEY + 1)).all()):
            yield f"{_CUTOFF}: {cutoff.tolist()[:3]}"


def _other_bits(bits: Mapping[str, Any], sizes: Sequence[int]) -> Iterator[str]:
    """Masks that keep weights behind the last one.

    Args:
        bits: packed masks by name, in order.
        sizes: weights of each.
    """
    for (name, mask), n in zip(bits.items(), sizes, strict=True):
        if not isinstance(mask, Tensor) or mask.dtype != torch.uint8 or mask.shape != (ops.mask_bytes(n),):
            continue  # told already
        if bool((mask[n // 8 + 1 :] != 0).any()) or (n % 64 and int(mask[n // 8]) >> n % 8):
            yield f"{name}: bits behind the last of its {n:,} weights are set"


def _plain(config: PruneConfig) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(config.to_dict()))


def _mapping(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = state.get(name)
    return value if isinstance(value, Mapping) else {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def write(path: Path, state: Mapping[str, Any], origin: Mapping[str, Any] | None = None) -> None:
    """Write what `gather` returned; `path` holds the old state or the new one, never a part."""
    data = {name: value for name, value in state.items() if name != "tensors"}
    tensor_file.write(path, FORMAT, data, state["tensors"], origin)


def read(path: Path, origin: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read and check what `write` wrote, see `tensor_file.read`."""
    data, tensors = tensor_file.read(path, FORMAT, origin)
    return (data if isinstance(data, dict) else {}) | {"tensors": tensors}
