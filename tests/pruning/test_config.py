"""Values that a configuration takes in, and the plain data it gives out."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pins_ext import PruneConfig


def product(p: Tensor, g: Tensor, lr: float, factor: float = 1.0, power: Any = None) -> Tensor:
    """A criterion with settings of its own."""
    return (p * g).abs() * factor


class Ramp:
    """A schedule, and a criterion, that is an object."""

    def __call__(self, step: int) -> float:
        return 1.0 / (1 + step)

    def score(self, p: Tensor, g: Tensor, lr: float) -> Tensor:
        """The product."""
        return product(p, g, lr)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: product, "<product>"),
        (Ramp, "<Ramp>"),
        (lambda: Ramp().score, "<Ramp.score>"),
        (
            lambda: functools.partial(product, factor=2.0, power=math.sqrt),
            "<partial(product, factor=2.0, power=sqrt)>",
        ),
        (lambda: functools.partial(functools.partial(product, factor=2.0), power=Ramp()), None),
    ],
)
def test_callables_have_the_same_name_in_every_process(make: Any, name: str | None) -> None:
    first, second = make(), make()
    config = PruneConfig(criterion=first, schedule=first).to_dict()
    assert config == PruneConfig(criterion=second, schedule=second).to_dict()
    assert config["criterion"] == config["schedule"]
    assert " at 0x" not in config["criterion"]
    assert name is None or config["criterion"] == name


def test_the_arguments_of_a_partial_count() -> None:
    names = {PruneConfig(criterion=functools.partial(product, factor=f)).to_dict()["criterion"] for f in (1.0, 2.0)}
    assert len(names) == 2


@pytest.mark.parametrize("scalar", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_scalars_of_numpy_and_torch_become_pythons(scalar: Any) -> None:
    options = {"sparsity": 0.75, "delta_t": 5, "warmup": 3, "seed": 7, "beta2": 0.5, "mask_optimizer_state": True}
    config = PruneConfig(**{k: scalar(v) for k, v in options.items()}, min_density={"*": scalar(0.125)})
    assert config == PruneConfig(**options, min_density={"*": 0.125})
    assert json.loads(json.dumps(config.to_dict()))["seed"] == 7
    assert [type(getattr(config, k)) for k in options] == [type(v) for v in options.values()]


def test_numpys_own_scalar_types_are_taken() -> None:
    config = PruneConfig(sparsity=np.float32(0.5), seed=np.int64(3), delta_t=np.int32(4), criterion=np.str_("platon"))
    assert config == PruneConfig(sparsity=0.5, seed=3, delta_t=4, criterion="platon")
    json.dumps(config.to_dict())
    with pytest.raises(ValueError, match="sparsity must be in"):
        PruneConfig(sparsity=np.float64(1.5))
