"""One-shot pruning: every criterion against a few lines of plain PyTorch, exact counts, nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Network
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import pins_ext
from pins_ext import PruneConfig, Pruner, prune_once, reference
from pins_ext.criteria import CRITERIA
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.once import PrunedOnce
from pins_ext.pruning.parameters import prunable_parameters

Batch = tuple[Tensor, Tensor]


def calibration(n: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 7, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(n)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def once(model: nn.Module, config: PruneConfig, batches: Any = None, **more: Any) -> PrunedOnce:
    return prune_once(model, calibration() if batches is None else batches, config, loss=loss, **more)


def gradients(model: nn.Module, names: list[str]) -> list[dict[str, Tensor]]:
    """Of each batch, all at once."""
    parameters = dict(model.named_parameters())
    found = []
    for batch in calibration():
        grads = torch.autograd.grad(loss(model, batch), [parameters[name] for name in names])
        found.append(dict(zip(names, grads, strict=True)))
    return found


def expected_score(criterion: str, p: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    rule = CRITERIA[criterion]
    if criterion == "magnitude":
        return p.abs()
    if rule.reads_moments:
        first, second = torch.zeros_like(p), torch.zeros_like(p)
        for n, g in enumerate(grads):
            first = reference.next_ipt("precomputed", first, g, n)
            second = reference.next_ipt("precomputed", second, g * g, n)
        if rule.smoothed:
            return reference.moments(p, first, second, torch.tensor([lr, 1.0, 1.0]))
        return reference.score("fisher", p, second)
    ipt = torch.zeros_like(p)
    for n, g in enumerate(grads):
        ipt = reference.next_ipt(criterion, ipt, reference.instant_score(criterion, p, p, g, lr), n)
    return ipt


def lowest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Masks (True = pruned) of the first `count` in a stable order over all tensors."""
    flat = torch.cat([s.flatten() for s in scores])
    pruned = torch.zeros(flat.numel(), dtype=torch.bool)
    pruned[torch.argsort(flat, stable=True)[:count]] = True
    parts = pruned.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


@pytest.mark.parametrize("criterion", [name for name, rule in CRITERIA.items() if not rule.reads_inputs])
@pytest.mark.parametrize("scope", ["global", "row"])
def test_every_criterion_prunes_what_plain_pytorch_prunes(criterion: str, scope: str) -> None:
    config, lr = PruneConfig(criterion=criterion, sparsity=0.63, scope=scope), 0.1
    model = Network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = list(prunable_parameters(model, config))
    grads = gradients(model, names)
    scores = [expected_score(criterion, before[name], [g[name] for g in grads], lr) for name in names]
    total = sum(s.numel() for s in scores)
    if scope == "global":
        wanted = lowest(scores, total - round(0.37 * total))
    else:
        rows = [[lowest([row], row.numel() - round(0.37 * row.numel()))[0] for row in s] for s in scores]
        wanted = [torch.stack(each) for each in rows]
    found = once(model, config, learning_rate=lr)
    after = dict(model.named_parameters())
    for name, pruned in zip(names, wanted, strict=True):
        assert torch.equal(after[name] == 0, pruned), name
        assert torch.equal(after[name][~pruned], before[name][~pruned])
    assert all(torch.equal(after[name], p) for name, p in before.items() if name not in names)
    assert found.pruned == found.zeros == sum(int(w.sum()) for w in wanted)
    assert found.batches == (0 if criterion == "magnitude" else 5)


def test_a_users_own_criterion_prunes_as_the_built_in_one_it_copies() -> None:
    def mine(p: Tensor, g: Tensor, lr: float) -> Tensor:
        return (p * g).abs()

    models = [Network(), Network()]
    for model, criterion in zip(models, (mine, "platon"), strict=True):
        once(model, PruneConfig(criterion=criterion, sparsity=0.5))
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def test_groups_and_densities_hold() -> None:
    model = Network()
    config = PruneConfig(sparsity=0.8, min_density={"*.0.intermediate*": 0.5})
    found = once(model, config)
    assert found.per_layer["layers.0.intermediate.dense.weight"] <= 0.5
    assert found.pruned == found.weights - round(0.2 * found.weights)
    model = Network()
    found = once(model, PruneConfig(sparsity=0.5, scope="layer"))
    assert set(found.per_layer.values()) <= {84 / 169, 85 / 169, 0.5}


