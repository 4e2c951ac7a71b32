"""From a request to a Trainer that is ready to train: data, model, optimizer, pruning, everything checked."""

from __future__ import annotations

import math
import os
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, EarlyStoppingCallback, PrinterCallback, set_seed

from pins_ext import extras
from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.timing import StepTimer
from pins_ext.integrations.trainer import PinsTrainer
from pins_ext.integrations.unsupported import refuse_release
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.plan import ConflictWarning
from pins_ext.regularization.self_regularizer import SelfRegularizer
from pins_ext.runs.adapters import adapted
from pins_ext.runs.errors import UsageError
from pins_ext.runs.request import Request, RunOptions
from pins_ext.sparse.source import is_sparse
from pins_ext.tasks import Task, load_task, minilm_folder
from pins_ext.tasks.sources.hub import within_reach


@dataclass
class Prepared:
    """All of a run, before its first step.

    Attributes:
        model_name: as asked for.
        total_steps: optimizer steps.
        notes: what a reader of the results should know.
    """

    request: Request
    trainer: PinsTrainer
    task: Task
    pins: PinsCallback
    timer: StepTimer
    model_name: str
    total_steps: int
    notes: list[str]


def prepare(request: Request, folder: Path, task: Task | None = None, callbacks: tuple[Any, ...] = ()) -> Prepared:
    """Load, build and check.

    Args:
        folder: for the Trainer's checkpoints.
        task: one that is loaded and tokenised already.
        callbacks: further ones.

    Raises:
        UsageError: anything about the request that can't be done; nothing has been trained yet.
    """
    quiet()
    with as_usage_errors():
        if task is None:
            task = load_task(request.task)
        source, name = _model_source(request, task)
        if task.tokenizer is None:
            task = numbered_as_the_model(task, source, name)
            task = task.tokenized(from_pretrained(AutoTokenizer, source, name, **task.tokenizer_kwargs))
        request = fitted_to(request, task)
        args = request.training_arguments(folder)
        set_seed(args.seed)
        loaded = load_model(request.run, task, source, name)
        model = loaded.model
        task.check_model(model)
        lora = []
        if request.adapters.lora is not None:
            model, note = adapted(model, request.adapters, request.pruning or PruneConfig(), task)
            lora = [note]
        regularizer, notes = _regularizer(request, task, model)
        notes = [*task.notes, *([f"initialised at random: {loaded.new}"] if loaded.new else []), *lora, *notes]
        notes += _decided_on_validation(args, request) + request.notes
        metric = (task.main_metric, task.greater_is_better)
        pins = PinsCallback(
            request.pruning,
            regularizer,
            metric=metric,
            from_sparse=request.run.from_sparse,
            frozen_base=bool(lora),
            release=request.release,
        )
        settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        classes = {"adamw": PinsAdamW, "adamax": torch.optim.Adamax}
        optimizer = classes.get(request.run.optimizer)
        if request.release is not None:
            refuse_release(args, optimizer or torch.optim.Optimizer)
        own = {"moment_dtype": request.run.moment_dtype} if request.run.optimizer == "adamw" else {}
        early = [EarlyStoppingCallback(request.run.early_stopping)] if request.run.early_stopping else []
        trainer = PinsTrainer(
            pins=pins,
            callbacks=[*early, *callbacks],
            model=model,
            args=args,
            train_dataset=task.train,
            eval_dataset=task.validation,
            processing_class=task.tokenizer,
            data_collator=task.collator,
            compute_metrics=partial(task.compute_metrics, split="validation", model=model),
            preprocess_logits_for_metrics=task.reduce_logits,
            optimizer_cls_and_kwargs=None if optimizer is None else (optimizer, settings | own),
        )
        # From a forward with **kwargs the Trainer concludes that the loss is divided already, and does not divide the
        # losses it accumulates; only causal language models do divide.
        trainer.model_accepts_loss_kwargs = task.loss_over_step
        trainer.remove_callback(PrinterCallback)
        _, epoch, *_, total_steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
        _refuse_late_choice(request, args, epoch, total_steps)
    return Prepared(request, trainer, task, pins, pins.timer, name, total_steps, notes)


@contextmanager
def as_usage_errors() -> Iterator[None]:
    """While nothing has been trained, what is refused is the request."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(extras.advice(error, "train") or " ".join(str(error).split())) from error


def fitted_to(request: Request, task: Task) -> Request:
    """What the task's family prefers, where nothing else was asked for; the best model is best in the main metric."""
    training = {
        **request.training,
        **{name: value for name, value in task.training_defaults.items() if name not in request.given},
    }
    scores = (*task.metrics, "loss")
    if training.get("metric_for_best_model", "loss").removeprefix("eval_") not in scores:
        wrong = training["metric_for_best_model"]
        raise UsageError(f"--metric-for-best-model {wrong}: an evaluation of {task.name} tells {', '.join(scores)}")
    if training.get("load_best_model_at_end") or request.run.early_stopping:
        metric = training.get("metric_for_best_model", task.main_metric)
        if "metric_for_best_model" not in training:
            training["restore_callback_states_from_checkpoint"] = bool(request.run.early_stopping)
            training |= {"load_best_model_at_end": True, "metric_for_best_model": metric}
        if metric.removeprefix("eval_") == task.main_metric:
            training.setdefault("greater_is_better", task.greater_is_better)
        # The best model is one that was saved.
        for saved, evaluated in (("save_steps", "eval_steps"), ("save_strategy", "eval_strategy")):
            if evaluated in request.given and saved not in request.given:
                training[saved] = training[evaluated]
    return replace(request, training=training)


