"""A frozen base pruned below what learns: importance from gradients that exist one at a time, masks that only grow."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import STEPS, Network, batches, same
from torch import Tensor, nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.memory import memory
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.pruning.plan import ConflictWarning

OPTIONS: dict[str, Any] = {"sparsity": 0.8, "delta_t": 5, "warmup": 5, "cooldown": 20, "criterion": "platon"}
CONFIG = PruneConfig(**OPTIONS)


def product(p: torch.Tensor, g: torch.Tensor, lr: float) -> torch.Tensor:
    return (p * g).abs()


def frozen(sparse: float = 0.0) -> tuple[Network, dict[str, Tensor]]:
    """A network whose matrices in the blocks don't learn, all else does; and a copy of these matrices."""
    model = Network(16, classes=16)
    base = prunable_parameters(model, CONFIG)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in base.values():
            p.requires_grad_(False)
            p[torch.rand(p.shape, generator=generator) < sparse] = 0
    return model, {name: p.detach().clone() for name, p in base.items()}


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def start(config: PruneConfig = CONFIG, optimizer_class: Any = torch.optim.AdamW) -> tuple[Network, Any, Pruner, Any]:
    model, before = frozen()
    optimizer = optimizer_class(adapters(model), lr=1e-2)
    return model, optimizer, Pruner(model, optimizer, config, STEPS, frozen_base=True), before


