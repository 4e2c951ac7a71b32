"""The optimizer of a Trainer's arguments, with pruning in its own pass."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from pins_ext.optim import FusedOptimizer, PinsAdamW, PinsSGD


def optimizer(args: TrainingArguments, moment_dtype: str = "float32") -> tuple[type[FusedOptimizer], dict[str, Any]]:
    """What a Trainer takes as `optimizer_cls_and_kwargs`: the optimizer of `args.optim` with pruning in its own pass.

    The Trainer builds it over its usual two groups, so biases and norms get no weight decay. This is also the way that
    a Trainer accepts under FSDP, which forbids `optimizers=`.

    Args:
        args: of the Trainer.
        moment_dtype: storage of AdamW's two moments, see PinsAdamW.

    Returns:
        PinsAdamW with the learning rate, betas and eps of `args` for adamw_torch and adamw_torch_fused (the default);
        PinsSGD with the learning rate and `optim_args` (momentum, dampening, nesterov) for sgd.

    Raises:
        ValueError: any other `args.optim`: leave `optimizer_cls_and_kwargs` out, and PinsCallback follows its hooks; a
            moment_dtype for another one than AdamW.
    """
    fused: dict[Any, type[FusedOptimizer]] = {torch.optim.AdamW: PinsAdamW, torch.optim.SGD: PinsSGD}
    stock, options = Trainer.get_optimizer_cls_and_kwargs(args)
    if stock not in fused:
        raise ValueError(
            f"--optim {OptimizerNames(args.optim).value} has no pruning pass of its own (adamw_torch, "
            f"adamw_torch_fused and sgd have): leave optimizer_cls_and_kwargs out, "
            "and PinsCallback follows that optimizer by its hooks"
        )
    own = {name: value for name, value in options.items() if name != "fused"}
    if moment_dtype == "float32":
        return fused[stock], own
    if fused[stock] is not PinsAdamW:
        raise ValueError(f"moment_dtype={moment_dtype!r} is of PinsAdamW: use --optim adamw_torch, or leave it out")
    return PinsAdamW, own | {"moment_dtype": moment_dtype}
