"""Odd parameters, gradients and models: each has a defined outcome."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, batches, exact, start, train, zeros
from torch import nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW, PinsSGD
from pins_ext.pruning.parameters import prunable_parameters


def test_a_missing_gradient_counts_as_zero_and_masks_hold() -> None:
    for optimizer_class in (PinsAdamW, torch.optim.AdamW):
        model, optimizer, pruner = start(optimizer_class=optimizer_class)
        train(model, optimizer, 30)
        unused = model.layers[1].output["dense"].weight
        i = next(i for i, p in enumerate(pruner.parameters) if p is unused)
        for x, y in batches(30, seed=4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            unused.grad = None
            optimizer.step()
        assert zeros(pruner) == exact(pruner)
        assert not unused[~pruner.mask(pruner.names[i])].any()


def test_tied_weights_count_once() -> None:
    model = Network()
    model.layers[1].attention["self"].weight = model.layers[0].attention["self"].weight
    model.layers[1].attention["output"]["dense"].weight = nn.Parameter(
        model.layers[0].attention["output"]["dense"].weight.data
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruner(model, optimizer, CONFIG, STEPS)
    assert pruner.n_weights == sum(p.numel() for p in pruner.parameters) == 2 * (2 * 13 * 26) + 2 * 13 * 13
    train(model, optimizer, STEPS)
    assert pruner.finalize()["zeros"] == exact(pruner)


def test_odd_parameters_are_refused_with_a_reason() -> None:
    def attempt(model: nn.Module, **options: Any) -> None:
        Pruner(model, torch.optim.SGD(model.parameters(), lr=1), PruneConfig(**options), STEPS)

    model = Network()
    model.layers[0].output["dense"].weight.data = torch.randn(26, 13).t()
    with pytest.raises(ValueError, match=r"layers\.0\.output\.dense\.weight is not contiguous"):
        attempt(model)
    model = Network()
    model.layers[0].output["dense"].weight.data = model.layers[0].output["dense"].weight.data.double()
    with pytest.raises(ValueError, match="share one dtype"):
        attempt(model)
    model = Network()
    model.layers[0].output["dense"].weight = nn.Parameter(torch.empty(13, 26, device="meta"))
    with pytest.raises(ValueError, match="share one device"):
        attempt(model)
    model, storage = Network(), torch.randn(13 * 13 + 5)
    model.layers[0].attention["self"].weight.data = storage[:169].view(13, 13)
    model.layers[1].attention["self"].weight.data = storage[5:].view(13, 13)
    with pytest.raises(ValueError, match="overlap in memory"):
        attempt(model)
    with pytest.raises(ValueError, match=r"'nothing\*' matches no parameter"):
        attempt(Network(), include=("nothing*",))
    with pytest.raises(ValueError, match=r"'nothing\*' matches no parameter"):
        attempt(Network(), exclude=("nothing*",))
    with pytest.raises(ValueError, match="no prunable parameter"):
        attempt(Network(), exclude=("*",))
    with pytest.raises(ValueError, match="longer than training"):
        attempt(Network(), warmup=50, cooldown=50)
    model = Network()
    model.embed.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        attempt(model, include=("embed.weight",))
    model = Network()
    with pytest.raises(ValueError, match="belong to no optimizer"):
        Pruner(model, torch.optim.SGD(model.classifier.parameters(), lr=1), CONFIG, STEPS)
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer is needed"):
        Pruner(model, ["not one"], CONFIG, STEPS)  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["embedder", "text_embed", "scorer", "router_model", "base_classifier"])
def test_the_name_of_an_encoder_says_nothing_of_its_blocks(name: str) -> None:
    blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4), "embed": nn.Linear(4, 4)}) for _ in range(2))
    model = nn.ModuleDict({name: nn.ModuleDict({"layers": blocks}), "out": nn.Linear(4, 2)})
    assert [*prunable_parameters(model, PruneConfig())] == [f"{name}.layers.{i}.fc.weight" for i in range(2)]
    heads = nn.ModuleList([nn.Linear(4, 4)])
    model["classifier"] = nn.ModuleDict({"layers": heads})
    assert len(prunable_parameters(model, PruneConfig())) == 2


def test_what_a_parametrization_makes_a_weight_of_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.utils.parametrizations.weight_norm(model[0])
    config = PruneConfig(include=("*original*",), exclude=("*original0",))
    assert [*prunable_parameters(model, config)] == ["0.parametrizations.weight.original1"]
    nn.utils.parametrizations.orthogonal(model[1])
    with pytest.raises(ValueError, match=r"1\.parametrizations\.weight\.original is no weight but what _Orthogonal"):
        prunable_parameters(model, config)


def test_a_model_without_memory_has_no_overlaps_but_its_own() -> None:
    with torch.device("meta"):
        model = Network()
        assert set(prunable_parameters(model, CONFIG)) == set(prunable_parameters(Network(), CONFIG))
    model.layers[1].attention["self"].weight = nn.Parameter(model.layers[0].attention["self"].weight.data)
    assert "layers.1.attention.self.weight" not in prunable_parameters(model, CONFIG)
    storage = torch.empty(13 * 13 + 5, device="meta")
    model.layers[0].attention["self"].weight.data = storage[:169].view(13, 13)
    model.layers[1].attention["self"].weight.data = storage[5:].view(13, 13)
    with pytest.raises(ValueError, match="overlap in memory"):
        prunable_parameters(model, CONFIG)


def test_zero_sized_and_frozen_parameters_are_left_out() -> None:
    model = Network()
    model.layers.append(nn.Linear(0, 13))
    model.layers[0].output["dense"].weight.requires_grad_(False)
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=1), CONFIG, STEPS)
    assert "layers.0.output.dense.weight" not in pruner.names
    assert "layers.2.weight" not in pruner.names


def test_sparse_gradients_and_closures_are_refused() -> None:
    for optimizer_class in (PinsSGD, torch.optim.SGD):
        model = nn.Sequential(nn.EmbeddingBag(50, 8, sparse=True), nn.Linear(8, 3))
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        Pruner(model, optimizer, PruneConfig(include=("0.weight",)), STEPS)
        model(torch.tensor([[1, 2], [3, 4]])).sum().backward()
        with pytest.raises((ValueError, RuntimeError), match="sparse gradient"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="closure"):
            optimizer.step(lambda: torch.tensor(0.0))


def test_default_choice_of_parameters() -> None:
    pruner = start()[2]
    assert all(n.startswith("layers.") and n.endswith("weight") and "norm" not in n for n in pruner.names)
    assert len(pruner.names) == 8
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert Pruner(plain, torch.optim.SGD(plain.parameters(), lr=1), CONFIG, STEPS).names == ["0.weight", "2.weight"]
    released = start(PruneConfig(parameter_set="released"))[2]
    assert "layers.0.output.dense.bias" in released.names


def test_copies_and_detaching_are_noticed() -> None:
    model, optimizer, pruner = start(optimizer_class=torch.optim.AdamW)
    pruner.verify()
    model.layers[0].output["dense"].weight = nn.Parameter(torch.randn(16, 32))
    with pytest.raises(RuntimeError, match="no longer the parameter"):
        pruner.verify()
    model, optimizer, pruner = start()
    with pytest.raises(RuntimeError, match="already belongs"):
        Pruner(model, optimizer, CONFIG, STEPS)
    pruner.detach()
    with pytest.raises(RuntimeError, match="no longer calls this Pruner"):
        pruner.verify()
    train(model, optimizer, 3)
    assert pruner.step == 0


def test_stats_and_plan_tell_what_a_user_needs() -> None:
    model, optimizer, pruner = start()
    text = str(pruner.plan())
    assert f"{pruner.n_weights:,} prunable weights in 8 tensors" in text
    assert f"{exact(pruner):,} of them zero" in text
    train(model, optimizer, STEPS)
    stats = pruner.stats()
    assert stats["step"] == STEPS
    assert stats["zeros"] == stats["sparsity"] == zeros(pruner) / pruner.n_weights
    assert stats["threshold"] > 0
    assert stats["nan"] == 0
    assert stats["ms"] > 0
    assert 0 <= stats["churn"] < 1
    assert set(stats["per_layer"]) == set(pruner.names)
    kept = {n: float(pruner.mask(n).float().mean()) for n in pruner.names}
    assert stats["per_layer"] == pytest.approx({n: 1 - k for n, k in kept.items()}, abs=1e-6)


def test_nan_scores_are_kept_and_counted() -> None:
    model, optimizer, pruner = start()
    for i, (x, y) in enumerate(batches(40)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if i == 12:
            pruner.importance.ipt[0][0, :4] = float("nan")
        optimizer.step()
    stats = pruner.stats()
    assert stats["nan"] == 4
    assert bool(pruner.mask(pruner.names[0])[0, :4].all())


def test_autograd_notices_that_weights_were_stepped_and_masked() -> None:
    for optimizer_class in (PinsAdamW, torch.optim.AdamW):
        model, optimizer, pruner = start(optimizer_class=optimizer_class)
        train(model, optimizer, 25)
        x, _ = next(batches(1))
        for change in (optimizer.step, pruner.finalize):
            loss = model(x).sum()
            change()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_a_tied_weight_answers_to_each_of_its_names() -> None:
    model = Network()
    model.head = nn.Linear(13, 7)
    model.head.weight = nn.Parameter(torch.randn(7, 13))
    model.layers[0].output["dense"].weight = nn.Parameter(torch.randn(13, 26))
    model.last = nn.Linear(26, 13)
    model.last.weight = model.layers[0].output["dense"].weight
    first = "layers.0.output.dense.weight"
    assert list(prunable_parameters(model, PruneConfig(include=("last.weight",)))) == [first]
    assert first not in prunable_parameters(model, PruneConfig(exclude=("last.weight",)))


def test_attention_of_torch_is_found_with_its_fused_projection() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert list(prunable_parameters(model, CONFIG)) == [f"layers.{i}.{name}" for i in range(2) for name in names]


def test_a_frozen_model_says_what_is_frozen() -> None:
    model = Network().requires_grad_(False)
    model.classifier.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.self\.weight is to be pruned but frozen"):
        prunable_parameters(model, CONFIG)


def test_parameters_that_join_an_optimizer_late_stay_dense() -> None:
    for optimizer_class in (PinsAdamW, torch.optim.AdamW):
        model = Network(16, classes=16)
        late = model.layers[1].requires_grad_(False)
        optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        pruner = Pruner(model, optimizer, CONFIG, STEPS)
        assert all(name.startswith("layers.0.") for name in pruner.names)
        train(model, optimizer, 10)
        late.requires_grad_(True)
        optimizer.add_param_group({"params": list(late.parameters()), "lr": 1e-2})
        before = [p.clone() for p in late.parameters()]
        train(model, optimizer, STEPS - 10)
        assert pruner.finalize()["zeros"] == exact(pruner)
        assert not any(torch.equal(old, p) for old, p in zip(before, late.parameters(), strict=True))
        assert all(torch.count_nonzero(p) == p.numel() for n, p in late.named_parameters() if p.dim() == 2)


def test_experts_that_no_token_reaches_keep_their_zeros() -> None:
    """Every expert a module of its own: the gradient of an unrouted one is None, in this step or in all."""
    for optimizer_class in (PinsAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        optimizer = optimizer_class(experts.parameters(), lr=1e-2)
        pruner = Pruner(experts, optimizer, CONFIG, STEPS)
        untouched = experts[3].weight.detach().clone()
        for step in range(STEPS):
            optimizer.zero_grad()
            experts[step % 3](torch.randn(4, 8)).square().sum().backward()
            assert sum(e.weight.grad is None for e in experts) == 3
            optimizer.step()
        final = pruner.finalize()
        assert final["zeros"] == exact(pruner)
        # Its importance is zero, so it goes first; what is left of it was never stepped.
        kept = pruner.mask("3.weight")
        assert torch.equal(experts[3].weight, untouched * kept)
        assert not kept.any()
