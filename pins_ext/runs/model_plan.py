"""What training would take for a model that is not loaded: what is pruned, bytes per rank, what fits on which GPU."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from pins_ext.integrations.meta import meta_model
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.frozen import base_config
from pins_ext.pruning.kept import moves_states
from pins_ext.pruning.memory import Memory, memory, ranks_needed
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.pruning.patterns import fitted
from pins_ext.pruning.plan import pattern_sizes
from pins_ext.pruning.scopes import Scopes
from pins_ext.runs.adapters import adapter_shapes
from pins_ext.runs.errors import UsageError
from pins_ext.runs.request import Request

GPUS = (24, 48, 80, 141)
"""Memory of common GPUs, in GB of 1e9 bytes."""

_KINDS = {
    "weights": "parameters and buffers",
    "gradients": "of the parameters that learn; freed inside backward: the largest",
    "buckets": "copies of the gradients, of DistributedDataParallel",
    "moments": "the optimizer's state",
    "statistics": "importance of the pruned weights",
    "masks": "a bit per pruned weight",
    "teacher": "self-regularization",
    "selection": "counts, candidates, work lists",
    "adapters": "weights, gradients and moments of what learns",
}


def model_plan(request: Request, pruning: PruneConfig, ranks: int, replicas: int, frozen_base: bool = False) -> str:
    """A page to read; takes seconds for any size of model.

    Args:
        request: names the model, its dtype, the optimizer and the teacher.
        pruning: what is pruned and how.
        ranks: see pins_ext.pruning.memory.memory.
        replicas: see there too.
        frozen_base: the model is frozen below adapters, and pruned.

    Raises:
        UsageError: there is no such model, or something about it that training would refuse.
    """
    source = request.run.model
    assert source is not None
    try:
        model = meta_model(source, getattr(torch, request.run.dtype))
        pruning = base_config(pruning) if frozen_base else pruning
        pruned = prunable_parameters(model, pruning)
        fits, misfits = fitted(model, pruned, pruning)
        scopes = Scopes(list(pruned), [p.numel() for p in pruned.values()], pruning, fits)
        fixed: dict[str, Any] = {
            "optimizer": _optimizer(request),
            "moment_dtype": request.run.moment_dtype,
            "teacher": _teacher(request),
            "release": request.run.release_gradients,
            "frozen_base": frozen_base,
            "adapters": adapter_shapes(model, request.adapters, pruning),
        }
        alone = fixed["release"] or frozen_base or moves_states(pruning)

        def split(ranks: int, replicas: int) -> Memory:
            patterns = dict(zip(pruned, fits, strict=True))
            return memory(model, set(pruned), pruning, ranks=ranks, replicas=replicas, fits=patterns, **fixed)

        asked = split(ranks, replicas)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"--model {source}: {' '.join(str(error).split())}") from error
    limit = 1 if alone else 4096
    needed = {gb: ranks_needed(lambda n, gb=gb: split(n, 1).total <= gb * 1e9, limit) for gb in GPUS}  # type: ignore[misc]
    weights, n_pruned = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in pruned.values())
    lines = [
        f"model     {type(model).__name__}, {weights:,} weights, {request.run.dtype}; from its config.json alone",
        f"pruned    {n_pruned:,} weights in {len(pruned)} tensors ({n_pruned / weights:.1%} of the model)",
        *(f"          {line}" for line in gathered({name: tuple(p.shape) for name, p in pruned.items()})),
        *(f"pattern   {name}: {count:,} weights in {n} tensors" for name, (n, count) in pattern_sizes(pruned, fits)),
        f"zeros     {sum(scopes.n_prune(1 - pruning.sparsity)):,} at the end",
        *(f"note      {note}" for note in misfits),
        "",
        *_bytes(asked, n_pruned, _spread(ranks, replicas)),
        "",
        "fits      before activations, gathered blocks and what the libraries keep for themselves:",
        *(f"          {line}" for line in _fits(asked.total, needed, ranks // replicas)),
        "",
        *set_ups(model.to(torch.bfloat16), set(pruned), pruning),
        *_mixed_precision(request, model, ranks > replicas),
        *_notes(request),
    ]
    if ranks > replicas or any(n and n > 1 for n in needed.values()):
        lines.append(f"note      FSDP gathers a block at a time: the largest is {_gb(largest_block(model))}")
    return "\n".join(lines)


def set_ups(model: nn.Module, pruned: Collection[str], pruning: PruneConfig) -> list[str]:
    """What less memory can be had for: bytes of the whole model on one rank, without a teacher, and where they fit.

    Args:
        model: in bfloat16.
        pruned: names of what is pruned.
        pruning: replaced in what each set-up says.
    """
    small: dict[str, Any] = {"moment_dtype": "8bit"}
    at_once: dict[str, Any] = {"delta_t": 1, "importance_every": 1}
    ways: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("bfloat16 moments and statistics", {"state_dtype": "bfloat16"}, {"moment_dtype": "bfloat16"}),
        ("8-bit moments and statistics", {"state_dtype": "8bit"}, small),
        ("  and --release-gradients", {"state_dtype": "8bit"}, small | {"release": True}),
        ("8-bit moments, --state-device cpu", {"state_device": "cpu"}, small),
        ("--criterion fisher, 8-bit moments", {"criterion": "fisher"}, small),
        ("  and --release-gradients", {"criterion": "fisher"}, small | {"release": True}),
        ("frozen base below LoRA, 8 bits", {"criterion": "platon", "state_dtype": "8bit"}, {"frozen_base": True}),
        ("  and --delta-t 1", {"criterion": "platon", "state_dtype": "8bit"} | at_once, {"frozen_base": True}),
    ]
    weights = sum(p.numel() for p in model.parameters())
    lines = ["set-ups   of bfloat16 weights on one rank, without self-regularization:"]
    for name, options, rest in ways:
        own = dataclasses.replace(pruning, **({"criterion": "pins", "regrow": "never", "state_device": None} | options))
        total = memory(model, pruned, own, **rest).total
        fits = next((f"fits {gb} GB" for gb in GPUS if total <= gb * 1e9), "fits none")
        lines.append(f"          {name:<38}{_gb(total):>11}  {total / weights:5.2f} B a weight  {fits}")
    return lines


def _mixed_precision(request: Request, model: nn.Module, sharded: bool) -> Iterable[str]:
    """What accelerate's mixed precision adds to the numbers above."""
    wide = next((name for name in ("bf16", "fp16") if request.training.get(name)), None)
    if wide is None:
        return
    if sharded and request.run.dtype != "float32":
        yield "note      with --bf16 or --fp16 accelerate keeps FSDP's weights in float32: plan with --dtype float32"
    if not sharded and request.run.dtype == "float32":
        copies = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        yield (
            f"note      with --{wide} autocast adds a 16-bit copy of each linear weight from its use in the forward to "
            f"that in backward: up to {_gb(copies)}"
        )


