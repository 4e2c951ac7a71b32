"""What each rank of test_fsdp_trainer.py does: a stock Trainer under FSDP 2 on CPUs; and one process, to compare."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bert import CONFIG, STEPS, WITHOUT_DROPOUT, arguments, collate, data, model
from sharded import digest, whole
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.clipping import ClipInPass
from pins_ext.integrations.optimizer import optimizer
from pins_ext.regularization.self_regularizer import SelfRegularizer

MAX_NORM = 0.05
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}


class Digests(TrainerCallback):
    """Notes masks and weights after every step, and the weights' zeros at every evaluation; dies at `until`."""

    def __init__(self, callback: PinsCallback, until: int | None = None) -> None:
        self.callback, self.until = callback, until
        self.masks: list[str] = []
        self.weights: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        pruner = self.callback.pruner
        assert pruner is not None
        self.masks.append(digest(whole(pruner.mask(name)) for name in pruner.names))
        self.weights.append(digest(whole(p) for p in model.parameters()))
        if state.global_step == self.until:
            raise KeyboardInterrupt


class Doubled(Trainer):
    """Gives every rank the same batches, in order: their gradients are equal, and so is the mean of them."""

    def get_train_dataloader(self) -> Any:
        return DataLoader(data(4 * STEPS), batch_size=4, collate_fn=collate)  # type: ignore[arg-type]


class Clipped(ClipInPass, Doubled):
    """Clips within the optimizer's pass."""


def as_launched() -> None:
    """Give this rank the environment that torchrun gives."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def talk_into_fsdp() -> None:
    """accelerate ignores FSDP on CPUs without a word; torch does not. It looks for a kind of accelerator."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def launched(folder: Path, **changes: Any) -> TrainingArguments:
    """The arguments of one of several ranks, as torchrun starts them, under FSDP 2."""
    settings = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "average_tokens_across_devices": False}
    if not dist.is_initialized():
        return arguments(folder, **(settings | changes))
    as_launched()
    args = arguments(folder, **({"fsdp": True, "fsdp_config": FSDP} | settings | changes))
    talk_into_fsdp()
    return args


def train(
    folder: Path,
    fused: bool,
    until: int | None = None,
    resume: bool = False,
    kind: type[Doubled] = Doubled,
    max_norm: float = 0.0,
    teacher: str = "none",
    **more: Any,
) -> dict[str, Any]:
    """One run, to its end or until it dies; more: arguments."""
    changes: dict[str, Any] = (
        more | {"max_grad_norm": max_norm, "logging_steps": 1} | ({} if fused else {"optim": "sgd"})
    )
    args = launched(folder, eval_strategy="steps", eval_steps=5, **changes)
    net = model(**WITHOUT_DROPOUT)
    regularizer = SelfRegularizer(net, teacher, every=3) if teacher != "none" else None
    callback = PinsCallback(CONFIG, regularizer)
    digests = Digests(callback, until)
    options: dict[str, Any] = {"optimizer_cls_and_kwargs": optimizer(args)} if fused else {}
    trainer = kind(
        net, args, callbacks=[callback, digests], eval_dataset=data(8), data_collator=collate,
        **options,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert isinstance(trainer.model, nn.Module)
    return {
        "type": str(trainer.accelerator.distributed_type),
        "masks": digests.masks,
        "weights": digests.weights,
        "final": callback.final,
        "evaluated": evaluated,
        "norms": [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry],
        "at end": digest(whole(p) for p in trainer.model.parameters()),
    }


def everything(folder: Path) -> dict[str, Any]:
    """All runs of one rank."""
    torch.manual_seed(0)
    told: dict[str, Any] = {
        "fused": train(folder / "fused", True),
        "hooked": train(folder / "hooked", False),
        "clipped": train(folder / "clipped", True, max_norm=MAX_NORM),
        "clipped hooked": train(folder / "clipped-hooked", False, max_norm=MAX_NORM),
        "clipped in pass": train(folder / "clipped-in-pass", True, kind=Clipped, max_norm=MAX_NORM),
        "killed": train(folder / "killed", True, until=10),
        "latest killed": train(folder / "latest", True, until=10, teacher="latest"),
    }
    options = {
        "activation_checkpointing": True,
        "reshard_after_forward": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    told["options"] = train(folder / "options", True, fsdp_config=FSDP | options)
    told["bfloat16"] = train(folder / "bfloat16", True, bf16=True, gradient_accumulation_steps=2, max_steps=STEPS // 2)
    told["latest resumed"] = train(folder / "latest", True, resume=True, teacher="latest")
    told |= {name: train(folder / name, True, teacher=name) for name in ("latest", "best", "ema")}
    return told | {"resumed": train(folder / "killed", True, resume=True)}