def train(
    model: nn.Module, optimizer: Any, steps: int = STEPS, skip: int = 0, after: Any = None, backwards: int = 1
) -> None:
    for i, (x, y) in enumerate(batches(steps)):
        if i >= skip:
            optimizer.zero_grad()
            for part in range(backwards):
                nn.functional.cross_entropy(model(x[part::backwards]), y[part::backwards]).backward()
            optimizer.step()
            if after is not None:
                after()


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, PinsAdamW])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mask_policy": "strict"},
        {"criterion": "movement"},
        {"criterion": "magnitude"},
        {"criterion": product},
        {"beta2": 0.0},
        {"state_dtype": "bfloat16", "importance_every": 5},
        {"state_dtype": "8bit"},
        {"state_dtype": "8bit", "scope": "layer", "beta2": 1.0},
        {"scope": "layer"},
    ],
    ids=lambda change: ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in change.items()),
)
def test_masks_grow_to_the_target_and_nothing_else_moves(change: dict[str, Any], optimizer_class: Any) -> None:
    model, optimizer, pruner, before = start(PruneConfig(**(OPTIONS | change)), optimizer_class)
    learned = [p.detach().clone() for p in adapters(model) if all(p is not q for q in pruner.parameters)]
    masks: list[Tensor] = []
    pruned: list[int] = []

    def look() -> None:
        masks.append(torch.cat([pruner.mask(n).flatten() for n in pruner.names]))
        pruned.append(sum(pruner.masks.pruned()))
        assert all(p.grad is None for p in pruner.parameters)

    train(model, optimizer, after=look)
    assert pruner.step == STEPS
    assert not any((later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    n = pruner.n_weights
    for t in range(10, STEPS, 5):
        assert pruned[t] == sum(pruner.masks.scopes.n_prune(pruner.schedule.remaining_ratio(t)))
    report = pruner.finalize()
    assert report["zeros"] == sum(pruner.masks.scopes.n_prune(pruner.schedule.final_ratio))
    assert report["zeros"] == n - round(0.2 * n) or "scope" in change
    for name, p in zip(pruner.names, pruner.parameters, strict=True):
        assert torch.equal(p, before[name] * pruner.mask(name))
    rest = [p for p in model.parameters() if all(p is not q for q in pruner.parameters)]
    assert all(not torch.equal(p, q) for p, q in zip(rest, learned, strict=True))
    pruner.detach()
    assert not any(p.requires_grad or p._post_accumulate_grad_hooks for p in pruner.parameters)


def step(model: nn.Module, optimizers: list[Any], x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for each in optimizers:
        each.step()


def beside_an_unmoved_base(config: PruneConfig) -> tuple[Pruner, Callable[[Tensor, Tensor], None]]:
    """The pruner of a base that SGD steps at a rate of 0 while AdamW moves the adapters, and a step of both."""
    model, _ = frozen()
    rest = adapters(model)
    base = [p for p in model.parameters() if not p.requires_grad]
    for p in base:
        p.requires_grad_(True)
    still = torch.optim.SGD(base, lr=0.0)
    moving = torch.optim.AdamW(rest, lr=1e-2)
    return Pruner(model, still, config, STEPS), partial(step, model, [still, moving])


def test_the_importance_is_that_of_an_optimizer_that_does_not_move_the_base() -> None:
    """To the last bit, up to the first mask and in it."""
    model, optimizer, pruner, _ = start()
    ordinary, step_ordinary = beside_an_unmoved_base(CONFIG)
    for i, (x, y) in enumerate(batches(11)):
        step(model, [optimizer], x, y)
        step_ordinary(x, y)
        if i < 10:
            for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
                pairs = zip(pruner.importance.tensors()[kind], ordinary.importance.tensors()[kind], strict=True)
                assert all(torch.equal(a, b) for a, b in pairs), (i, kind)
    assert sum(pruner.masks.pruned()) > 0
    assert all(torch.equal(pruner.mask(name), ordinary.mask(name)) for name in pruner.names)


def test_every_backward_of_a_step_counts() -> None:
    model, optimizer, pruner, before = start()
    scores: dict[str, list[Tensor]] = {name: [] for name in pruner.names}
    twin = copy.deepcopy(model)
    names = dict(twin.named_parameters())
    for x, y in batches(3):
        twin.load_state_dict(model.state_dict())
        for part in (0, 1):
            loss = nn.functional.cross_entropy(twin(x[part::2]), y[part::2])
            for name, g in zip(scores, torch.autograd.grad(loss, [names[n] for n in scores]), strict=True):
                scores[name].append((before[name] * g).abs())
        optimizer.zero_grad()
        for part in (0, 1):
            nn.functional.cross_entropy(model(x[part::2]), y[part::2]).backward()
        optimizer.step()
    assert pruner.step == 3
    for name, ipt in zip(pruner.names, pruner.importance.ipt, strict=True):
        torch.testing.assert_close(ipt, torch.stack(scores[name]).mean(0), rtol=1e-5, atol=1e-9)


def test_one_gradient_of_the_base_exists_at_a_time() -> None:
    model, _ = frozen()
    seen: list[int] = []
    base = [p for p in model.parameters() if not p.requires_grad]
    for p in base:
        p.requires_grad_(True)
        p.register_post_accumulate_grad_hook(lambda _: seen.append(sum(q.grad is not None for q in base)))
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(adapters(model), lr=1e-2)
    Pruner(model, optimizer, CONFIG, STEPS, frozen_base=True)
    train(model, optimizer, 3)
    assert seen == [1] * 3 * len(base)


@pytest.mark.parametrize("sparse", [0.0, 0.4])
@pytest.mark.parametrize("stored", ["float32", "8bit"])
@pytest.mark.parametrize("steps", [8, 33])
def test_resuming_ends_at_the_same_bits(steps: int, stored: str, sparse: float, tmp_path: Path) -> None:
    config = PruneConfig(**OPTIONS, state_dtype=stored)

    def begin() -> tuple[Network, Any, Pruner]:
        model, _ = frozen(sparse)
        optimizer = torch.optim.AdamW(adapters(model), lr=1e-2, fused=True)
        make = Pruner.from_sparse if sparse else Pruner
        return model, optimizer, make(model, optimizer, config, STEPS, frozen_base=True)

    whole, optimizer, pruner = begin()
    train(whole, optimizer)
    pruner.finalize()
    half, half_optimizer, half_pruner = begin()
    train(half, half_optimizer, steps)
    half_pruner.save(tmp_path / "pruner.safetensors")
    # As adapters are saved: the base is the one of the start.
    again, again_optimizer, again_pruner = begin()
    learned = {name: p for name, p in half.state_dict().items() if name not in half_pruner.names}
    again.load_state_dict(learned, strict=False)
    again_optimizer.load_state_dict(copy.deepcopy(half_optimizer.state_dict()))
    again_pruner.load(tmp_path / "pruner.safetensors")
    assert same(again, half)
    train(again, again_optimizer, skip=steps)
    again_pruner.finalize()
    assert same(again, whole)


def test_a_sparse_base_is_pruned_further() -> None:
    model, before = frozen(0.5)
    optimizer = torch.optim.AdamW(adapters(model), lr=1e-2)
    pruner = Pruner.from_sparse(model, optimizer, CONFIG, STEPS, frozen_base=True)
    zeros = [sum(pruner.masks.pruned())]
    train(model, optimizer, after=lambda: zeros.append(sum(pruner.masks.pruned())))
    assert zeros[0] == sum(int((w == 0).sum()) for w in before.values())
    assert zeros == sorted(zeros)
    n = pruner.n_weights
    assert pruner.finalize()["zeros"] == n - round(0.2 * n) == zeros[-1]
    assert all(not p[before[name] == 0].any() for name, p in zip(pruner.names, pruner.parameters, strict=True))
    with pytest.raises(ValueError, match="keeps its zeros by itself"):
        Pruner.from_sparse(model, optimizer, CONFIG, frozen_base=True)


@pytest.mark.parametrize("every", [False, True], ids=["some", "none"])
def test_in_8_bits_what_stays_pruned_is_told_from_weights_that_never_score(every: bool) -> None:
    """Weights without a gradient score 0, as pruned ones would: counts and statistics are exact all the same."""
    model, before = frozen(0.5)
    optimizer = torch.optim.AdamW(adapters(model), lr=1e-2)
    config = PruneConfig(**(OPTIONS | {"sparsity": 0.7}), state_dtype="8bit")
    pruner = Pruner.from_sparse(model, optimizer, config, STEPS, frozen_base=True)
    for i, p in enumerate(pruner.parameters):
        p.register_hook(lambda g, i=i: g * 0 if every or i % 2 else g)  # type: ignore[misc]
    flipped = [pruner.masks.pruned()]

    def look() -> None:
        masks, stats = pruner.masks, pruner.stats()
        flipped.append(masks.pruned())
        if masks.chosen:
            assert masks.counts() == (pruner.n_weights - sum(flipped[-1]), masks.counts()[1], 0)
            assert stats["nan"] == 0

    train(model, optimizer, after=look)
    report = pruner.finalize()
    assert report["zeros"] == pruner.n_weights - round(0.3 * pruner.n_weights)
    for name, p in zip(pruner.names, pruner.parameters, strict=True):
        assert not p[before[name] == 0].any()


@pytest.mark.parametrize("stored", ["float32", "8bit"])
def test_a_threshold_is_a_number_or_none(stored: str) -> None:
    """In 8 bits no score decides when the last mask prunes just what stays pruned."""
    model, optimizer, pruner, _ = start(PruneConfig(**OPTIONS, state_dtype=stored))
    seen: list[float | None] = []
    train(model, optimizer, after=lambda: seen.append(pruner.stats()["threshold"]))
    assert not any(threshold is not None and math.isnan(threshold) for threshold in seen)
    assert any(threshold is not None and threshold > 0 for threshold in seen)
    assert (seen[-1] is None) == (stored == "8bit")


def test_pins_is_platon_and_says_so() -> None:
    ends = []
    for criterion in ("pins", "platon"):
        model, _ = frozen()
        optimizer = torch.optim.AdamW(adapters(model), lr=1e-2)
        config = PruneConfig(**(OPTIONS | {"criterion": criterion}))
        if criterion == "pins":
            with pytest.warns(ConflictWarning, match="pins is the same as platon"):
                pruner = Pruner(model, optimizer, config, STEPS, frozen_base=True)
            assert "conflict: over a frozen base criterion pins is the same as platon" in str(pruner.plan())
        else:
            pruner = Pruner(model, optimizer, config, STEPS, frozen_base=True)
        train(model, optimizer)
        ends.append(model)
    assert same(*ends)


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    model, optimizer, pruner, _ = start()
    train(model, optimizer, 3)
    before = [ipt.clone() for ipt in pruner.importance.ipt]
    i = pruner.names.index("layers.0.intermediate.dense.weight")
    pruner.parameters[i].register_hook(lambda g: g.index_fill(0, torch.tensor([1]), float("nan")))
    with pytest.raises(RuntimeError, match="a gradient of the frozen base is not finite"):
        train(model, optimizer, 4, skip=3)
    moved = [not torch.equal(a, b) for a, b in zip(before, pruner.importance.ipt, strict=True)]
    assert moved == [j != i for j in range(len(moved))]


def test_an_exception_inside_backward_ends_that_backward_alone() -> None:
    """What came of it counts, a weight whose gradient did not come has a zero, and training goes on."""
    model, optimizer, pruner, _ = start()
    train(model, optimizer, 2)
    ipt = [t.clone() for t in pruner.importance.ipt]
    (x, y), (more_x, more_y) = batches(2)
    stop = model.layers[1].register_full_backward_hook(lambda *_: 1 / 0)  # before the first block has any
    with pytest.raises(ZeroDivisionError):
        nn.functional.cross_entropy(model(x), y).backward()
    stop.remove()
    seen = pruner.importance.accepted[0].item()
    torn = [not torch.equal(a, b) for a, b in zip(ipt, pruner.importance.ipt, strict=True)]
    assert any(torn)
    assert not all(torn)
    partial = [t.clone() for t in pruner.importance.ipt]
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(more_x), more_y), pruner.parameters)
    nn.functional.cross_entropy(model(more_x), more_y).backward()
    assert pruner.importance.accepted[0].item() == seen + 2
    for own, old, g, p, came in zip(pruner.importance.ipt, partial, grads, pruner.parameters, torn, strict=True):
        window = old if came else old * seen / (seen + 1)
        torch.testing.assert_close(own, (window * (seen + 1) + (p * g).abs()) / (seen + 2), rtol=1e-5, atol=1e-9)
    optimizer.step()
    train(model, optimizer, STEPS, skip=3)
    assert pruner.finalize()["zeros"] == pruner.n_weights - round(0.2 * pruner.n_weights)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_that_cuts_a_backward_in_parts_is_refused(reentrant: bool) -> None:
    model, optimizer, pruner, _ = start()
    block = model.layers[0].forward
    model.layers[0].forward = lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
    x, y = next(batches(1))
    inside = model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] + 0,))
    if reentrant:
        with pytest.raises(RuntimeError, match="use use_reentrant=False"):
            nn.functional.cross_entropy(model(x.requires_grad_()), y).backward()
    else:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert pruner.step == 1
    inside.remove()


