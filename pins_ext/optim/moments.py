"""Moments of a checkpoint: loaded into another storage, and written as torch.optim writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pins_ext import ops
from pins_ext.distributed.shards import check_codes, is_dtensor, like, local, shard_of


def take_loaded(given: list[dict[str, Any]], optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """Keep what is loaded; refuse, before anything changes, 8-bit moments that are not the parameter's."""
    given.append(loaded)
    saved = [i for group in loaded["param_groups"] for i in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved, own, strict=False):  # torch's own check of their number follows
        for name, value in loaded["state"].get(i, {}).items():
            if isinstance(value, Tensor) and value.dtype in ops.CODED and not ops.is_coded(value, p.shape):
                raise ValueError(
                    f"state[{i}][{name!r}] is {tuple(value.shape)} in 8 bits, and {ops.coded_shape(p.shape)} for a "
                    f"parameter of shape {tuple(p.shape)}: another parameter's, or an earlier version's"
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
        return moment.to(p.device)
    # A whole moment of a sharded parameter stays whole, as torch.optim's does.
    shard = shard_of("p", p) if is_dtensor(moment) else None
    part = local(moment)
    if part.dtype in ops.CODED:
        part = ops.decode(part, local(p).shape if is_dtensor(moment) else p.shape)
    coded = dtype in ops.CODED
    part = ops.encode(part, dtype, shard).to(p.device) if coded else part.to(p.device, dtype)
    return like(p, part, coded) if is_dtensor(moment) else part


def exported_state(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as torch.optim writes it: without its skipped steps, and none if there was no other."""
    if "step" not in state:
        return state
    step = float(state["step"]) - float(state.get("skipped", 0))
    moments = {name: value for name, value in state.items() if name not in ("step", "skipped")}
    # No step but skipped ones: torch's have no state then.
    return {"step": torch.tensor(step), **moments} if step > 0 or "skipped" not in state else {}
