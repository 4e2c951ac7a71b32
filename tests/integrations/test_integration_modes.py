"""Ways of training that go with pruning: accumulation, mixed precision, clipping, checkpointing, compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bert import (
    CONFIG,
    STEPS,
    WITHOUT_DROPOUT,
    arguments,
    assert_at_target,
    assert_same,
    collate,
    data,
    model,
    pins,
    stock,
    weights,
)
from torch import Tensor
from transformers import TrainerCallback

from pins_ext import PruneConfig, Pruner
from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.optimizer import optimizer
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.regularization.self_regularizer import SelfRegularizer


def run(folder: Path, net: Any = None, fused: bool = True, teacher: bool = False, **changes: Any) -> Any:
    """A whole run of a stock Trainer."""
    net = model(**WITHOUT_DROPOUT) if net is None else net
    args = arguments(folder, save_strategy="no", **changes)
    callback = PinsCallback(CONFIG, SelfRegularizer(net, every=3) if teacher else None)
    trained = stock(net, args, callback, optimizer_cls_and_kwargs=optimizer(args) if fused else None)
    trained.train()
    assert_at_target(callback)
    return trained


@pytest.mark.parametrize("fused", [True, False])
def test_accumulated_gradients_prune_as_one_large_batch(tmp_path: Path, fused: bool) -> None:
    """One importance update per optimizer step. Sums in another order differ in their last bits, no more."""
    # SGD passes such a difference on as it is; AdamW would divide it by a gradient near zero.
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "fused": fused}
    trained = []
    for size, accumulation in ((8, 1), (2, 4)):
        net = model(**WITHOUT_DROPOUT)
        # The Trainer believes that every model with **kwargs divides by num_items_in_batch; a classifier does not.
        net.accepts_loss_kwargs = False
        settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trained.append(run(tmp_path, net, **settings))
    whole, parts = trained
    pruners = [pins(one).pruner for one in trained]
    assert [pruner.step for pruner in pruners if pruner] == [STEPS, STEPS]
    flips = sum(int((a.mask(name) != b.mask(name)).sum()) for a, b in [pruners] if a and b for name in a.names)
    # A weight whose score is within rounding of the threshold may fall on either side of it.
    assert flips <= 4
    for name, left in weights(whole).items():
        far = (left - weights(parts)[name]).abs() > 1e-6
        assert int(far.sum()) <= flips, name


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_autocast(tmp_path: Path, fused: bool) -> None:
    trained = run(tmp_path, bf16=True, fused=fused, teacher=True)
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    exact = run(tmp_path, fused=fused, teacher=True)
    assert not torch.equal(weights(trained)["classifier.weight"], weights(exact)["classifier.weight"])
    torch.testing.assert_close(
        trained.state.log_history[-1]["train_loss"], exact.state.log_history[-1]["train_loss"], rtol=0.05, atol=0
    )


@pytest.mark.parametrize("kind", [PinsAdamW, torch.optim.AdamW])
def test_float16_autocast_with_a_gradient_scaler(kind: Any) -> None:
    """In a loop of one's own: accelerate has no float16 on a CPU. Two steps overflow and are skipped."""
    net = model(**WITHOUT_DROPOUT)
    opt = kind(net.parameters(), lr=5e-3)
    pruner = Pruner(net, opt, CONFIG, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    skipped = 0
    for i in range(STEPS + 2):
        batch = collate(data()[4 * i % 40 :][:4])
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = net(**batch).loss
        scaler.scale(loss).backward()
        if i in (3, 8):
            net.classifier.weight.grad[0, 0] = float("inf")  # type: ignore[index]
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        before, scale = net.classifier.weight.clone(), scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            assert torch.equal(net.classifier.weight, before)
    assert skipped == 2
    # A fused optimizer counts a skipped step, one with hooks is not called at all.
    assert pruner.step == (STEPS + 2 if kind is PinsAdamW else STEPS)
    final = pruner.finalize()
    assert final["zeros"] == pruner.n_weights - round(0.25 * pruner.n_weights)
    assert all(bool(torch.isfinite(t).all()) for t in pruner.importance.exp_avg_ipt)


class Gradients(TrainerCallback):
    """Notes the norms of the gradients that the optimizer is about to see."""

    def __init__(self) -> None:
        self.total: list[float] = []
        self.each: list[list[float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
        self.total.append(sum(norm**2 for norm in norms.values()) ** 0.5)
        self.each.append([norms[name] for name in prunable_parameters(model, CONFIG)])


def test_importance_is_taken_from_clipped_gradients(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    def criterion(p: Tensor, g: Tensor, lr: float) -> Tensor:
        seen.append((float(g.norm()), lr))
        return (lr * g * g - p * g).abs()

    config = PruneConfig(0.75, criterion=criterion, delta_t=2, warmup=2, cooldown=4)
    gradients = Gradients()
    args = arguments(tmp_path, save_strategy="no", max_grad_norm=1e-3, warmup_steps=4, logging_steps=1)
    trained = stock(model(), args, PinsCallback(config), gradients)
    trained.train()
    assert [norm for norm, _ in seen] == [norm for step in gradients.each for norm in step]
    assert max(gradients.total) <= 1.001e-3
    assert min(entry["grad_norm"] for entry in trained.state.log_history if "loss" in entry) > 1e-3
    # The learning rate is that of the coming step: it begins at 0 and warms up for four steps.
    rates = [lr for _, lr in seen[:: len(gradients.each[0])]]
    assert rates[:5] == pytest.approx([0, 1.25e-3, 2.5e-3, 3.75e-3, 5e-3])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("teacher", [False, True])
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, teacher: bool) -> None:
    plain = run(tmp_path, model(), teacher=teacher)
    recomputed = run(
        tmp_path,
        model(),
        teacher=teacher,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert recomputed.model.is_gradient_checkpointing
    assert_same(weights(recomputed), weights(plain))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("backend", "fused"),
    [
        ("eager", True),
        pytest.param("eager", False, marks=pytest.mark.slow),
        pytest.param("aot_eager", True, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_torch_compile(tmp_path: Path, backend: str, fused: bool) -> None:
    torch._dynamo.reset()
    compiled = run(tmp_path, fused=fused, teacher=True, torch_compile=True, torch_compile_backend=backend)
    assert hasattr(compiled.model_wrapped, "_orig_mod")
    regularizer = pins(compiled).self_regularizer
    assert regularizer is not None
    assert regularizer.stats()["divergence"] > 0
    plain = run(tmp_path, fused=fused, teacher=True)
    if backend == "eager":
        assert_same(weights(compiled), weights(plain))
    losses = [trained.state.log_history[-1]["train_loss"] for trained in (compiled, plain)]
    # Other kernels round otherwise, and a dozen steps of AdamW carry it on.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
