"""Moments of a checkpoint: loaded into another storage, and written as torch.optim writes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pins_ext import ops
from pins_ext.distributed.shards import check_codes, is_dtensor, like, local, shard_of


def take_loaded(
    given: list[dict[str, Any]], names: Collection[str], optimizer: Optimizer, loaded: dict[str, Any]
) -> None:
    """Keep what is loaded; refuse, before anything changes, moments of these names that are not the parameter's."""
    given.append(loaded)
    saved = [i for group in loaded["param_groups"] for i in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved, own, strict=False):  # torch's own check of their number follows
        state = loaded["state"].get(i, {})
        missing = sorted(name for name in names if not isinstance(state.get(name), Tensor))
        if missing and len(missing) < len(names):
            found = min({*names} - {*missing})
            raise ValueError(f"state[{i}] has no {missing[0]!r}, which goes with {found!r}: the state is not complete")
        for name, value in state.items():
            if not isinstance(value, Tensor) or ops.is_coded(value, p.shape):
                continue
            if value.dtype in ops.CODED:
                raise ValueError(
                    f"state[{i}][{name!r}] is {tuple(value.shape)} in 8 bits, and {ops.coded_shape(p.shape)} for a "
                    f"parameter of shape {tuple(p.shape)}: another parameter's, or an earlier version's"
                )
            if name in names and value.shape != p.shape:
                raise ValueError(
                    f"state[{i}][{name!r}] has shape {tuple(value.shape)}, and the parameter {tuple(p.shape)}: it is "
                    "another parameter's; are the parameters in the order in which they were saved?"
                )


def loaded_moments(optimizer: Optimizer, loaded: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Each parameter, with the moments that a loaded state_dict has for it by name."""
    saved = [i for group in loaded["param_groups"] for i in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved, own, strict=True):
        state = {name: x for name, x in loaded["state"].get(i, {}).items() if name != "step" and isinstance(x, Tensor)}
        yield p, {name: x for name, x in state.items() if x.shape == p.shape or ops.is_coded(x, p.shape)}


def converted_moment(moment: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """A loaded moment of a parameter, in this storage."""
    if dtype in ops.CODED:
        check_codes("moment_dtype='8bit'", f"a parameter of shape {tuple(p.shape)}", p)
    if moment.dtype == dtype:
        return moment.to(p.device).contiguous()
    # A whole moment of a sharded parameter stays whole, as torch.optim's does.
    shard = shard_of("p", p) if is_dtensor(moment) else None
    part = local(moment)
    if part.dtype in ops.CODED:
        part = ops.decode(part, local(p).shape if is_dtensor(moment) else p.shape)
    coded = dtype in ops.CODED
    part = ops.encode(part, dtype, shard).to(p.device) if coded else part.to(p.device, dtype).contiguous()
    return like(p, part, coded) if is_dtensor(moment) else part


def exported_states(states: Mapping[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """States as torch.optim writes them: without their skipped steps, and none of a parameter that has no other.

    A device is waited for once, however many parameters count their steps on it.

    Args:
        states: of each parameter, by its key in a state_dict.
    """
    counted = {key: state for key, state in states.items() if "step" in state}
    steps, skipped = (_numbers([s.get(name, 0.0) for s in counted.values()]) for name in ("step", "skipped"))
    exported = {key: state for key, state in states.items() if state and key not in counted}
    for (key, state), step, left_out in zip(counted.items(), steps, skipped, strict=True):
        # No step but skipped ones: torch's have no state then.
        if step > left_out or "skipped" not in state:
            moments = {name: value for name, value in state.items() if name not in ("step", "skipped")}
            exported[key] = {"step": torch.tensor(step - left_out, device="cpu"), **moments}
    return {key: exported[key] for key in states if key in exported}


def _numbers(values: Sequence[float | Tensor]) -> list[float]:
    found = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    places: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            places.setdefault(value.device, []).append(i)
    for there in places.values():
        numbers = torch.stack([torch.as_tensor(values[i]).double().reshape(()) for i in there]).tolist()
        for i, number in zip(there, numbers, strict=True):
            found[i] = number
    return found