def test_gradients_are_freed_one_by_one_and_the_model_is_as_it_was() -> None:
    model = Network(width=64, blocks=4)
    model.layers[0].norm.weight.requires_grad_(False)
    model.layers[1].eval()
    names = set(prunable_parameters(model, PruneConfig()))
    pruned = [p for name, p in model.named_parameters() if name in names]
    own = torch.ones_like(pruned[0])
    pruned[0].grad = own
    alive: list[int] = []

    def watch(p: Tensor) -> None:
        alive.append(sum(q.grad is not None for q in model.parameters()))

    handles = [p.register_post_accumulate_grad_hook(watch) for p in pruned]
    modes = {name: module.training for name, module in model.named_modules()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    once(model, PruneConfig(sparsity=0.5))
    # Hooks run in the order they were made: ours comes after, so each gradient is there for its own hook alone.
    assert max(alive) == 1
    assert len(alive) == 5 * len(pruned)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert required == {name: p.requires_grad for name, p in model.named_parameters()}
    assert pruned[0].grad is own
    assert torch.equal(own, torch.ones_like(own))
    assert all(p.grad is None for p in model.parameters() if p is not pruned[0])
    for handle in handles:
        handle.remove()
    assert all(not p._post_accumulate_grad_hooks for p in pruned)


def test_memory_stays_at_one_state_a_weight() -> None:
    """The most bytes of tensors that exist inside backward, at any of the hooks."""
    model = Network(width=64, blocks=12)
    weights = sum(p.numel() for p in prunable_parameters(model, PruneConfig()).values())
    gc.collect()
    before = held()
    most, calls = 0, 0

    def mine(p: Tensor, g: Tensor, lr: float) -> Tensor:
        nonlocal most, calls
        calls += 1
        if calls in (50, 90):  # looking takes long
            most = max(most, held())
        return (p * g).abs()

    once(model, PruneConfig(criterion=mine, sparsity=0.5), calibration(2))
    # All gradients at once would be as much again.
    assert 4 * weights <= most - before < 1.35 * 4 * weights


def held() -> int:
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided:
            for t in (thing, thing.grad if thing.is_leaf else None):
                if t is not None:
                    found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(found.values())


def test_frozen_weights_are_pruned_like_others() -> None:
    free, frozen = Network(), Network()
    for p in frozen.parameters():
        p.requires_grad_(False)
    for model in (free, frozen):
        once(model, PruneConfig(sparsity=0.7))
    assert all(torch.equal(p, q) for p, q in zip(free.parameters(), frozen.parameters(), strict=True))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_tensor_without_gradient_has_zero_in_its_mean_and_says_so_if_it_never_had_one() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.experts = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))

        def forward(self, which: int, x: Tensor) -> Tensor:
            return self.experts[which](x).square().mean()

    def run(model: nn.Module, batch: Any) -> Tensor:
        return model(*batch)

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    model = Experts()
    weights = [expert.weight.detach().clone() for expert in model.experts]
    with pytest.warns(UserWarning, match=r"experts\.2\.weight got no gradient"):
        prune_once(model, [(0, x), (1, x), (1, 2 * x)], PruneConfig(criterion="platon", sparsity=0.6), loss=run)
    means = []
    for which, inputs in enumerate(([x], [x, 2 * x], [])):
        total = torch.zeros(6, 6)
        for each in inputs:
            w = weights[which].clone().requires_grad_()
            (each @ w.T).square().mean().backward()
            total += (w * w.grad).abs().detach()  # type: ignore[operator]
        means.append(total / 3)
    wanted = lowest(means, 108 - round(0.4 * 108))
    assert all(torch.equal(e.weight == 0, pruned) for e, pruned in zip(model.experts, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"warmup": 3}, "warmup: one-shot pruning has no schedule"),
        ({"beta1": 0.5, "mask_policy": "strict"}, "beta1, mask_policy"),
        ({"scope": "row", "min_density": 0.1}, "leave out densities"),
        ({"scope": "row", "ties": "reference"}, "leave out densities and ties"),
        ({"scope": "row", "include": ("*norm*",)}, "no weight of nn.Linear"),
        ({"criterion": "wanda", "include": ("*norm*",)}, "no weight of nn.Linear"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], said: str) -> None:
    model = Network()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=said):
        once(model, PruneConfig(**change))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_bad_batches_are_refused_and_nothing_changes() -> None:
    model = Network()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="no calibration batches"):
        once(model, PruneConfig(), [])
    with pytest.raises(RuntimeError, match="the loss of batch 2 is nan"):
        once(model, PruneConfig(), [calibration()[0], (torch.full((8, 7), float("nan")), calibration()[0][1])])
    with pytest.raises(ValueError, match="output has no loss"):
        prune_once(model, [calibration()[0][0]], PruneConfig())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert model.training
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_training_refuses_what_only_one_shot_pruning_can_do() -> None:
    model = Network()
    for change, said in (({"criterion": "wanda"}, "prune_once"), ({"scope": "row"}, "one-shot")):
        with pytest.raises(ValueError, match=said):
            Pruner(model, PinsAdamW(model.parameters()), PruneConfig(**change), 10)


