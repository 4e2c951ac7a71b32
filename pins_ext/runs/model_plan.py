"""What training would take for a model that is not loaded: what is pruned, bytes per rank, what fits on which GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import torch
from torch import nn

from pins_ext.integrations.meta import meta_model
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.memory import Memory, memory, ranks_needed
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.pruning.patterns import fitted
from pins_ext.pruning.plan import pattern_sizes
from pins_ext.pruning.scopes import Scopes
from pins_ext.regularization.teacher import POLICIES
from pins_ext.runs.errors import UsageError
from pins_ext.runs.request import Request

GPUS = (24, 48, 80, 141)
"""Memory of common GPUs, in GB of 1e9 bytes."""

_KINDS = {
    "weights": "parameters and buffers",
    "gradients": "one per parameter that learns",
    "buckets": "copies of the gradients, of DistributedDataParallel",
    "moments": "the optimizer's state",
    "statistics": "importance of the pruned weights",
    "masks": "a bit per pruned weight",
    "teacher": "self-regularization",
    "selection": "counts, candidates, work lists",
}


def model_plan(request: Request, pruning: PruneConfig, ranks: int, replicas: int) -> str:
    """A page to read; takes seconds for any size of model.

    Args:
        request: names the model, its dtype, the optimizer and the teacher.
        pruning: what is pruned and how.
        ranks: see pins_ext.pruning.memory.memory.
        replicas: see there too.

    Raises:
        UsageError: there is no such model, or something about it that training would refuse.
    """
    source = request.run.model
    assert source is not None
    try:
        model = meta_model(source, getattr(torch, request.run.dtype))
        pruned = prunable_parameters(model, pruning)
        fits, misfits = fitted(model, pruned, pruning)
        scopes = Scopes(list(pruned), [p.numel() for p in pruned.values()], pruning, fits)
        fixed = {
            "optimizer": _optimizer(request),
            "moment_dtype": request.run.moment_dtype,
            "teacher": _teacher(request),
        }

        def split(ranks: int, replicas: int) -> Memory:
            return memory(model, set(pruned), pruning, ranks=ranks, replicas=replicas, **fixed)

        asked = split(ranks, replicas)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"--model {source}: {' '.join(str(error).split())}") from error
    needed = {gb: ranks_needed(lambda n, gb=gb: split(n, 1).total <= gb * 1e9) for gb in GPUS}  # type: ignore[misc]
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
        *_notes(request, fixed["teacher"], ranks > replicas),
    ]
    if ranks > replicas or any(n and n > 1 for n in needed.values()):
        lines.append(f"note      FSDP gathers a block at a time: the largest is {_gb(largest_block(model))}")
    return "\n".join(lines)


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
    kinds = {kind: size for kind, size in asdict(asked).items() if size}
    width = max(len(_gb(asked.total)), 9)
    head = f"memory    {where}:"
    rows = [f"          {kind:<11}{_gb(size):>{width}}  {_KINDS[kind]}" for kind, size in kinds.items()]
    return [head, *rows, f"          {'together':<11}{_gb(asked.total):>{width}}"]


def _fits(total: int, needed: Mapping[int, int | None], shards: int) -> Iterable[str]:
    for size, ranks in needed.items():
        room = size * 1e9 - total
        answer = f"yes, {room / 1e9:.1f} GB left" if room >= 0 else "no"
        if ranks and (room < 0 or ranks < shards):
            answer += f"; one copy of the model {'on 1 rank' if ranks == 1 else f'over {ranks} ranks'} does"
        yield f"{size:>4} GB  {answer}"


def _notes(request: Request, teacher: str, sharded: bool) -> Iterable[str]:
    """What training on several ranks does with these flags that a reader of the numbers may not expect."""
    if sharded and teacher in POLICIES and teacher != "none":
        yield f"note      --teacher {teacher} copies whole weights, which sharded ranks don't have: --teacher none"
    wide = request.training.get("bf16") or request.training.get("fp16")
    if sharded and wide and request.run.dtype != "float32":
        yield "note      with --bf16 or --fp16 accelerate keeps FSDP's weights in float32: plan with --dtype float32"
    if "8bit" in (request.run.moment_dtype, request.pruning.state_dtype if request.pruning else None):
        yield "note      8 bits run on the CPU so far: on a GPU they are refused"


def _range(column: tuple[int, ...]) -> str:
    values = sorted(set(column))
    if len(values) == 1:
        return str(values[0])
    whole = values == list(range(values[0], values[-1] + 1))
    return f"{{{values[0]}..{values[-1]}}}" if whole else "{" + ",".join(map(str, values)) + "}"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
