"""Self-regularization: the model is held near an earlier checkpoint of itself while it is pruned.

Source: Ren & Zhu, "Pruning Pre-trained Language Models with Principled Importance and Self-regularization", Findings of
ACL 2023, and its released code; the distance is Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pins_ext.files import tensor_file
from pins_ext.regularization import heads
from pins_ext.regularization.plain_loss import PlainLoss, mean_of_rows, plain_loss
from pins_ext.regularization.task_gradient import TaskGradient
from pins_ext.regularization.teacher import Source, Teacher
from pins_ext.wrappers import unwrapped, unwrapped_optimizer

SCORE_GRADIENTS = ("joint", "task")

_FORMAT = "pins_ext.teacher"

_COPIED = "this model is a copy of one that a SelfRegularizer is attached to, and the copy has none attached"

_BATCHES_BEFORE_A_WARNING = 500
"""No usual training accumulates so many batches in one optimizer step."""


@dataclass(frozen=True)
class Losses:
    """The parts of the last batch's loss: detached scalars on the model's device.

    Attributes:
        task: cross-entropy or squared error.
        total: what the model is trained on.
        divergence: mean distance D from the teacher.
        weight: its mean weight. None while there is no teacher.
    """

    task: Tensor
    total: Tensor
    divergence: Tensor | None = None
    weight: Tensor | None = None


class SelfRegularizer:
    """Adds the distance from a teacher, an earlier checkpoint of the model itself, to the task loss.

    With D of `heads.divergence` and CE the task loss of a row (an example, a token, a span's start), the loss is

        weight="adaptive"     mean(a D + (1 - a) CE),  a = 1 - H(softmax(student)) / log C, detached   (released code)
        weight=lambda         mean(CE) + lambda mean(D)

    Rows with label -100 count nowhere; with num_items_in_batch a mean is the sum divided by it; a span's start and end
    are averaged. While there is no teacher D has weight 0: the loss is mean(CE).

    Args:
        model: the model that is trained: of transformers, or any module whose outputs have `.logits` (a dict or a bare
            tensor will do). DistributedDataParallel and torch.compile wrappers are looked through.
        teacher: "latest" (a snapshot every n steps), "best" (a snapshot when `evaluated` hears the best score so far:
            the dev set takes part in training), "ema" (running average of the weights, from step n on), "none", or a
            fixed one: a folder or hub name, loaded with the model's class, or a module, frozen and used as it is.
        weight: "adaptive", or a constant lambda >= 0. One output has no entropy: "adaptive" is refused for regression.
        temperature: T > 0 of D.
        score_gradient: "joint", or "task": the pruner scores with the gradient of the task loss alone, see
            `take_task_gradients`; costs a second backward and one more gradient; one device or DistributedDataParallel.
        every: n, steps between snapshots of "latest" and "ema"; total_steps // 20 when None.
        total_steps: steps of the whole run, for `every`; `set_total_steps` may tell it later.
        ema_decay: of "ema", weight of the old average, in [0, 1); 1 - 1 / every when None.
        teacher_init: folder, hub name or module of the same architecture, the teacher before the first snapshot.
        head: one of `heads.HEADS`, or "auto": from the class of a transformers model, else from the first batch.

    Attributes:
        teacher: the `Teacher`; its `module` is None while there is none.
        last: the `Losses` of the last batch.
        seconds: wall time on the host of the teacher's forward passes and of the losses so far; backward and a GPU's
            own time are not in it.

    Raises:
        ValueError: a setting out of range, a teacher that can't be loaded or lacks weights, a task without a distance.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Source = "latest",
        weight: str | float = "adaptive",
        temperature: float = 2.0,
        score_gradient: str = "joint",
        *,
        every: int | None = None,
        total_steps: int | None = None,
        ema_decay: float | None = None,
        teacher_init: Source | None = None,
        head: str = "auto",
    ) -> None:
        if weight != "adaptive" and (isinstance(weight, str) or not 0 <= weight < math.inf):
            raise ValueError(f"weight must be 'adaptive' or a number >= 0, got {weight!r}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a number > 0, got {temperature!r}")
        if score_gradient not in SCORE_GRADIENTS:
            raise ValueError(f"score_gradient must be one of {', '.join(SCORE_GRADIENTS)}, got {score_gradient!r}")
        if head not in (*heads.HEADS, "auto"):
            raise ValueError(f"head must be 'auto' or one of {', '.join(heads.HEADS)}, got {head!r}")
        self.model = unwrapped(model)
        self.weight, self.temperature, self.score_gradient = weight, temperature, score_gradient
        self.head = heads.head_of_model(self.model) if head == "auto" else head
        self.teacher = Teacher(self.model, teacher, every, ema_decay, teacher_init)
        self._refuse_adaptive_regression()
        self.last: Losses | None = None
        self.seconds = 0.0
        self._batches_without_step = 0
        self._task_gradient = TaskGradient(self.model)
        self._handles: list[Any] = []
        self._left = False  # a copy, of one that was attached
        self._warned_of_copy = False
        self._plain: PlainLoss | None = None
        if total_steps is not None:
            self.set_total_steps(total_steps)

    def _refuse_adaptive_regression(self) -> None:
        if self.head == "regression" and self.weight == "adaptive" and self.teacher.policy != "none":
            raise ValueError(
                "weight='adaptive' needs class probabilities, and this is a regression: give a number, as weight=1.0"
            )

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def __call__(
        self, outputs: Any, inputs: Mapping[str, Any], num_items_in_batch: int | float | Tensor | None = None
    ) -> Tensor:
        """Loss of one batch, to call backward on. The teacher sees the same inputs, without dropout.

        Args:
            outputs: the model's outputs for the batch.
            inputs: the batch by argument name, labels included.
            num_items_in_batch: rows that count in all batches of the optimizer step, if their losses are to be summed.

        Returns:
            A float32 scalar; `last` holds its parts.

        Raises:
            ValueError: labels are missing or don't fit, or the teacher answers another task.
        """
        return self._loss(outputs, inputs, (), _without_labels(inputs), num_items_in_batch)

    def _loss(
        self, outputs: Any, inputs: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], num_items: Any
    ) -> Tensor:
        begin = time.perf_counter()
        loss = self._task_or_joint_loss(outputs, inputs, args, kwargs, num_items)
        self.seconds += time.perf_counter() - begin
        return loss

    def _task_or_joint_loss(
        self, outputs: Any, inputs: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], num_items: Any
    ) -> Tensor:
        if self.head is None:
            self.head = heads.head_of_outputs(outputs, inputs)
            self._refuse_adaptive_regression()
        rows = heads.rows(self.head, outputs, inputs)
        if self.teacher.module is None:
            self._notice_missing_steps()
            task = plain_loss(self.head, rows, num_items)
            self.last = Losses(task.detach(), task.detach())
            return task
        teachers = heads.row_logits(self.head, self.teacher(args, kwargs))
        parts = [self._parts(self.head, row, t, num_items) for row, t in zip(rows, teachers, strict=True)]
        task, total, divergence, weight = (torch.stack(part).mean() for part in zip(*parts, strict=True))
        self.last = Losses(task.detach(), total.detach(), divergence, weight)
        if self.score_gradient == "joint":
            return total
        self._task_gradient.refuse_sharded()
        return self._task_gradient.watch(task, total)

    def _parts(self, head: str, row: heads.Rows, teacher: Tensor, num_items: Any) -> tuple[Tensor, ...]:
        """Task loss, joint loss, mean distance and mean weight of one list of rows."""
        task = heads.task_loss(head, row)
        distance = heads.divergence(head, row.logits, teacher, self.temperature)
        if isinstance(self.weight, str):
            a = heads.confidence(row.logits)
            joint = a * distance + (1 - a) * task
        else:
            a = torch.full_like(task.detach(), self.weight)
            joint = task + a * distance
        means = (mean_of_rows(x.detach(), row.valid) for x in (distance, a))
        return mean_of_rows(task, row.valid, num_items), mean_of_rows(joint, row.valid, num_items), *means

    # ---- attachment -------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Put this loss in the place of `outputs.loss` in training mode, whoever calls the model; evaluation stays.

        The task loss is computed again from logits and labels. So a model that weighs classes, smooths labels or adds
        an auxiliary loss is refused: here, or when one of the first batches shows it.

        Args:
            model: the model that was given to the constructor, or a wrapper of it.
            optimizer: when given, `step` follows each of its steps. Attach after the Pruner, whose zeros come first.

        Raises:
            ValueError: another model, or one with a loss module that has class weights or label smoothing.
        """
        if unwrapped(model) is not self.model:
            raise ValueError(
                "attach was given another model than the constructor: a SelfRegularizer belongs to one model"
            )
        self.detach()
        self._plain = PlainLoss(self.model)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
            return self._after_forward(module, args, kwargs, outputs)

        def after_optimizer(*_: Any) -> None:
            self.step()

        self._left = False
        # Functions, not methods: a deep copy of the model, as the teacher is, keeps the function and no copy of us.
        self._handles = [self.model.register_forward_hook(after_forward, with_kwargs=True)]
        if optimizer is not None:
            self._handles.append(unwrapped_optimizer(optimizer).register_step_post_hook(after_optimizer))

    def detach(self) -> None:
        """Undo `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._task_gradient.detach()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel copies the model and not its teacher: start one process per GPU (torchrun)"
            )
        if module is not self.model:
            self._warn_of_copy(module)
            return outputs
        if not module.training:
            return outputs
        inputs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        positional = tuple(None if name in heads.LABELS else x for name, x in zip(inputs, args, strict=False))
        num_items = inputs.get("num_items_in_batch")
        loss = self._loss(outputs, inputs, positional, _without_labels(kwargs), num_items)
        if self._plain is not None and self.head is not None:
            self._plain.check(self.head, outputs, inputs, num_items)
        if isinstance(outputs, MutableMapping):
            outputs["loss"] = loss
        elif isinstance(outputs, Tensor | tuple):
            raise TypeError(
                f"a {type(outputs).__name__} has no loss that could be replaced: return a dict or an object with .loss "
                f"and .logits (transformers: return_dict=True), or call reg(outputs, inputs) yourself"
            )
        else:
            try:
                outputs.loss = loss
            except AttributeError as error:  # frozen, or with slots
                kind = type(outputs).__name__
                raise TypeError(
                    f"the loss of a {kind} can't be replaced: call reg(outputs, inputs) yourself"
                ) from error
        return outputs

    def _warn_of_copy(self, module: nn.Module) -> None:
        # Teachers and averages are copies, too, but don't train.
        if module.training and torch.is_grad_enabled() and not self._warned_of_copy:
            self._warned_of_copy = True
            warnings.warn(f"{_COPIED}: its loss is the plain one", stacklevel=5)

    def __getstate__(self) -> dict[str, Any]:
        # What follows the model and the optimizer follows no copies.
        return {**self.__dict__, "_handles": [], "_left": bool(self._handles) or self._left}

    # ---- the training loop ------------------------------------------------------------------------------------------

    def set_total_steps(self, total_steps: int) -> None:
        """Take a snapshot every total_steps // 20 steps, unless `every` was given.

        Args:
            total_steps: optimizer steps of the run.
        """
        if self.teacher.every is None:
            self.teacher.every = max(1, total_steps // 20)

    def step(self, step: int | None = None) -> None:
        """Call after every optimizer step, masking included: here snapshots and the running average are taken.

        Args:
            step: optimizer steps finished so far, this one included; one more than last time when None. A step that was
                told already changes nothing.

        Raises:
            ValueError: the step went back, or `every` is not known.
        """
        self._batches_without_step = -1
        self._task_gradient.clear()
        self.teacher.step(step)

    def _notice_missing_steps(self) -> None:
        """Warn, once, where batch after batch comes and no step is ever told: there would never be a teacher."""
        if self._batches_without_step >= 0 and self.teacher.policy in ("latest", "ema"):
            self._batches_without_step += 1
            if self._batches_without_step == _BATCHES_BEFORE_A_WARNING:
                warnings.warn(
                    f"{_BATCHES_BEFORE_A_WARNING} batches and no SelfRegularizer.step(): there will be no teacher. "
                    "Call step() after each optimizer step, or attach(model, optimizer)",
                    stacklevel=4,
                )

    def evaluated(self, score: float) -> bool:
        """Tell a dev score: the "best" teacher becomes the model whose score beats all before.

        Of several processes every one calls this, with the score of the whole dev set, the same on all; where the model
        is cut over them, that of the first decides.

        Args:
            score: of the model as it is now; higher is better.

        Returns:
            Whether a snapshot was taken; False for other teachers, and for NaN.
        """
        return self.teacher.evaluated(score)

    def take_task_gradients(self) -> dict[str, Tensor] | None:
        """Gradients of the task loss alone since the last call, by parameter name; see `TaskGradient`.

        For the pruner, when the optimizer is about to step: scaled and clipped as p.grad is at that moment. None says
        that p.grad is the task's gradient already: score_gradient="joint", or no teacher yet.

        Raises:
            RuntimeError: this is a copy of a SelfRegularizer that was attached, and was not attached itself.
        """
        if self._left:
            raise RuntimeError(f"{_COPIED}: attach(model, optimizer) it before the pruner asks for its gradients")
        return self._task_gradient.take()

    def track_task_gradients(self, names: Iterable[str]) -> None:
        """Gather task gradients of these parameters only.

        Args:
            names: of the pruned parameters, as in `named_parameters`.
        """
        self._task_gradient.names = frozenset(names)

    # ---- what the user asks for -------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """The parts of the last batch's loss as numbers, for a log; costs one synchronisation."""
        parts = {name: x for name, x in vars(self.last).items() if x is not None} if self.last else {}
        return dict(zip(parts, torch.stack([*parts.values()]).tolist(), strict=True)) if parts else {}

    def plan(self) -> dict[str, Any]:
        """What it will do and cost: the settings, whether it reads the dev set, "memory" in bytes by what it holds."""
        memory = self.teacher.nbytes()
        if self.score_gradient == "task" and self.teacher.policy != "none":
            memory["task gradient"] = sum(p.nbytes for p in self._task_gradient.tracked().values())
        facts = {"head": self.head, "every": self.teacher.every, "reads_dev": self.teacher.policy == "best"}
        return self._settings() | facts | {"memory": {name: size for name, size in memory.items() if size}}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """All that resuming needs: {"meta": plain data, "tensors": the teacher's by name}, none for a fixed one.

        The tensors are the live ones, which the next step changes: save or clone them. Tied tensors are there once. A
        running average of 16-bit weights is stored in float32; the teacher is its rounding.
        """
        meta, tensors = self.teacher.state_dict()
        return {"meta": self._settings() | meta, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a state_dict of a SelfRegularizer of the same model and settings.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: other settings, other parameters or shapes; the message lists the differences.
        """
        meta = state["meta"]
        other = [
            f"{key}={meta.get(key)!r} (now {now!r})" for key, now in self._settings().items() if meta.get(key) != now
        ]
        if other:
            raise ValueError(f"the checkpoint's self-regularization has other settings: {', '.join(other)}")
        self.teacher.load_state_dict(meta, state["tensors"])
        self._task_gradient.clear()

    def save(self, path: str | Path, origin: Mapping[str, Any] | None = None) -> None:
        """Write the state to one safetensors file, aside and then renamed; contents are checked by hash on loading.

        Of a model that is cut over ranks every rank calls this, and one writes.

        Args:
            path: where to.
            origin: what the file belongs to, such as a run and a step of it; `load` compares it.

        Raises:
            OSError: the file can't be written; on the ranks that don't write a RuntimeError.
        """
        state, ranks = self.state_dict(), self.teacher.ranks

        def write() -> None:
            tensor_file.write(path, _FORMAT, state["meta"], state["tensors"], origin)

        write() if ranks is None else ranks.write(write)

    def load(self, path: str | Path, origin: Mapping[str, Any] | None = None) -> None:
        """Read what `save` wrote.

        Args:
            path: the file.
            origin: what it must belong to; a file of an earlier version doesn't say, which is warned of.

        Raises:
            ValueError: a file that is damaged, foreign, of another origin or of other settings.
        """
        meta, tensors = tensor_file.read(path, _FORMAT, origin)
        self.load_state_dict({"meta": meta, "tensors": tensors})

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on."""
        return {
            "teacher": self.teacher.source,
            "weight": self.weight,
            "temperature": self.temperature,
            "score_gradient": self.score_gradient,
            "ema_decay": self.teacher.ema_decay,
        }


def _without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in heads.LABELS}