# ---- Wanda ----------------------------------------------------------------------------------------------------------


def wanda(weight: Tensor, inputs: list[Tensor], sparsity: float) -> Tensor:
    """The authors' few lines: the lowest of each row are pruned; weight [outputs, features]."""
    metric = reference.wanda(weight, torch.cat(inputs))
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    count = weight.shape[1] - round((1 - sparsity) * weight.shape[1])
    pruned.scatter_(1, metric.sort(dim=1, stable=True).indices[:, :count], True)
    return pruned


def inputs_of(model: nn.Module, run: Callable[[], Any], kinds: tuple[type, ...]) -> dict[str, list[Tensor]]:
    """What goes into each layer, token by token."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda m, args, out, name=name: found.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    model.eval()
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


def test_wanda_prunes_each_row_of_linear_layers() -> None:
    model = Network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = inputs_of(model, lambda: [model(x) for x, _ in calibration()], (nn.Linear,))
    model.train()
    found = prune_once(model, [x for x, _ in calibration()], PruneConfig(criterion="wanda", sparsity=0.6))
    for name, share in found.per_layer.items():
        pruned = wanda(before[name], seen[name.removesuffix(".weight")], 0.6)
        weight = dict(model.named_parameters())[name]
        assert torch.equal(weight == 0, pruned)
        assert share == pruned.float().mean()
    assert found.loss is None
    assert found.batches == 5
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


def gpt() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2))


def test_wanda_prunes_each_output_of_conv1d_and_counts_no_padding() -> None:
    model = gpt()
    generator = torch.Generator().manual_seed(5)
    batches = []
    for length in (9, 6):
        ids = torch.randint(1, 50, (3, 12), generator=generator)
        mask = (torch.arange(12) < length).long().expand(3, 12)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = inputs_of(model, lambda: [model(**batch) for batch in batches], (Conv1D,))
    real = [batch["attention_mask"].bool().flatten() for batch in batches]
    found = prune_once(model, batches, PruneConfig(criterion="wanda", sparsity=0.5))
    assert len(found.per_layer) == 8
    for name in found.per_layer:
        inputs = [x[mask] for x, mask in zip(seen[name.removesuffix(".weight")], real, strict=True)]
        assert torch.equal((dict(model.named_parameters())[name] == 0).T, wanda(before[name].T, inputs, 0.5)), name


def test_wanda_competes_globally_on_request() -> None:
    model = Network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = inputs_of(model, lambda: [model(x) for x, _ in calibration()], (nn.Linear,))
    found = prune_once(
        model, [x for x, _ in calibration()], PruneConfig(criterion="wanda", sparsity=0.6, scope="global")
    )
    names = list(found.per_layer)
    scores = [reference.wanda(before[name], torch.cat(seen[name.removesuffix(".weight")])) for name in names]
    wanted = lowest(scores, found.weights - round(0.4 * found.weights))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name] == 0, pruned) for name, pruned in zip(names, wanted, strict=True))
    assert PruneConfig(criterion="wanda").scope == "row"
    assert PruneConfig().scope == "global"


def test_ties_in_a_row_go_by_index_in_every_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    from pins_ext.pruning import rows

    monkeypatch.setattr(rows, "_AT_ONCE", 100)
    weight, score = torch.ones(33, 40), torch.tensor([2.0, 1.0, float("nan"), 1.0]).repeat(33, 10)
    assert rows.prune_rows(weight, score, 0.25, 0) == 330
    wanted = torch.zeros(33, 40, dtype=torch.bool)
    wanted[:, 1:20:2] = True
    assert torch.equal(weight == 0, wanted)
    conv = torch.ones(40, 33)
    rows.prune_rows(conv, score.T, 0.25, 1)
    assert torch.equal(conv, weight.T)


@pytest.mark.parametrize("scope", ["global", "row"])
def test_a_layer_without_input_is_refused(scope: str) -> None:
    class Half(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.layers[0](self.embed(x)))

    model = Half()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"layers\.1\..*was given no input"):
        prune_once(model, [torch.randn(2, 7)], PruneConfig(criterion="wanda", scope=scope))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_it_is_at_the_front_door() -> None:
    assert pins_ext.prune_once is prune_once
