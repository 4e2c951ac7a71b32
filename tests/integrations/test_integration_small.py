"""PinsCallback from a sparse start, with released gradients, over a frozen base; and what can't go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bert import CONFIG, STEPS, WITHOUT_DROPOUT, arguments, assert_at_target, assert_same, model, pins, stock, weights
from torch import Tensor, nn
from transformers import Trainer

import pins_ext
from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.optimizer import optimizer
from pins_ext.integrations.trainer import PinsTrainer
from pins_ext.optim import PinsAdamW, PinsSGD
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.parameters import prunable_parameters

SINGLE = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}


def build(folder: Path, net: Any = None, kind: type[Trainer] = Trainer, fused: bool = True, **options: Any) -> Trainer:
    """A Trainer whose callback gets these options; `args` are of its arguments."""
    args = arguments(folder, **(SINGLE | options.pop("args", {})))
    callback = PinsCallback(options.pop("config", CONFIG), **options)
    own = {"optimizer_cls_and_kwargs": optimizer(args)} if fused else {}
    net = model(**WITHOUT_DROPOUT) if net is None else net
    if kind is PinsTrainer:
        return stock(net, args, kind=kind, pins=callback, **own)
    return stock(net, args, callback, kind=kind, **own)


def sparse(share: float = 0.5, **changes: Any) -> Any:
    """A model whose prunable weights are zero to this share."""
    net = model(**WITHOUT_DROPOUT, **changes)
    with torch.no_grad():
        for p in prunable_parameters(net, CONFIG).values():
            p.flatten()[: round(share * p.numel())] = 0
    return net


def zeros(net: nn.Module) -> dict[str, Tensor]:
    return {name: p == 0 for name, p in prunable_parameters(net, CONFIG).items()}


# ---- released gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Trainer, pytest.param(PinsTrainer, marks=pytest.mark.slow)])
def test_released_gradients_train_as_gradients_that_wait(tmp_path: Path, kind: type[Trainer]) -> None:
    """Without clipping, to the last bit; and once it has ended, a backward moves nothing."""
    runs = [build(tmp_path / str(i), kind=kind, release=release) for i, release in enumerate((None, {}))]
    for run in runs:
        run.train()
        assert_at_target(pins(run))
    assert_same(weights(runs[0]), weights(runs[1]))
    logged = [entry for entry in runs[1].state.log_history if "loss" in entry]
    assert not any(entry.get("grad_norm") for entry in logged)
    net, after = runs[1].model, weights(runs[1])
    assert isinstance(net, nn.Module)
    net(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([0])).loss.backward()
    assert_same(weights(runs[1]), after)


@pytest.mark.slow
def test_released_gradients_are_clipped_and_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": PinsTrainer, "release": {"max_norm": 0.05}}
    whole = build(tmp_path / "whole", **options)
    whole.train()
    unclipped = build(tmp_path / "unclipped", kind=PinsTrainer, release={})
    unclipped.train()
    assert any(not torch.equal(a, b) for a, b in zip(*(weights(r).values() for r in (whole, unclipped)), strict=True))
    again = build(tmp_path / "whole", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert_same(weights(again), weights(whole))


@pytest.mark.parametrize(
    ("args", "options", "said"),
    [
        ({"max_grad_norm": 1.0}, {}, "max_grad_norm=1 clips by this step's norm"),
        ({"gradient_accumulation_steps": 2}, {}, "gradient_accumulation_steps=2"),
        ({"fp16": True}, {}, "GradScaler unscales gradients after backward"),
        ({}, {"fused": False}, "AdamW can't release gradients"),
        ({}, {"config": PruneConfig(criterion="movement", warmup=2, cooldown=4)}, "criterion='movement'"),
        ({}, {"config": PruneConfig(criterion="pins-update", warmup=2, cooldown=4)}, "criterion='pins-update'"),
        ({}, {"config": PruneConfig(beta2=0.0, warmup=2, cooldown=4)}, "criterion='pins' with beta2=0"),
        ({}, {"config": PruneConfig(criterion=lambda p, g, lr: p * g, warmup=2, cooldown=4)}, "a function as"),
        ({}, {"release": {"clip": "norm"}}, "clip must be 'previous' or 'tensor'"),
    ],
)
def test_what_released_gradients_exclude(
    tmp_path: Path, args: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    half = args.pop("fp16", False)
    run = build(tmp_path, args=args, **({"release": {}} | options))
    run.args.fp16 = half  # a Trainer takes it on a GPU alone
    before = weights(run)
    with pytest.raises(ValueError, match=said):
        run.train()
    assert_same(weights(run), before)


def test_released_gradients_are_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pins_ext.integrations.unsupported import refuse_release

    args = arguments(tmp_path, **SINGLE)
    refuse_release(args, PinsSGD)
    with pytest.raises(ValueError, match="a frozen base frees its own gradients"):
        refuse_release(args, PinsAdamW, frozen_base=True)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match="DistributedDataParallel or FSDP has reduced them over the 2 ranks"):
        refuse_release(args, PinsAdamW)


def test_moments_are_stored_as_asked(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    kind, settings = optimizer(args, moment_dtype="8bit")
    made = kind([nn.Parameter(torch.ones(40))], **settings)
    assert isinstance(made, PinsAdamW)
    assert made.moment_dtype == "8bit"
    assert "moment_dtype" not in optimizer(arguments(tmp_path, optim="sgd"))[1]
    with pytest.raises(ValueError, match="moment_dtype='8bit' is of PinsAdamW"):
        optimizer(arguments(tmp_path, optim="sgd"), moment_dtype="8bit")


# ---- sparse start ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("release", [None, {}], ids=["kept", "released"])
def test_a_sparse_start_is_pruned_further_and_resumes(tmp_path: Path, release: Any) -> None:
    start = zeros(sparse())
    whole = build(tmp_path / "a", sparse(), PinsTrainer, from_sparse=True, release=release)
    whole.train()
    assert_at_target(pins(whole))
    end = weights(whole)
    assert all(not torch.count_nonzero(end[name][there]) for name, there in start.items())
    again = build(tmp_path / "a", sparse(), PinsTrainer, from_sparse=True, release=release)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    assert_same(weights(again), end)
    # Without it they return between masks, and may in the end.
    plain = build(tmp_path / "b", sparse(), PinsTrainer)
    plain.train()
    assert any(torch.count_nonzero(weights(plain)[name][there]) for name, there in start.items())


def test_a_start_that_is_dense_or_too_sparse_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no zeros in its prunable parameters"):
        build(tmp_path, from_sparse=True).train()
    with pytest.raises(ValueError, match="has more zeros already"):
        build(tmp_path, sparse(0.9), from_sparse=True).train()


# ---- frozen base ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "delta_t", "said"),
    [
        ({"gradient_accumulation_steps": 2}, 1, "a delta_t of 2 or more"),
        ({"fp16": True}, 2, "fp16 scales the loss"),
    ],
)
def test_what_a_frozen_base_excludes(tmp_path: Path, args: dict[str, Any], delta_t: int, said: str) -> None:
    half = args.pop("fp16", False)
    config = PruneConfig(delta_t=delta_t, warmup=2, cooldown=4, criterion="platon")
    run = build(tmp_path, adapted(), args=args, config=config, frozen_base=True)
    run.args.fp16 = half  # a Trainer takes it on a GPU alone
    with pytest.raises(ValueError, match=said):
        run.train()


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    settings = {"r": 2, "target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}
    return peft.get_peft_model(model(**WITHOUT_DROPOUT), peft.LoraConfig(**settings))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("sparse_start", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_frozen_base_is_pruned_below_lora_and_the_merge_keeps_its_zeros(tmp_path: Path, sparse_start: bool) -> None:
    """Masks fall on the base while adapters learn; every zero of theirs is in the merged model, under its own name."""
    net = adapted()
    config = PruneConfig(sparsity=0.75, delta_t=2, warmup=2, cooldown=4, criterion="platon")
    if sparse_start:
        with torch.no_grad():
            for p in prunable_parameters(net, config, frozen_too=True).values():
                p.flatten()[: p.numel() // 2] = 0
    accumulated = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    run = build(tmp_path, net, args=accumulated, config=config, frozen_base=True, from_sparse=sparse_start)
    run.train()
    callback = pins(run)
    assert_at_target(callback)
    pruner = callback.pruner
    assert pruner is not None
    assert pruner.step == STEPS
    masks = {name: pruner.mask(name) for name in pruner.names}
    pruner.detach()
    merged = pins_ext.merge_lora(net)
    after = dict(merged.model.named_parameters())
    assert masks.keys() <= after.keys()
    assert not any(torch.count_nonzero(after[name][~mask]) for name, mask in masks.items())
    assert callback.final is not None
    assert sum(int((after[name] == 0).sum()) for name in masks) == callback.final["zeros"]
    assert merged.refilled > 100