def gathered(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Lines for tensors that differ in nothing but the numbers in their names: `layers.{0..31}.mlp.weight`."""
    alike: dict[tuple[str, tuple[int, ...]], list[list[int]]] = {}
    for name, shape in shapes.items():
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        alike.setdefault((re.sub(r"\d+", "#", name), shape), []).append(numbers)
    lines = []
    for (pattern, shape), found in alike.items():
        name = pattern
        for column in zip(*found, strict=True):
            name = name.replace("#", _range(column), 1)
        lines.append(f"{name}  {shape}" + (f"  x {len(found)}" if len(found) > 1 else ""))
    return lines


def largest_block(model: nn.Module) -> int:
    """Bytes of the largest of the parts that FSDP gathers at a time: a block of a module list, or all the rest."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(m) for module in lists for m in module.modules() if m is not module}
    blocks = [block for module in lists if id(module) not in inner for block in module]
    within = {id(p) for block in blocks for p in block.parameters()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in within)
    return max([rest, *(sum(p.nbytes for p in block.parameters()) for block in blocks)])


def _optimizer(request: Request) -> str:
    return str(request.run.optimizer)


def _teacher(request: Request) -> str:
    return request.regularizer.teacher if request.regularizes else "none"


def _spread(ranks: int, replicas: int) -> str:
    if ranks == 1:
        return "on one rank"
    if ranks == replicas:
        return f"on each of {ranks} ranks, every rank with the whole model (DDP)"
    copies = (
        "one copy of the model" if replicas == 1 else f"{replicas} copies of the model, {ranks // replicas} ranks each"
    )
    return f"on each of {ranks} ranks, {copies} ({'FSDP' if replicas == 1 else 'HSDP'})"


def _bytes(asked: Memory, n_pruned: int, where: str) -> list[str]:
    kinds = {kind: size for kind, size in asdict(asked).items() if size and kind != "host"}
    width = max(len(_gb(asked.total)), 9)
    head = f"memory    {where}:"
    rows = [f"          {kind:<11}{_gb(size):>{width}}  {_KINDS[kind]}" for kind, size in kinds.items()]
    together = f"          {'together':<11}{_gb(asked.total):>{width}}"
    on_host = f"          {'on the host':<11}{_gb(asked.host):>{width}}  statistics, two buffers, masks, selection"
    return [head, *rows, together, *([on_host] if asked.host else [])]


def _fits(total: int, needed: Mapping[int, int | None], shards: int) -> Iterable[str]:
    for size, ranks in needed.items():
        room = size * 1e9 - total
        answer = f"yes, {room / 1e9:.1f} GB left" if room >= 0 else "no"
        if ranks and (room < 0 or ranks < shards):
            answer += f"; one copy of the model {'on 1 rank' if ranks == 1 else f'over {ranks} ranks'} does"
        yield f"{size:>4} GB  {answer}"


def _notes(request: Request) -> Iterable[str]:
    """What training with these flags does that a reader of the numbers may not expect."""
    yield from (f"note      {note}" for note in request.notes)
    if "8bit" in (request.run.moment_dtype, request.pruning.state_dtype if request.pruning else None):
        yield "note      8 bits on a GPU have run as emulated PTX alone so far, never on a GPU"


def _range(column: tuple[int, ...]) -> str:
    values = sorted(set(column))
    if len(values) == 1:
        return str(values[0])
    whole = values == list(range(values[0], values[-1] + 1))
    return f"{{{values[0]}..{values[-1]}}}" if whole else "{" + ",".join(map(str, values)) + "}"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
