"""A sparse model that is pruned further: its zeros stay, whatever the optimizer, the policy and the masks do."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from models import STEPS, Network, exact, same, train, zeros
from torch import Tensor, nn

from pins_ext import PruneConfig, Pruner
from pins_ext.criteria import CRITERIA
from pins_ext.optim import PinsAdamW, PinsSGD

CONFIG = PruneConfig(sparsity=0.8, delta_t=5, warmup=5, cooldown=20)
TRAINED = [name for name, rule in CRITERIA.items() if not rule.reads_inputs]


def product(p: torch.Tensor, g: torch.Tensor, lr: float) -> torch.Tensor:
    return (p * g).abs()


def sparse(share: float = 0.5, uneven: bool = False) -> Network:
    """A network whose blocks have zeros at random places."""
    model = Network(16, classes=16)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.layers.named_parameters():
            if p.dim() == 2:
                here = share if not uneven or "intermediate" in name else 0.1
                p[torch.rand(p.shape, generator=generator) < here] = 0
    return model


def places(pruner: Pruner) -> list[Tensor]:
    return [p.detach() == 0 for p in pruner.parameters]


def run(
    config: PruneConfig, optimizer_class: Any = PinsAdamW, model: nn.Module | None = None, **options: Any
) -> tuple[Any, Any, Pruner]:
    model = model or sparse()
    optimizer = optimizer_class(model.parameters(), **({"lr": 3e-2} | options))
    return model, optimizer, Pruner.from_sparse(model, optimizer, config, total_steps=STEPS)


@pytest.mark.parametrize("policy", ["reference", "strict"])
@pytest.mark.parametrize("optimizer_class", [PinsAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("criterion", TRAINED)
def test_the_zeros_of_the_start_stay_and_count(criterion: str, optimizer_class: Any, policy: str) -> None:
    config = PruneConfig(criterion=criterion, sparsity=0.8, delta_t=5, warmup=5, cooldown=20, mask_policy=policy)
    model, optimizer, pruner = run(config, optimizer_class)
    start = places(pruner)
    n_start = sum(int(there.sum()) for there in start)
    assert pruner.masks.scopes.n_prune(pruner.schedule.remaining_ratio(0)) == [n_start]
    pruned: list[int] = []
    zeros_between: list[int] = []

    def check() -> None:
        for there, name, p in zip(start, pruner.names, pruner.parameters, strict=True):
            assert not p[there].any()
            assert not pruner.mask(name)[there].any()
        pruned.append(sum(pruner.masks.pruned()))
        zeros_between.append(zeros(pruner))

    train(model, optimizer, STEPS, after=check)
    n = pruner.n_weights
    for t in range(10, STEPS, 5):
        assert pruned[t] == n - round(pruner.schedule.remaining_ratio(t) * n), t
    assert pruned == sorted(pruned)
    assert pruned[0] == n_start
    assert zeros(pruner) == exact(pruner) == pruner.finalize()["zeros"]
    # Other weights go on training between masks, or don't, as the policy says.
    assert (zeros_between[36] < zeros_between[35]) == (policy == "reference")


@pytest.mark.parametrize(
    "change",
    [
        {"beta2": 1.0},
        {"beta2": 0.0},
        {"state_dtype": "bfloat16"},
        {"criterion": product},
        {"regrow": "never", "mask_policy": "strict", "criterion": "platon"},
        {"mask_optimizer_state": True},
        {"ties": "reference"},
        {"min_density": 0.1},
        {"state_dtype": "8bit"},
        {"state_dtype": "8bit", "beta2": 0.0},
        {"state_dtype": "8bit", "ties": "reference"},
        {"delta_t": 1},
    ],
    ids=lambda change: ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in change.items()),
)
def test_with_every_kind_of_score(change: dict[str, Any]) -> None:
    config = PruneConfig(**({"sparsity": 0.8, "delta_t": 5, "warmup": 5, "cooldown": 20} | change))
    model, optimizer, pruner = run(config)
    start = places(pruner)

    def check() -> None:
        assert all(not p[there].any() for there, p in zip(start, pruner.parameters, strict=True))

    train(model, optimizer, STEPS, after=check)
    assert pruner.finalize()["kept"] <= pruner.n_weights - exact(pruner) + 2 * ("ties" in change)  # its rule truncates


def test_weights_with_large_gradients_at_zero_are_not_kept() -> None:
    """Under pins lr g² scores a weight at zero above others: without the fix some of them came back."""
    came_back = {}
    for fixed in (True, False):
        model = sparse()
        optimizer = PinsSGD(model.parameters(), lr=0.5)
        if fixed:
            pruner = Pruner.from_sparse(model, optimizer, CONFIG, total_steps=STEPS)
        else:
            pruner = Pruner(model, optimizer, CONFIG, total_steps=STEPS)
        start = places(pruner)
        train(model, optimizer, STEPS)
        kept = [pruner.mask(name)[there].sum() for name, there in zip(pruner.names, start, strict=True)]
        came_back[fixed] = int(sum(kept))
    assert came_back[True] == 0 < came_back[False]


@pytest.mark.parametrize("optimizer_class", [PinsAdamW, partial(torch.optim.AdamW, fused=True)])
def test_resuming_ends_at_the_same_bits(optimizer_class: Any, tmp_path: Any) -> None:
    model, optimizer, pruner = run(CONFIG, optimizer_class)
    train(model, optimizer, STEPS)
    pruner.finalize()
    half, half_optimizer, half_pruner = run(CONFIG, optimizer_class)
    train(half, half_optimizer, 33)
    half_pruner.save(tmp_path / "pruner.safetensors")
    # The model is loaded first: by now it has more zeros than are fixed.
    again = Network(16, classes=16)
    again.load_state_dict(half.state_dict())
    again_optimizer = optimizer_class(again.parameters(), lr=3e-2)
    again_optimizer.load_state_dict(copy.deepcopy(half_optimizer.state_dict()))
    resumed = Pruner.from_sparse(again, again_optimizer, CONFIG, total_steps=STEPS)
    resumed.load(tmp_path / "pruner.safetensors")
    assert resumed.schedule == half_pruner.schedule == pruner.schedule
    train(again, again_optimizer, STEPS, skip=33)
    resumed.finalize()
    assert same(again, model)


def test_a_state_without_fixed_zeros_is_refused() -> None:
    _, _, pruner = run(CONFIG)
    other = Pruner((net := sparse()), PinsAdamW(net.parameters()), CONFIG, STEPS)
    with pytest.raises(ValueError, match="exist on one side only, fixed/"):
        pruner.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="exist on one side only, fixed/"):
        other.load_state_dict(pruner.state_dict())


def test_a_copy_keeps_them() -> None:
    model, optimizer, pruner = run(CONFIG)
    train(model, optimizer, 20)
    copied, copied_optimizer, copied_pruner = copy.deepcopy((model, optimizer, pruner))
    train(model, optimizer, STEPS, skip=20)
    train(copied, copied_optimizer, STEPS, skip=20)
    assert same(copied, model)
    assert copied_pruner.finalize() == pruner.finalize()


def test_uneven_zeros_and_scopes() -> None:
    config = PruneConfig(sparsity=0.8, delta_t=5, warmup=5, cooldown=20, scope="layer")
    model, optimizer, pruner = run(config, model=sparse(0.6, uneven=True))
    train(model, optimizer, STEPS)
    pruner.finalize()
    assert all(abs(share - 0.8) < 0.01 for share in pruner.stats()["per_layer"].values())
    with pytest.raises(ValueError, match=r"layers\.0\..*has more zeros already than it may have in the end"):
        run(PruneConfig(sparsity=0.7, scope="layer"), model=sparse(0.75, uneven=True))
    with pytest.raises(ValueError, match="higher sparsity, or for a global scope without densities"):
        run(PruneConfig(sparsity=0.5, min_density=0.45), model=sparse(0.75, uneven=True))


def test_what_makes_no_sense_is_refused_and_lets_the_optimizer_go() -> None:
    model = sparse(0.9)
    optimizer = PinsAdamW(model.parameters())
    for change, said in (
        (
            {},
            r"the model has more zeros already than it may .* are to be\): ask for a higher sparsity$",
        ),
        ({"initial_sparsity": 0.1}, "initial_sparsity"),
        ({"beta1": 0.0}, "beta1"),
    ):
        with pytest.raises(ValueError, match=said):
            Pruner.from_sparse(model, optimizer, PruneConfig(**change), total_steps=STEPS)
    with pytest.raises(ValueError, match="needs a config"):
        Pruner.from_sparse(model, optimizer, total_steps=STEPS)
    dense = Network(16, classes=16)
    with pytest.raises(ValueError, match="no zeros"):
        Pruner.from_sparse(dense, PinsAdamW(dense.parameters()), CONFIG, total_steps=STEPS)
    Pruner.from_sparse(model, optimizer, PruneConfig(sparsity=0.95), total_steps=STEPS)


def test_parameters_that_are_replaced_before_the_first_step_are_followed() -> None:
    """As accelerate replaces them where it shards a model."""
    for total in (STEPS, None):
        model = sparse()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        pruner = Pruner.from_sparse(model, optimizer, CONFIG, total_steps=total)
        start = places(pruner)
        group = optimizer.param_groups[0]
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                new = nn.Parameter(p.detach().clone())
                setattr(module, name, new)
                group["params"] = [new if q is p else q for q in group["params"]]
        train(model, optimizer, 8)
        assert all(not p[there].any() for p, there in zip(pruner.parameters, start, strict=True))
        assert sum(pruner.masks.pruned()) == sum(int(there.sum()) for there in start)
