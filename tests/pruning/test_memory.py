"""Bytes counted from shapes against bytes that are really there."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import allocated, storages
from models import Network, train
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from pins_ext import PruneConfig, Pruner, SelfRegularizer
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.memory import MOMENTS, OPTIMIZERS, memory, ranks_needed
from pins_ext.pruning.parameters import prunable_parameters


@pytest.mark.slow
@pytest.mark.parametrize(("small", "each"), [(False, 28.1), (True, 9.44)], ids=["float32", "8bit"])
def test_bytes_of_a_real_run_of_110_million_weights(small: bool, each: float) -> None:
    """All that torch holds after three steps with a mask, and nothing that was there before.

    each: bytes of a pruned weight, but for the teacher's; small: weights in bfloat16, everything else in 8 bits.
    """
    dtype, stored = (torch.bfloat16, "8bit") if small else (torch.float32, "float32")
    gc.collect()
    before = storages()
    with torch.device("meta"):
        shape = BertForSequenceClassification(BertConfig()).to(dtype)
    model = BertForSequenceClassification._from_config(BertConfig()).to(dtype)
    optimizer = PinsAdamW(model.parameters(), moment_dtype=stored)
    config = PruneConfig(warmup=0, cooldown=2, delta_t=1, state_dtype=stored)
    pruner = Pruner(model, optimizer, config, total_steps=3)
    regularizer = SelfRegularizer(model, teacher="latest", every=1)
    tokens = torch.arange(1, 9).reshape(1, 8)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        regularizer.step()
    gc.collect()
    there = sum(size for address, size in storages().items() if before.get(address) != size)
    pruned = prunable_parameters(shape, config)
    counted = memory(shape, set(pruned), config, teacher="latest", moment_dtype=stored)
    print(f"{there:,} bytes there, {counted.total:,} counted: {counted}")
    assert sum(p.numel() for p in model.parameters()) > 109e6
    assert counted.total == pytest.approx(there, rel=0.05)
    kinds = {
        "weights": [*model.parameters(), *model.buffers()],
        "gradients": [p.grad for p in model.parameters()],
        "moments": [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)],
        "statistics": [t for tensors in pruner.importance.tensors().values() for t in tensors],
        "masks": pruner.masks.bits,
    }
    for kind, tensors in kinds.items():
        assert getattr(counted, kind) == sum(t.nbytes for t in tensors), kind
    weights, n = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in pruned.values())
    shared = (counted.weights + counted.gradients + counted.moments) / weights
    assert shared + (counted.statistics + counted.masks) / n == pytest.approx(each, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "magnitude"},
        {"criterion": "movement"},
        {"criterion": "platon", "mask_policy": "strict"},
        {"beta2": 0.0},
        {"beta2": 1.0},
        {"state_dtype": "bfloat16"},
        {"state_dtype": "8bit"},
    ],
)
def test_every_criterion_keeps_what_is_counted(options: dict[str, Any]) -> None:
    model = Network().bfloat16()
    config = PruneConfig(warmup=1, cooldown=2, **options)
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), config, 10)
    counted = memory(model, pruner.names, config, optimizer="sgd")
    kept = [t for tensors in pruner.importance.tensors().values() for t in tensors]
    assert counted.statistics == sum(t.nbytes for t in kept)
    assert counted.masks == sum(t.nbytes for t in pruner.masks.bits)


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("2:4", {}),
        ("4:8", {"state_dtype": "8bit"}),
        ("4x1", {}),
        ("16x16", {"state_dtype": "bfloat16"}),
        ({"0.*": "2:4", "1.*": "16x16"}, {"scope": "layer"}),
    ],
    ids=str,
)
def test_what_patterns_ask_for_is_planned(pattern: Any, options: dict[str, Any]) -> None:
    """While a mask is chosen, on the way and at the end, beyond what other masks ask for."""
    model = nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 768), nn.Linear(768, 512))
    config = PruneConfig(sparsity=0.5, pattern=pattern, warmup=0, cooldown=2, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, config, 20)
    fits = dict(zip(pruner.names, pruner.masks.fits, strict=True))
    planned = pruner.plan()["pattern_bytes"]
    fixed = memory(model, pruner.names, config, fits=fits).selection - planned
    for tensors in pruner.importance.tensors().values():
        for t in tensors:
            if t.is_floating_point():
                t.uniform_()
    score = pruner.importance.score()
    most = 0
    for ratio in (0.8, 0.5):
        most = max(most, allocated(lambda ratio=ratio: pruner.masks.choose(score, ratio)))  # type: ignore[misc]
    print(f"{most:,} bytes there, {planned:,} planned, {fixed:,} for every selection")
    assert most <= planned + fixed
    assert most > 0.7 * planned


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "layer"},
        {"min_density": {"*": 0.1}},
        {"scope": "layer", "min_density": {"*": 0.1}},
        {"scope": {"first": ["0.*", "1.*", "2.*"]}, "max_density": {"*": 0.9}},
        {"scope": "layer", "ties": "reference"},
    ],
    ids=str,
)
def test_what_a_selection_asks_for_is_planned(options: dict[str, Any]) -> None:
    """By one threshold and by several, of which each has counts of its own."""
    model = nn.Sequential(*(nn.Linear(64, 128, bias=False) for _ in range(40)))
    config = PruneConfig(sparsity=0.5, warmup=0, cooldown=2, delta_t=1, **options)
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), config, 20)
    for tensors in pruner.importance.tensors().values():
        for t in tensors:
            t.uniform_()
    score, places = pruner.importance.score(), pruner.importance.layout
    planned = memory(model, pruner.names, config).selection
    # Work lists are there all the time.
    planned -= places.places.nbytes + places.chunks.nbytes
    asked = allocated(lambda: pruner.masks.choose(score, 0.7))
    print(f"{asked:,} bytes there, {planned:,} planned")
    assert asked <= 1.01 * planned
    if options:
        assert asked > 0.9 * planned


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_known_optimizer(name: str, tmp_path: Path) -> None:
    model = Network()
    # Stacks of matrices, too.
    model.experts = nn.Parameter(torch.zeros(3, 4, 5))
    optimizer: torch.optim.Optimizer
    own = {"adamw": PinsAdamW, "adamax": torch.optim.Adamax}
    if name in own:
        optimizer = own[name](model.parameters())
    else:
        args = TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to="none")
        optimizer = Trainer(model, args).create_optimizer()
    model.experts.grad = torch.ones(3, 4, 5)
    train(model, optimizer, 1, before=lambda: setattr(model.experts, "grad", torch.ones(3, 4, 5)))
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    assert memory(model, (), PruneConfig(), optimizer=name).moments == sum(t.nbytes for t in states)


@pytest.mark.parametrize("moment_dtype", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_moments_of_every_storage(dtype: torch.dtype, moment_dtype: str) -> None:
    model = Network().to(dtype)
    optimizer = PinsAdamW(model.parameters(), moment_dtype=moment_dtype)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    counted = memory(model, (), PruneConfig(), moment_dtype=moment_dtype)
    assert counted.moments == sum(t.nbytes for t in states)


def test_ranks_divide_what_is_sharded() -> None:
    model, config = Network(), PruneConfig()
    names = list(prunable_parameters(model, config))
    alone = memory(model, names, config)
    copies = memory(model, names, config, ranks=4, replicas=4)
    assert (copies.weights, copies.statistics, copies.buckets) == (alone.weights, alone.statistics, alone.gradients)
    cut = memory(model, names, config, ranks=4)
    assert cut.buckets == 0
    # 13 rows of four bytes each over four ranks: four rows on the first. 26 rows: seven. 3 rows: one.
    rows = {13: 4, 26: 7, 3: 1}
    assert cut.weights == sum(rows[p.shape[0]] * 4 * (p.shape[1] if p.dim() == 2 else 1) for p in model.parameters())
    hybrid = memory(model, names, config, ranks=8, replicas=2)
    assert dataclasses.replace(hybrid, selection=cut.selection) == cut
    narrow = Network().bfloat16()
    assert memory(narrow, names, config, teacher="ema").teacher == 3 * memory(narrow, names, config).weights
    assert ranks_needed(lambda n: n >= 5) == 8
    assert ranks_needed(lambda n: False) is None
    with pytest.raises(ValueError, match="8 ranks cannot hold 3 copies"):
        memory(model, names, config, ranks=8, replicas=3)
    with pytest.raises(ValueError, match="moment_dtype must be one of"):
        memory(model, names, config, moment_dtype="int4")
    with pytest.raises(ValueError, match="the size of muon's state is not known"):
        memory(model, names, config, optimizer="muon")


def test_gradients_that_are_freed_inside_backward_are_one_at_a_time() -> None:
    """Counted beside the most that were there at a time."""
    model, config = Network(), PruneConfig(warmup=1, cooldown=2)
    optimizer = PinsAdamW(model.parameters())
    optimizer.release_gradients()
    pruner = Pruner(model, optimizer, config, 10)
    most = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(q.grad.nbytes for q in model.parameters() if q.grad is not None))
        )
    for hook in [*optimizer.release._handles]:  # type: ignore[union-attr]
        hook.remove()
    optimizer.release_gradients()  # behind the hooks that look
    train(model, optimizer, 2)
    counted = memory(model, pruner.names, config, release=True)
    assert counted.gradients == max(most) == max(p.nbytes for p in model.parameters())
    assert counted.moments == memory(model, pruner.names, config).moments
    frozen = memory(model, pruner.names, config, frozen_base=True)
    assert (frozen.moments, frozen.statistics) == (0, counted.statistics)
    assert frozen.gradients == max(p.nbytes for p in pruner.parameters)
    with pytest.raises(ValueError, match="of one process, not of 2 ranks"):
        memory(model, pruner.names, config, release=True, ranks=2)


def test_frozen_parameters_have_no_gradient_and_no_moments() -> None:
    model = Network().requires_grad_(False)
    model.layers[0].requires_grad_(True)
    learning = sum(p.nbytes for p in model.layers[0].parameters())
    counted = memory(model, (), PruneConfig())
    assert (counted.gradients, counted.moments) == (learning, 2 * learning)
