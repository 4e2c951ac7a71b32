"""`--lora`: adapters learn, the frozen base below them is pruned, and the result is merged with its zeros kept."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from pins_ext.runs.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftModel

    from pins_ext.pruning.config import PruneConfig
    from pins_ext.runs.prepare import Prepared
    from pins_ext.runs.request import Request
    from pins_ext.tasks import Task

_TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
}
"""What peft calls a model with this head; but for language models it lets the head learn as a whole."""


def _flag(help: str, metavar: str) -> Any:
    return {"help": help, "metavar": metavar, "choices": None}


@dataclass(frozen=True)
class LoraOptions:
    """LoRA adapters over a frozen base that is pruned; needs peft."""

    lora: int | None = field(
        default=None,
        metadata=_flag(
            "adapters of this rank learn instead of the weights, which are pruned below them; the result is merged, "
            "with its zeros",
            "RANK",
        ),
    )
    lora_alpha: float | None = field(
        default=None, metadata=_flag("their update counts alpha / rank times [twice the rank]", "X")
    )
    lora_targets: tuple[str, ...] = field(
        default=(), metadata=_flag("layers that get one, by the ends of their names [those that are pruned]", "NAME")
    )

    def __post_init__(self) -> None:
        if self.lora is not None and self.lora < 1:
            raise ValueError(f"--lora must be a rank of at least 1; got {self.lora}")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"--lora-alpha must be above 0; got {self.lora_alpha:g}")


def check(request: Request) -> None:
    """Refuse what can't go with adapters, as far as flags tell.

    Raises:
        UsageError: with what to change.
    """
    given = {"lora_alpha", "lora_targets"} & request.given
    if request.adapters.lora is None:
        if given:
            raise UsageError(f"--{min(given).replace('_', '-')} is of --lora: give its rank, too")
        return
    if request.run.release_gradients:
        raise UsageError(
            "--lora frees the gradients of the base by itself, and those of adapters are small: leave out "
            "--release-gradients"
        )
    if request.pruning is not None and request.pruning.patterned:
        raise UsageError(
            "--lora: what is pruned of a frozen base stays so and need not fit a pattern: leave --pattern out"
        )
    if request.regularizes and request.regularizer.score_gradient == "task":
        raise UsageError("--lora: --score-gradient task needs gradients that are gone by then: use joint")
    if request.training.get("fp16") or request.run.dtype == "float16":
        raise UsageError("--lora: in float16 the base would be scored by gradients of a scaled loss: use bfloat16")


def adapted(model: Any, options: LoraOptions, pruning: PruneConfig, task: Task) -> tuple[Any, str]:
    """The model under new adapters, its base frozen, and a note of what learns.

    Args:
        model: with the task's head.
        options: rank and layers.
        pruning: what is pruned of it: the layers that get an adapter by default.
        task: whose head it is.

    Raises:
        UsageError: peft is missing, or no layer is meant.
        ValueError: peft has no adapter for a layer that was named.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError("--lora needs peft: pip install peft") from error
    targets = _targets(model, options, pruning)
    rank = options.lora
    assert rank is not None
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=options.lora_alpha or 2 * rank,  # type: ignore[arg-type]  # a factor, and used as one
        target_modules=targets,
        task_type=_TASK_TYPES[task.auto_class],
    )
    with warnings.catch_warnings():
        # Of GPT-2's layers, whose weights lie the other way round: peft sees that by itself.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        under: Any = peft.get_peft_model(model, config)
    learning, weights = (sum(p.numel() for p in under.parameters() if p.requires_grad or every) for every in (0, 1))
    return under, f"LoRA of rank {rank}: {learning:,} of {weights:,} weights learn, heads included; the base is frozen"


def adapter_shapes(model: Any, options: LoraOptions, pruning: PruneConfig) -> list[tuple[int, int]]:
    """Shapes of the tensors that peft would add, two for each linear layer; none without --lora.

    Args:
        model: may be on the meta device.
        options: rank and layers.
        pruning: what is pruned of it: the layers that get an adapter by default.

    Raises:
        UsageError: no layer is meant, or one without a matrix.
    """
    if options.lora is None:
        return []
    targets = tuple(f".{target}" for target in _targets(model, options, pruning))
    shapes = []
    for name, layer in model.named_modules():
        if f".{name}".endswith(targets):
            weight = getattr(layer, "weight", None)
            if weight is None or weight.dim() != 2:
                raise UsageError(f"--lora-targets: {name}, a {type(layer).__name__}, is no linear layer")
            shapes += [(options.lora, side) for side in weight.shape]
    return shapes


def _targets(model: Any, options: LoraOptions, pruning: PruneConfig) -> list[str]:
    """Ends of the names of the layers that get an adapter.

    Raises:
        UsageError: there is none.
    """
    from pins_ext.pruning.parameters import prunable_parameters

    targets = list(options.lora_targets) or _linear(model, prunable_parameters(model, pruning))
    if not targets:
        raise UsageError("--lora: what is pruned has no linear layer: name the layers with --lora-targets")
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            like = (_linear(model, [f"{name}.weight" for name in names if name]) or names[-1:])[0]
            raise UsageError(f"--lora-targets: no layer's name ends in {target}; names look like {like}")
    return targets


def _linear(model: Any, names: Collection[str]) -> list[str]:
    """Modules whose `weight` has one of these names and that peft can adapt."""
    from torch import nn

    modules = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    return [
        m for m in modules if isinstance(each := model.get_submodule(m), nn.Linear) or type(each).__name__ == "Conv1D"
    ]


def merge(prepared: Prepared) -> str:
    """Put the merged model in the place of the adapted one, in the trainer, the pruner and the scores.

    Returns:
        What the merge cost, in a sentence.

    Raises:
        ValueError, RuntimeError: see merge_lora; or a weight that a mask prunes is not zero.
    """
    from functools import partial

    from pins_ext.integrations.lora import merge_lora
    from pins_ext.pruning import inspection

    trainer, task, pins = prepared.trainer, prepared.task, prepared.pins
    merged = merge_lora(cast("PeftModel", trainer.model))
    model = merged.model
    trainer.model = trainer.model_wrapped = model
    trainer.compute_metrics = partial(task.compute_metrics, split="validation", model=model)
    if pins.pruner is not None and pins.final is not None:
        pins.pruner.detach()
        pins.pruner.model = model
        parameters = dict(zip(pins.pruner.names, pins.pruner.parameters, strict=True))
        pins.final = {**pins.final, **inspection.verify(model, parameters, pins.pruner.masks, ())}
    return (
        f"merged: a plain merge would have filled {merged.refilled:,} zeros of the adapted layers; "
        f"{merged.dropped:.1%} of the update's squared norm lay on zeros and is lost. Evaluations on the way are of "
        "base and adapters, the final ones of the merged model"
    )
