"""The gradient of the task loss alone: what is gathered beside the joint one, and in which units it is handed over."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from pins_ext.regularization.self_regularizer import SelfRegularizer


class Net(nn.Module):
    """The parameter registered last is one that the loss never reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 16)
        self.classifier = nn.Linear(16, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(torch.tanh(self.first(x)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(8, 6, generator=generator), "labels": torch.randint(3, (8,), generator=generator)}


def regularized(model: nn.Module, **settings: Any) -> SelfRegularizer:
    """With a teacher far from the model, so that the joint gradient is another one."""
    reg = SelfRegularizer(model, every=1, weight=2.0, score_gradient="task", **settings)
    reg.step()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return reg


def task_gradient(model: nn.Module, seeds: list[int], scale: float = 1.0) -> dict[str, Tensor]:
    loss = sum(scale * model(**batch(seed))["loss"] for seed in seeds)
    named = {name: p for name, p in model.named_parameters() if "unused" not in name}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(found: dict[str, Tensor] | None, wanted: dict[str, Tensor]) -> None:
    assert found is not None
    assert found.keys() == wanted.keys()
    for name in wanted:
        # sums in another order
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attached", [False, True])
def test_gathered_over_batches_scaled_unscaled_and_clipped_as_p_grad(attached: bool) -> None:
    model = Net()
    reg = regularized(model)
    if attached:
        reg.attach(model)
    scale = 1024.0 / 2
    for seed in (1, 2):
        outputs = model(**batch(seed))
        loss = outputs["loss"] if attached else reg(outputs, batch(seed))
        (loss * scale).backward()
    reg.detach()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(1024)
    norm = clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.1
    gradients = reg.take_task_gradients()
    assert_same(gradients, task_gradient(model, [1, 2], 0.5 * 0.1 / float(norm)))
    assert reg.take_task_gradients() is None


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("weight", [5.0, -0.5])
def test_another_loss_beside_it_changes_nothing_but_the_clipping(weight: float, clips: bool) -> None:
    model = Net()
    reg = regularized(model)
    aux = sum(weight * p.square().sum() for p in model.parameters())
    (reg(model(**batch(1)), batch(1)) + aux).backward()
    factor = 0.1 / float(clip_grad_norm_(model.parameters(), 0.1)) if clips else 1.0
    assert_same(reg.take_task_gradients(), task_gradient(model, [1], factor))


def test_a_copy_finds_its_own_factor() -> None:
    model = Net()
    reg = regularized(model)
    reg(model(**batch(1)), batch(1)).backward()
    reg.take_task_gradients()
    other, copied = copy.deepcopy((model, reg))
    other.zero_grad()
    copied(other(**batch(2)), batch(2)).backward()
    factor = 0.1 / float(clip_grad_norm_(other.parameters(), 0.1))
    assert_same(copied.take_task_gradients(), task_gradient(other, [2], factor))
    # The parameter that is looked at may be replaced.
    other.classifier.bias = nn.Parameter(torch.zeros(3))
    other.zero_grad()
    copied(other(**batch(3)), batch(3)).backward()
    factor = 0.1 / float(clip_grad_norm_(other.parameters(), 0.1))
    assert_same(copied.take_task_gradients(), task_gradient(other, [3], factor))


def test_the_joint_gradient_is_what_it_was() -> None:
    gradients = []
    for score_gradient in ("joint", "task"):
        model = Net()
        reg = regularized(model)
        reg.score_gradient = score_gradient
        reg(model(**batch(1)), batch(1)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_zeroed_gradients_begin_anew() -> None:
    model = Net()
    reg = regularized(model)
    reg(model(**batch(1)), batch(1)).backward()
    model.zero_grad()
    reg(model(**batch(2)), batch(2)).backward()
    assert_same(reg.take_task_gradients(), task_gradient(model, [2]))
    reg(model(**batch(2)), batch(2)).backward()
    reg.step()
    assert reg.take_task_gradients() is None


def test_without_a_teacher_p_grad_is_the_task_gradient() -> None:
    model = Net()
    reg = SelfRegularizer(model, every=5, score_gradient="task")
    reg(model(**batch(1)), batch(1)).backward()
    assert reg.take_task_gradients() is None


def test_detaching_lets_go_of_the_parameters() -> None:
    model = Net()
    reg = regularized(model)
    reg.attach(model)
    for _ in range(2):
        model(**batch(1))["loss"].backward()
        assert sum(bool(p._post_accumulate_grad_hooks) for p in model.parameters()) == 1
        gradients = reg.take_task_gradients()
        reg.detach()
        assert_same(gradients, task_gradient(model, [1]))
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        model.zero_grad()
        reg.attach(model)


def test_only_tracked_parameters_are_gathered() -> None:
    model = Net()
    reg = regularized(model)
    reg.track_task_gradients(["first.weight"])
    reg(model(**batch(1)), batch(1)).backward()
    gradients = reg.take_task_gradients()
    assert gradients is not None
    assert list(gradients) == ["first.weight"]


def test_sixteen_bit_gradients_keep_their_dtype() -> None:
    model = Net().bfloat16()
    reg = regularized(model)
    inputs = batch(1) | {"x": batch(1)["x"].bfloat16()}
    reg(model(**inputs), inputs).backward()
    clip_grad_norm_(model.parameters(), 0.01)
    gradients = reg.take_task_gradients()
    assert gradients is not None
    assert {g.dtype for g in gradients.values()} == {torch.bfloat16}
    assert max(float(g.abs().max()) for g in gradients.values()) < 0.01


class Sharded(nn.Parameter):
    """Looks like a DTensor from outside."""

    placements = ("Shard(0)",)


def test_sharded_parameters_are_refused() -> None:
    model = Net()
    fixed = Net()
    model.first.weight = Sharded(model.first.weight.detach())
    reg = SelfRegularizer(model, fixed, score_gradient="task")
    with pytest.raises(RuntimeError, match=r"whole parameters.*are sharded: use score_gradient='joint'"):
        reg(model(**batch(1)), batch(1))


class FullyShardedDataParallel(Net):
    """A stand-in for FSDP 1, known by its name."""


def test_a_teacher_of_flat_vectors_is_refused() -> None:
    with pytest.raises(RuntimeError, match="of which there is no teacher='latest': use FSDP 2"):
        SelfRegularizer(FullyShardedDataParallel(), every=1).step()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = Net()
    del model.unused
    parallel = nn.parallel.DistributedDataParallel(model)
    reg = regularized(parallel)
    reg.attach(parallel)
    with parallel.no_sync():
        parallel(**batch(rank))["loss"].backward()
    parallel(**batch(2 + rank))["loss"].backward()
    reg.detach()
    norm = clip_grad_norm_(model.parameters(), 0.1)
    found = reg.take_task_gradients()
    torch.save(
        {"found": found, "wanted": task_gradient(model, [0, 1, 2, 3], 0.1 / float(norm) / 2)}, f"{folder}/{rank}"
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_of_distributed_data_parallel_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert_same(first["found"], first["wanted"])
    assert all(torch.equal(first["found"][name], second["found"][name]) for name in first["found"])
