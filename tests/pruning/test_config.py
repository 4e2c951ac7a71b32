"""Values that a configuration takes in, and the plain data it gives out."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from models import Network
from torch import Tensor

import pins_ext
from pins_ext import PruneConfig, Pruner


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
    with pytest.raises(ValueError, match="sparsity must be a number in"):
        PruneConfig(sparsity=np.float64(1.5))


@pytest.mark.parametrize(
    ("field", "value", "accepts"),
    [
        ("seed", "x", "an integer"),
        ("seed", 1.5, "an integer"),
        ("mask_optimizer_state", "no", "True or False"),
        ("include", (5,), "name patterns"),
        ("include", 5, "name patterns"),
        ("exclude", {"a": 1}, "name patterns"),
        ("sparsity", "0.8", r"a number in \[0, 1\); got '0.8'"),
        ("sparsity", None, "a number"),
        ("sparsity", True, "a number"),
        ("sparsity", 80, r"a number in \[0, 1\) \(80 % is 0.8\); got 80"),
        ("sparsity", math.nan, "a number"),
        ("initial_sparsity", "0", "a number between 0 and sparsity"),
        ("beta1", "x", "a number"),
        ("beta2", [1], "a number"),
        ("delta_t", True, "an integer"),
        ("delta_t", 2.0, "an integer"),
        ("warmup", "1", "a number of steps"),
        ("cooldown", math.inf, "a number of steps"),
        ("scope", 5, "auto, global, layer, or groups"),
        ("scope", {"a": (3,)}, "name patterns"),
        ("scope", {3: "a"}, "name patterns"),
        ("min_density", "x", "a number"),
        ("min_density", {"a": "b"}, "a number"),
        ("max_density", {3: 0.1}, "name patterns"),
        ("ties", len, "one of exact, reference"),
        ("state_dtype", [5], "one of float32, bfloat16"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_at_once(field: str, value: Any, accepts: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}.* must be {accepts}"):
        PruneConfig(**{field: value})


def test_help_of_the_class_explains_every_field() -> None:
    text = " ".join((PruneConfig.__doc__ or "").split())
    for option in dataclasses.fields(PruneConfig):
        assert f" {option.name}: {option.metadata['help']}." in text
    assert "a new mask is chosen at its end. Default: 10. schedule:" in text


def test_a_signed_criterion_is_named_when_8_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="float32 or bfloat16 for criterion='movement', whose scores"):
        PruneConfig(criterion="movement", state_dtype="8bit")
    with pytest.raises(ValueError, match="for criterion='<product>', whose scores"):
        PruneConfig(criterion=product, state_dtype="8bit")


@pytest.mark.parametrize("cooldown", [0, 1, 2])
@pytest.mark.parametrize("schedule", ["cubic", "one-shot", "constant"])
def test_a_cooldown_without_a_step_at_the_final_sparsity_is_warned_of(cooldown: int, schedule: str) -> None:
    model = Network(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Pruner(model, optimizer, PruneConfig(schedule=schedule, warmup=2, cooldown=cooldown, delta_t=2), 20)
    told = any(f"a cool-down of {cooldown} steps has none at the final" in str(warning.message) for warning in caught)
    assert told == (cooldown < 2 and schedule != "constant")


def test_a_plan_counts_the_masks_that_prune() -> None:
    def masks(**options: Any) -> int:
        model = Network(16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = PruneConfig(warmup=2, cooldown=4, delta_t=2, **options)
        return int(Pruner(model, optimizer, config, 20).plan()["masks"])

    assert masks() == masks(schedule="one-shot", initial_sparsity=0.1) == 7
    assert masks(schedule="one-shot") == 0


def test_arguments_in_another_order_are_named() -> None:
    model = Network(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"config must be a PruneConfig, got SGD: Pruner\(model, optimizer, config"):
        Pruner(model, PruneConfig(), optimizer, total_steps=9)  # type: ignore[arg-type]


def test_the_package_lists_what_it_imports_late() -> None:
    assert {"Pruner", "PruneConfig", "optim", "save_sparse"} <= set(dir(pins_ext))
