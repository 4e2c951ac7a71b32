"""Inside DistributedDataParallel or torch.compile a model is pruned, saved and loaded by its own names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import CONFIG, STEPS, Network, batches, same
from torch import nn

import pins_ext
from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW
from pins_ext.regularization.self_regularizer import SelfRegularizer


@pytest.fixture
def group() -> Iterator[None]:
    """One process that is a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(kind: str, model: Network) -> nn.Module:
    if kind == "plain":
        return model
    compiled: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return nn.parallel.DistributedDataParallel(model) if kind == "parallel" else compiled


KINDS = ["plain", "parallel", "compiled"]


def trained(kind: str, path: Path) -> tuple[Network, Pruner]:
    """With a teacher, by whose task gradients the pruner scores."""
    model = Network(16, classes=16)
    outer = wrapped(kind, model)
    optimizer = PinsAdamW(outer.parameters(), lr=1e-2)
    pruner = Pruner(outer, optimizer, CONFIG, STEPS)
    reg = SelfRegularizer(outer, every=5, weight=1.0, score_gradient="task", head="classification")
    pruner.score_gradients = reg.take_task_gradients
    for step, (x, y) in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        reg({"logits": outer(x)}, {"x": x, "labels": y}).backward()
        optimizer.step()
        reg.step()
        if step == 20:
            pruner.save(path / f"{kind}.safetensors")
    pruner.finalize()
    return model, pruner


def test_masks_weights_and_files_are_those_of_the_model_inside(group: None, tmp_path: Path) -> None:
    runs = {kind: trained(kind, tmp_path) for kind in KINDS}
    for kind, (model, pruner) in runs.items():
        assert same(model, runs["plain"][0]), kind
        assert pruner.names == runs["plain"][1].names
        assert pruner.model is model
        for other in KINDS:
            pruner.load(tmp_path / f"{other}.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_and_sparse_files_name_the_model_inside(group: None, kind: str, tmp_path: Path) -> None:
    model = Network(16)
    outer = wrapped(kind, model)
    config = PruneConfig(exclude=("layers.0*",), min_density={"layers.1*": 0.5}, sparsity=0.4)
    pruner = Pruner(outer, torch.optim.SGD(outer.parameters(), lr=0.1), config, STEPS)
    assert not [name for name in pruner.names if not name.startswith("layers.1")]
    pins_ext.save_sparse(outer, tmp_path / "sparse")
    again = Network(16)
    pins_ext.load_sparse(tmp_path / "sparse", model=wrapped(kind, again))
    assert same(model, again)
    found = pins_ext.prune_once(outer, [], PruneConfig(criterion="magnitude", sparsity=0.5))
    assert not [name for name in found.per_layer if name.startswith("module")]


def test_gradients_of_other_names_are_refused() -> None:
    model = Network(16)
    optimizer = PinsAdamW(model.parameters())
    pruner = Pruner(model, optimizer, CONFIG, STEPS)
    pruner.score_gradients = lambda: {"module.embed.weight": torch.zeros(1)}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match=r"names none of the pruned parameters: 'module.embed.weight' is none"):
        optimizer.step()