def test_what_makes_no_sense_is_refused() -> None:
    model, _ = frozen()
    optimizer = torch.optim.AdamW(adapters(model), lr=1e-2)
    for change, said in (
        ({"criterion": "fisher"}, "a frozen base has none"),
        ({"criterion": "pins-update"}, "a frozen base has none"),
        ({"mask_optimizer_state": True}, "mask_optimizer_state"),
        ({"beta1": 0.0}, "beta1 above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Pruner(model, optimizer, PruneConfig(**(OPTIONS | change)), STEPS, frozen_base=True)
    with pytest.raises(ValueError, match="one optimizer of the adapters"):
        Pruner(model, [optimizer, optimizer], CONFIG, STEPS, frozen_base=True)
    pruner = Pruner(model, optimizer, CONFIG, STEPS, frozen_base=True)
    with pytest.raises(RuntimeError, match="can't be copied"):
        copy.deepcopy(pruner)
    pruner.score_gradients = dict
    with pytest.raises(RuntimeError, match="score_gradient='task'"):
        train(model, optimizer, 1)
    with pytest.raises(ValueError, match="is to be pruned and learns"):
        Pruner(Network(), torch.optim.SGD(Network().parameters()), CONFIG, STEPS, frozen_base=True)


# ---- windows of one step --------------------------------------------------------------------------------------------

AT_ONCE = OPTIONS | {"delta_t": 1}


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("beta2", [0.95, 1.0])
def test_a_window_of_one_step_needs_no_mean(stored: str, beta2: float) -> None:
    """The averages are a step ahead of those that fold a kept mean, to the last bit, and the masks are the same."""
    config = PruneConfig(**AT_ONCE, state_dtype=stored, beta2=beta2)
    model, optimizer, pruner, _ = start(config)
    ordinary, step_ordinary = beside_an_unmoved_base(config)
    assert set(pruner.importance.tensors()) == set(ordinary.importance.tensors()) - {"ipt"}
    ahead: dict[str, list[Tensor]] = {}
    for i, (x, y) in enumerate(batches(7)):
        step(model, [optimizer], x, y)
        step_ordinary(x, y)
        for kind, tensors in ahead.items():
            pairs = zip(tensors, ordinary.importance.tensors()[kind], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), (i, kind)
        assert all(torch.equal(pruner.mask(name), ordinary.mask(name)) for name in pruner.names)
        # From the first mask on, weights that stay pruned are marked.
        ahead = {kind: [t.clone() for t in tensors] for kind, tensors in pruner.importance.tensors().items()}
        ahead = {} if i >= 5 else ahead
    assert sum(pruner.masks.pruned()) > 0


def test_without_a_mean_masks_grow_to_the_target_and_resume(tmp_path: Path) -> None:
    for stored in ("float32", "8bit"):
        config = PruneConfig(**AT_ONCE, state_dtype=stored)
        whole, optimizer, pruner, before = start(config)
        pruned: list[int] = []
        train(whole, optimizer, after=lambda seen=pruned, own=pruner: seen.append(sum(own.masks.pruned())))
        assert pruned == [
            0 if t <= 5 else sum(pruner.masks.scopes.n_prune(pruner.schedule.remaining_ratio(t))) for t in range(STEPS)
        ]
        assert pruner.finalize()["zeros"] == pruner.n_weights - round(0.2 * pruner.n_weights)
        assert all(
            torch.equal(p, before[n] * pruner.mask(n)) for n, p in zip(pruner.names, pruner.parameters, strict=True)
        )
        half, half_optimizer, half_pruner, _ = start(config)
        train(half, half_optimizer, 17)
        half_pruner.save(tmp_path / "pruner.safetensors")
        again, again_optimizer, again_pruner, _ = start(config)
        learned = {name: p for name, p in half.state_dict().items() if name not in half_pruner.names}
        again.load_state_dict(learned, strict=False)
        again_optimizer.load_state_dict(copy.deepcopy(half_optimizer.state_dict()))
        again_pruner.load(tmp_path / "pruner.safetensors")
        train(again, again_optimizer, skip=17)
        again_pruner.finalize()
        assert same(again, whole)


def test_without_a_mean_a_missing_gradient_is_zero_and_a_bad_one_is_left_out() -> None:
    model, optimizer, pruner, before = start(PruneConfig(**AT_ONCE))
    train(model, optimizer, 3)
    i = pruner.names.index("layers.0.intermediate.dense.weight")
    mean = [t.clone() for t in pruner.importance.exp_avg_ipt]
    optimizer.zero_grad()
    pruner.parameters[i].sum().backward()  # no other gets a gradient
    for j, (old, new) in enumerate(zip(mean, pruner.importance.exp_avg_ipt, strict=True)):
        score = before[pruner.names[j]].abs() if i == j else torch.zeros_like(old)
        torch.testing.assert_close(new, 0.85 * old + 0.15 * score, rtol=1e-6, atol=1e-12)
    optimizer.step()
    mean = [t.clone() for t in pruner.importance.exp_avg_ipt]
    pruner.parameters[i].register_hook(lambda g: g * float("nan"))
    with pytest.raises(RuntimeError, match="a gradient of the frozen base is not finite"):
        train(model, optimizer, 1)
    moved = [not torch.equal(a, b) for a, b in zip(mean, pruner.importance.exp_avg_ipt, strict=True)]
    assert moved == [j != i for j in range(len(moved))]


def test_without_a_mean_there_is_one_backward_a_step() -> None:
    model, optimizer, pruner, _ = start(PruneConfig(**AT_ONCE))
    with pytest.raises(RuntimeError, match="a delta_t of 2 or more"):
        train(model, optimizer, 1, backwards=2)
    model, optimizer, pruner, _ = start(PruneConfig(**(AT_ONCE | {"beta2": 0.0})))
    train(model, optimizer, 1, backwards=2)  # the score needs the mean
    assert pruner.importance.ipt


def test_bytes_of_a_frozen_base_in_8_bits() -> None:
    """A bfloat16 weight, two averages of a byte and their scales, one bit of mask: nothing else lasts, as planned."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU(), nn.Linear(512, 512, bias=False)).bfloat16()
    model.requires_grad_(False)
    head = nn.Linear(512, 2)
    config = PruneConfig(**AT_ONCE, state_dtype="8bit")
    optimizer = torch.optim.AdamW(head.parameters())
    pruner = Pruner(model, optimizer, config, STEPS, frozen_base=True)
    for _ in range(8):
        head(model(torch.randn(4, 512).bfloat16()).float()).square().sum().backward()
        optimizer.step()
    states = [t for tensors in pruner.importance.tensors().values() for t in tensors]
    there = sum(t.nbytes for t in (*pruner.parameters, *states, *pruner.masks.bits))
    assert there / pruner.n_weights == pytest.approx(2 + 2 * (1 + 2 / 32) + 1 / 8)
    planned = memory(model, pruner.names, pruner.config, frozen_base=True)
    assert planned.weights + planned.statistics + planned.masks == there
    assert planned.gradients == 512 * 512 * (2 + 1 + 2 / 32)
    assert pruner.plan()["state_bytes"] == planned.statistics
