"""Gradients that are used and freed inside backward: the same bits, less memory, and what can't be done is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CONFIG, STEPS, Network, batches, same
from torch import Tensor, nn
from transformers import TrainingArguments

from pins_ext import PruneConfig, Pruner
from pins_ext.integrations.unsupported import refuse_unsupported
from pins_ext.optim import FusedOptimizer, PinsAdamW, PinsSGD

OPTIMIZERS = [(PinsAdamW, {"lr": 3e-3, "weight_decay": 0.01}), (PinsSGD, {"lr": 0.05, "momentum": 0.9})]


def start(
    config: PruneConfig = CONFIG, optimizer_class: Any = PinsAdamW, sparse: bool = False, **options: Any
) -> tuple[Network, FusedOptimizer, Pruner]:
    model = Network()
    if sparse:
        with torch.no_grad():
            for block in model.layers:
                block.output["dense"].weight[::2] = 0
    groups = [{"params": list(model.layers.parameters())}]
    rest = [p for name, p in model.named_parameters() if not name.startswith("layers")]
    optimizer = optimizer_class([*groups, {"params": rest, "lr": 1e-3}], **({"lr": 3e-3} | options))
    pruner = Pruner.from_sparse(model, optimizer, config, STEPS) if sparse else Pruner(model, optimizer, config, STEPS)
    return model, optimizer, pruner


def train(model: nn.Module, optimizer: Any, steps: int = STEPS, skip: int = 0, clip: float | None = None) -> None:
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    for i, (x, y) in enumerate(batches(steps)):
        if i >= skip:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if clip is not None:
                optimizer.clip_grad_norm_(clip)
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize(("optimizer_class", "options"), OPTIMIZERS)
@pytest.mark.parametrize("policy", ["reference", "strict"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"criterion": "platon", "state_dtype": "bfloat16"},
        {"criterion": "pins-signed", "beta2": 1.0, "importance_every": 5},
        {"criterion": "magnitude"},
        {"min_density": 0.1, "mask_optimizer_state": True},
    ],
    ids=str,
)
def test_without_clip_the_bits_are_those_of_ordinary_steps(
    change: dict[str, Any], policy: str, optimizer_class: Any, options: dict[str, Any]
) -> None:
    config = PruneConfig(
        **({"sparsity": 0.8, "delta_t": 5, "warmup": 5, "cooldown": 20, "mask_policy": policy} | change)
    )
    assert_same_run(config, optimizer_class, options)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_weights_of_16_bits_are_rounded_alike(moments: torch.dtype) -> None:
    """The random bits of every weight are those of an ordinary step."""
    runs = []
    for released in (False, True):
        model = Network().bfloat16()
        optimizer = PinsAdamW(model.parameters(), lr=1e-2)
        if moments == torch.bfloat16:
            optimizer = PinsAdamW(model.parameters(), lr=1e-2, moment_dtype="bfloat16")
        pruner = Pruner(model, optimizer, CONFIG, STEPS)
        if released:
            optimizer.release_gradients()
        for x, y in batches(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.bfloat16()), y).backward()
            optimizer.step()
        pruner.finalize()
        runs.append(model)
    assert same(*runs)
    assert not same(runs[0], Network().bfloat16())


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize(
    ("dtype", "moments"),
    [(torch.bfloat16, "float32"), (torch.float32, "bfloat16"), (torch.float32, "8bit")],
    ids=str,
)
def test_parameters_without_a_gradient_change_no_random_bits(dtype: torch.dtype, moments: str, pruned: bool) -> None:
    runs = []
    for released in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]).to(dtype)
        optimizer = PinsAdamW(model.parameters(), lr=1e-2, moment_dtype=moments)
        if released:
            optimizer.release_gradients()
        if pruned:
            Pruner(model, optimizer, PruneConfig(sparsity=0.5, delta_t=2, warmup=0, cooldown=2), 8)
        for t in range(8):
            used = [p for i, p in enumerate(model.parameters()) if i != 1 or t % 2 == 0]
            torch.stack([(p * torch.randn_like(p)).sum() for p in used]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    assert same(*runs)


@pytest.mark.parametrize("criterion", ["fisher", "moments"])
def test_criteria_that_read_moments(criterion: str) -> None:
    config = PruneConfig(sparsity=0.8, delta_t=5, warmup=5, cooldown=20, criterion=criterion)
    assert_same_run(config, *OPTIMIZERS[0])


def test_from_a_sparse_start() -> None:
    assert_same_run(CONFIG, *OPTIMIZERS[0], sparse=True)


def assert_same_run(config: PruneConfig, optimizer_class: Any, options: dict[str, Any], sparse: bool = False) -> None:
    runs = []
    for released in (False, True):
        model, optimizer, pruner = start(config, optimizer_class, sparse, **options)
        if released:
            optimizer.release_gradients()
        train(model, optimizer)
        assert pruner.step == STEPS
        runs.append((model, pruner, optimizer, pruner.finalize()))
    (model, pruner, optimizer, report), (other, other_pruner, other_optimizer, other_report) = runs
    assert same(model, other)
    assert report == other_report
    if not pruner.importance.accepted[0] and other_pruner.importance.accepted[0]:
        # The ordinary step's pass has ended the window; that of released gradients waits for the next step.
        other_pruner.importance.fold(STEPS)
        other_pruner.importance.ipt[:] = pruner.importance.ipt
    theirs = other_pruner.state_dict()["tensors"]
    assert all(torch.equal(t, theirs[name]) for name, t in pruner.state_dict()["tensors"].items())
    states, others = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert states.keys() == others.keys()
    for i, state in states.items():
        assert state.keys() == others[i].keys()
        assert all(torch.equal(value, others[i][name]) for name, value in state.items())


def test_a_plain_optimizer_without_a_pruner() -> None:
    models = [Network(), Network()]
    for model, released in zip(models, (False, True), strict=True):
        optimizer = PinsAdamW(model.parameters(), lr=1e-2)
        if released:
            optimizer.release_gradients()
        train(model, optimizer, 10)
    assert same(*models)


def test_one_gradient_at_a_time() -> None:
    """The most bytes of gradients at any moment of backward: that of the largest tensor, not of all."""
    most = {}
    for released in (False, True):
        model = Network(width=64, blocks=6)
        parameters = list(model.parameters())
        seen: list[int] = []

        def look(_: Any, parameters: list[Tensor] = parameters, seen: list[int] = seen) -> None:
            seen.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

        optimizer = PinsAdamW(parameters, lr=1e-3)
        Pruner(model, optimizer, CONFIG, STEPS)
        for p in parameters:  # before the optimizer's own hook, while the gradient is there
            p.register_post_accumulate_grad_hook(look)
        if released:
            optimizer.release_gradients()
        train(model, optimizer, 3)
        most[released] = max(seen)
        assert len(seen) == 3 * len(parameters)
    sizes = [p.nbytes for p in parameters]
    assert most == {False: sum(sizes), True: max(sizes)}


def test_clipping_by_the_step_before() -> None:
    """By hand: a factor from the last step's norm, none in the first step."""
    model, optimizer, _ = start()
    other, other_optimizer, _ = start()
    optimizer.release_gradients(max_norm=0.05)
    factor = None
    for x, y in batches(STEPS):
        nn.functional.cross_entropy(model(x), y).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        other_optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        other_optimizer.clip_grad_norm_(0.05)
        factor, other_optimizer.grad_clip = other_optimizer.grad_clip, factor
        other_optimizer.step()
    assert factor is not None
    assert float(factor) < 1
    assert torch.allclose(
        nn.utils.parameters_to_vector(model.parameters()), nn.utils.parameters_to_vector(other.parameters()), atol=1e-6
    )


