"""Ways of training with a Trainer in which pruning would silently do the wrong thing: refused before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainingArguments

from pins_ext.optim import FusedOptimizer
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.kept import folds_at_once
from pins_ext.wrappers import unwrapped_optimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer


def refuse_unsupported(args: TrainingArguments, optimizer: Optimizer | None = None) -> None:
    """Refuse what no pruner can follow.

    Args:
        args: of the Trainer.
        optimizer: its optimizer, wrapped or not.

    Raises:
        ValueError: DeepSpeed, or released gradients with what they exclude.
    """
    launched = args.distributed_state.distributed_type if args.distributed_state is not None else None
    if args.deepspeed or launched == "DEEPSPEED":
        raise ValueError("DeepSpeed steps its optimizer inside backward, where pruning can't follow: train without it")
    if optimizer is not None and getattr(unwrapped_optimizer(optimizer), "release", None) is not None:
        refuse_release(args, type(unwrapped_optimizer(optimizer)))


def refuse_release(args: TrainingArguments, kind: type, frozen_base: bool = False) -> None:
    """Refuse what can't go with gradients that are used and freed inside backward.

    Args:
        args: of the Trainer.
        kind: its optimizer's class.
        frozen_base: whether the pruned weights don't learn.

    Raises:
        ValueError: with what to change.
    """
    if not issubclass(kind, FusedOptimizer):
        raise ValueError(
            f"{kind.__name__} can't release gradients: PinsAdamW and PinsSGD do, which a Trainer makes with "
            "optimizer_cls_and_kwargs=pins_ext.integrations.transformers.optimizer(args)"
        )
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm:g} clips by this step's norm, and released gradients are gone by then: "
            "set it to 0 (--max-grad-norm 0), and clip by the norm of the step before with "
            f"release_gradients(max_norm={args.max_grad_norm:g}) (--release-norm {args.max_grad_norm:g})"
        )
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}: released gradients are used by the first "
            "backward of a step, so that there is nothing to accumulate: set it to 1 "
            "(--gradient-accumulation-steps 1), with larger batches"
        )
    if args.world_size > 1:
        raise ValueError(
            f"released gradients are used before DistributedDataParallel or FSDP has reduced them over the "
            f"{args.world_size} ranks: train in one process, or keep the gradients"
        )
    if args.fp16:
        raise ValueError(
            "fp16 scales the loss, and its GradScaler unscales gradients after backward, when released ones have been "
            "used: train in bfloat16 (bf16, or bfloat16 weights), or keep the gradients"
        )
    if frozen_base:
        raise ValueError(
            "a frozen base frees its own gradients inside backward already, and those of adapters are small: release "
            "none"
        )


def refuse_frozen_base(args: TrainingArguments, config: PruneConfig) -> None:
    """Refuse what can't go with weights that don't learn and whose gradients are used inside backward.

    Args:
        args: of the Trainer.
        config: of the pruner.

    Raises:
        ValueError: with what to change.
    """
    if args.fp16:
        raise ValueError(
            "fp16 scales the loss by a factor that changes, and the importance of a frozen base is made of the scaled "
            "gradients inside backward: train in bfloat16 (bf16, or bfloat16 weights)"
        )
    if folds_at_once(config) and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}: delta_t=1 over a frozen base keeps no "
            "window, so that a step has one backward: use a delta_t of 2 or more, or larger batches"
        )