def _model_source(request: Request, task: Task) -> tuple[str, str]:
    """Where the model is, and what it is called."""
    if request.run.model:
        return request.run.model, request.run.model
    if not task.embedded_model:
        raise UsageError(
            f"{task.name} needs a causal language model, which the embedded MiniLM is not: name one with --model "
            "(gpt2, or a folder; with --random-init config.json and a tokenizer are enough)"
        )
    return str(minilm_folder()), "all-MiniLM-L6-v2 (embedded)"


class Loaded(NamedTuple):
    """A model with a task's head.

    Attributes:
        missing: weights that are not in the checkpoint, and random now.
        replaced: weights that have other shapes there, and are random now.
    """

    model: Any
    missing: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()

    @property
    def new(self) -> str:
        """What of it is random."""
        return ", ".join(sorted({*self.missing, *self.replaced}))


def load_model(asked: RunOptions, task: Task, source: str, name: str) -> Loaded:
    """The model with the task's head.

    Args:
        asked: dtype and random_init.
        task: whose head.
        source: a folder or a name on the hub.
        name: what to call it in errors.
    """
    kind, dtype = getattr(transformers, task.auto_class), getattr(torch, asked.dtype)
    if asked.random_init:
        config = from_pretrained(AutoConfig, source, name, **task.model_kwargs())
        return Loaded(kind.from_config(config, dtype=dtype), ("every weight (--random-init)",))
    model, loading = from_pretrained(
        kind, source, name, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **task.model_kwargs()
    )
    replaced = sorted(key for key, *_ in loading["mismatched_keys"])
    return Loaded(model, tuple(sorted(loading["missing_keys"])), tuple(replaced))


def numbered_as_the_model(task: Task, source: str, name: str) -> Task:
    """The task with its classes as a head that knows them numbers them: by others it would be read wrongly."""
    if not task.label_names:
        return task
    numbered = from_pretrained(AutoConfig, source, name).id2label or {}
    return task.numbered_as([str(label) for _, label in sorted(numbered.items())])


def _regularizer(request: Request, task: Task, model: Any) -> tuple[SelfRegularizer | None, list[str]]:
    asked = request.regularizer
    if not request.regularizes:
        return None, []
    weight, notes = asked.teacher_weight, []
    if not task.has_classes and weight == "adaptive" and "teacher_weight" not in request.given:
        weight, notes = 1.0, ["a regression has no entropy to adapt to: the distance to the teacher has weight 1"]
    regularizer = SelfRegularizer(
        model,
        teacher=asked.teacher,
        weight=weight,
        temperature=asked.temperature,
        score_gradient=asked.score_gradient,
        every=asked.teacher_every,
        ema_decay=asked.ema_decay,
        teacher_init=asked.teacher_init,
    )
    return regularizer, notes


def _decided_on_validation(args: transformers.TrainingArguments, request: Request) -> list[str]:
    """What a reader of the validation scores should know: the decisions of training that were taken by them."""
    decisions = {
        "the teacher (--teacher best)": request.needs_evaluations == "--teacher best",
        "when to stop (early stopping)": request.run.early_stopping,
        "which of its models is the final one (load_best_model_at_end)": args.load_best_model_at_end,
        "the learning rate (reduce_lr_on_plateau)": args.lr_scheduler_type == "reduce_lr_on_plateau",
    }
    known = "decided on the validation set, which training therefore has seen"
    return [f"{known}: {what}" for what, on in decisions.items() if on]


def _refuse_late_choice(request: Request, args: transformers.TrainingArguments, epoch: int, total_steps: int) -> None:
    """Refuse to choose the teacher by evaluations that all come when there is no step left to learn from it.

    Args:
        epoch: optimizer steps of one.
    """
    if request.needs_evaluations != "--teacher best":
        return
    steps = float(args.eval_steps or 0)
    every = epoch if args.eval_strategy == "epoch" else math.ceil(steps * total_steps) if steps < 1 else int(steps)
    if every >= total_steps:
        raise UsageError(
            f"--teacher best: the first evaluation comes at step {every} of {total_steps}, too late to learn from "
            "the model that it chooses: give --eval-strategy steps and fewer --eval-steps"
        )


def from_pretrained(kind: Any, source: str, name: str, **options: Any) -> Any:
    """Load from a folder or the hub; what goes wrong names the model and, for a hub name, says what it could be."""
    try:
        with nullcontext() if os.path.isdir(source) else within_reach():
            return kind.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        if is_sparse(Path(source)):
            raise UsageError(
                f"--model {name} is packed, as pins-ext export writes models: unpack it with "
                f"pins-ext export {shlex.quote(name)} --format dense"
            ) from error
        there = "" if os.path.isdir(source) else " (no such folder here; as a hub name it could not be loaded)"
        alone = "no file named" in str(error) and os.path.isfile(os.path.join(source, "config.json"))
        way_out = " (--random-init starts from config.json alone)" if alone else ""
        raise UsageError(f"--model {name}{there}: {' '.join(str(error).split())[:300]}{way_out}") from error


def quiet() -> None:
    """The libraries' own bars and hints would tear the display apart."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # The command prints them as notes.
    warnings.filterwarnings("ignore", category=ConflictWarning)