def test_clipping_by_tensor() -> None:
    model, other = Network(), Network()
    optimizer, plain = PinsSGD(model.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    optimizer.release_gradients(max_norm=0.01, clip="tensor")
    for x, y in batches(5):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        plain.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        for p in other.parameters():
            nn.utils.clip_grad_norm_([p], 0.01)
        plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-7)
    assert not same(other, Network())


def test_resuming_ends_at_the_same_bits() -> None:
    half, half_optimizer, half_pruner = start()
    half_optimizer.release_gradients(max_norm=0.05)
    train(half, half_optimizer, 33)
    again, again_optimizer, again_pruner = start()
    again.load_state_dict(half.state_dict())
    again_optimizer.load_state_dict(copy.deepcopy(half_optimizer.state_dict()))
    again_pruner.load_state_dict(half_pruner.state_dict())
    again_optimizer.release_gradients(max_norm=0.05)
    for o in (half_optimizer, again_optimizer):
        for group in o.param_groups:
            group["lr"] = 1e-3
    run_on = [(half, half_optimizer), (again, again_optimizer)]
    for model, own in run_on:
        for i, (x, y) in enumerate(batches(STEPS)):
            if i >= 33:
                nn.functional.cross_entropy(model(x), y).backward()
                own.step()
    assert same(half, again)


# ---- refused --------------------------------------------------------------------------------------------------------


def backward(model: nn.Module) -> None:
    x, y = next(batches(1))
    nn.functional.cross_entropy(model(x), y).backward()


