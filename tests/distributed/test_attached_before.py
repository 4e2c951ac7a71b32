"""A pruner that was there before fully_shard: it follows where the optimizer did, and says so where it did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from models import Network
from ranks import run
from sharded import CONFIG, OPTIMIZERS, STEPS, digest, inject, masks, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pins_ext import PruneConfig, Pruner

pytestmark = pytest.mark.slow


def cut(model: Any) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def trained(name: str, when: str, follows: bool) -> dict[str, Any]:
    """Train; the model is cut never | before the first step | after some steps, the optimizer made before it.

    follows: whether the optimizer is given the new parameters, as accelerate does it.
    """
    model: nn.Module = Network()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, optimizer, PruneConfig(**CONFIG), STEPS)
    told: dict[str, Any] = {"masks": []}
    for step in range(STEPS):
        if step == {"never": None, "first": 0, "later": 8}[when]:
            places = {id(p): n for n, p in model.named_parameters()}
            cut(model)
            new = dict(model.named_parameters())
            if follows:
                for group in optimizer.param_groups:
                    group["params"] = [new[places[id(p)]] for p in group["params"]]
        inject(model, step)
        try:
            optimizer.step()
        except RuntimeError as error:
            return {"said": f"step {step}: {error}"}
        told["masks"].append(masks(pruner))
    try:
        told["final"] = pruner.finalize()
    except RuntimeError as error:
        return {"said": f"at the end: {error}"}
    return told | {"weights": digest(whole(p) for p in model.parameters())}


def several() -> dict[tuple[str, str, bool], dict[str, Any]]:
    cases = [("first", True), ("first", False), ("later", True), ("later", False)]
    return {(name, *case): trained(name, *case) for name in ("PinsAdamW", "AdamW") for case in cases}


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, str, bool], dict[str, Any]]]:
    return run(2, several)


@pytest.mark.parametrize("name", ["PinsAdamW", "AdamW"])
def test_it_follows_an_optimizer_that_was_given_the_new_parameters(ranks: Any, name: str) -> None:
    alone = trained(name, "never", False)
    assert len(set(alone["masks"])) > 4
    for told in ranks:
        assert told[name, "first", True] == alone


@pytest.mark.parametrize("name", ["PinsAdamW", "AdamW"])
def test_an_optimizer_of_the_old_parameters_is_refused_by_name(ranks: Any, name: str) -> None:
    for told in ranks:
        said = told[name, "first", False]["said"]
        assert said.startswith("step 0: layers.0.attention.self.weight was replaced in the model")
        assert "build optimizer and Pruner after the model is sharded" in said


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("name", ["PinsAdamW", "AdamW"])
def test_a_model_that_is_cut_within_training_is_refused_by_name(ranks: Any, name: str, follows: bool) -> None:
    for told in ranks:
        said = told[name, "later", follows]["said"]
        assert said.startswith("at the end: verification failed")
        assert "layers.0.attention.self.weight is no longer the parameter this Pruner was given" in said
        assert "sharded" in said