def test_a_second_backward_is_refused() -> None:
    model, optimizer, _ = start()
    optimizer.release_gradients()
    backward(model)
    with pytest.raises(RuntimeError, match=r"came twice before optimizer\.step"):
        backward(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_of_shared_weights_is_refused(reentrant: bool) -> None:
    """Each part is a backward of its own, and would bring its share of their gradient."""
    model, optimizer, _ = start()
    block = model.layers[0].forward
    twice = lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)  # noqa: E731
    model.layers[0].forward = lambda x: twice(twice(x))
    optimizer.release_gradients()
    before = copy.deepcopy(model.layers[0])
    x, y = next(batches(1))
    loss = nn.functional.cross_entropy(model(x.requires_grad_()), y)
    if reentrant:
        with pytest.raises(RuntimeError, match=r"came twice .*use_reentrant=False"):
            loss.backward()
    else:
        loss.backward()
        optimizer.step()
        assert not same(model.layers[0], before)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"criterion": "movement"}, "criterion='movement'"),
        ({"criterion": "pins-update"}, "criterion='pins-update'"),
        ({"criterion": lambda p, g, lr: (p * g).abs()}, "a function as criterion"),
        ({"beta2": 0.0}, "criterion='pins' with beta2=0"),
    ],
)
def test_criteria_that_need_all_gradients_are_refused(change: dict[str, Any], named: str) -> None:
    model, optimizer, _ = start(PruneConfig(**({"delta_t": 5, "warmup": 5, "cooldown": 20} | change)))
    optimizer.release_gradients()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=named):
        backward(model)
    assert same(model, before)


def test_gradients_of_the_task_alone_are_refused() -> None:
    model, optimizer, pruner = start()
    optimizer.release_gradients()
    pruner.score_gradients = dict
    with pytest.raises(RuntimeError, match="score_gradient='task'"):
        backward(model)


def test_a_gradient_scaler_is_refused() -> None:
    model, optimizer, _ = start()
    optimizer.release_gradients()
    scaler = torch.amp.GradScaler("cpu")
    x, y = next(batches(1))
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="a GradScaler unscales gradients after backward"):
        scaler.step(optimizer)


def test_clipping_by_this_steps_norm_is_refused() -> None:
    model, optimizer, _ = start()
    optimizer.release_gradients()
    backward(model)
    with pytest.raises(RuntimeError, match=r"release_gradients\(max_norm=...\)"):
        optimizer.clip_grad_norm_(1.0)


def test_a_trainer_that_clips_by_this_steps_norm_is_refused(tmp_path: Path) -> None:
    _, optimizer, _ = start()
    refuse_unsupported(TrainingArguments(str(tmp_path)), optimizer)
    optimizer.release_gradients()
    with pytest.raises(ValueError, match="max_grad_norm=1 clips by this step's norm"):
        refuse_unsupported(TrainingArguments(str(tmp_path)), optimizer)
    refuse_unsupported(TrainingArguments(str(tmp_path), max_grad_norm=0.0), optimizer)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = start()
    optimizer.release_gradients()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        backward(model)


def test_fsdp_is_refused_by_name(tmp_path: Path) -> None:
    """Shards of one rank, which are DTensors as those of many."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Network()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = PinsAdamW(model.parameters())
        with pytest.raises(RuntimeError, match="before DistributedDataParallel or FSDP has reduced them"):
            optimizer.release_gradients()
        assert optimizer.release is None
        backward(model)
        optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_a_gradient_that_is_not_finite_skips_its_tensor_and_stops_the_run() -> None:
    model, optimizer, _ = start()
    optimizer.release_gradients(max_norm=1.0)
    train(model, optimizer, 12)
    before = copy.deepcopy(model)
    bad = model.layers[0].intermediate["dense"].weight
    bad.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), float("inf")))
    backward(model)
    with pytest.raises(RuntimeError, match="its tensor has not moved, others of this step have"):
        optimizer.step()
    moved = {
        name: not torch.equal(p, q) for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    assert not moved["layers.0.intermediate.dense.weight"]
    assert moved["layers.1.intermediate.dense.weight"]
    assert moved["classifier.weight"]


def test_parameters_that_came_later_and_copies_are_told() -> None:
    model = Network()
    optimizer = PinsAdamW(model.layers.parameters())
    optimizer.release_gradients()
    optimizer.add_param_group({"params": list(model.classifier.parameters())})
    backward(model)
    with pytest.raises(RuntimeError, match="was not released"):
        optimizer.step()
    _, twin_optimizer = copy.deepcopy((model, optimizer))
    with pytest.raises(RuntimeError, match="is a copy of one that released its gradients"):
        twin_optimizer.step()
    model.zero_grad()
    optimizer.release_gradients()
    backward(model)
    optimizer.step()
    with pytest.raises(ValueError, match="clip must be"):
        optimizer.release_gradients(clip="norm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.release_gradients(max_norm=-1)
