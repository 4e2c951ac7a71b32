"""Pruning inside the Hugging Face Trainer: a callback for any Trainer; `trainer.PinsTrainer` also saves safely.

Trainer(..., callbacks=[PinsCallback(PruneConfig(sparsity=0.8))])
Trainer(..., callbacks=[...], optimizer_cls_and_kwargs=optimizer(args))    # the same, in the optimizer's own pass
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pins_ext.distributed.first import on_first
from pins_ext.files.atomic import write_file
from pins_ext.integrations import logs as names
from pins_ext.integrations.evaluation import EvaluationView, score_of
from pins_ext.integrations.front import move_to_front
from pins_ext.integrations.loss_means import LossMeans
from pins_ext.integrations.timing import StepTimer, plain_step_seconds, pruning_seconds
from pins_ext.integrations.unsupported import refuse_frozen_base, refuse_release, refuse_unsupported
from pins_ext.optim import FusedOptimizer
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.pruner import Pruner
from pins_ext.wrappers import unwrapped_optimizer

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from pins_ext.regularization.self_regularizer import SelfRegularizer

PRUNER_FILE = "pins_pruner.safetensors"
TEACHER_FILE = "pins_teacher.safetensors"
ORIGIN_FILE = "pins_origin.json"

TARGET_TOLERANCE = 0.01
"""How far from its final sparsity a model may be and still become the best one (released code: |r - rF| <= .01)."""


class PinsCallback(TrainerCallback):
    """Prunes the model of a Trainer, and finalizes it when training ends.

    Logs carry, each name after `pins/`: sparsity, the share of the prunable weights that the last mask prunes; zeros,
    the share that is zero at this moment (less between two masks that let weights grow back); target_sparsity; nan
    (scores that are NaN); from the first mask on threshold and churn (share of mask bits that the last one flipped);
    and what pruning cost since the last log: pruning_ms, the mean per step, and pruning_share of the step's time. An
    evaluation's log has the zeros of the model that was evaluated, eval_pins/zeros. The history gets an entry for every
    new mask. A model that is not at its target sparsity can neither become the best one nor use up the patience of
    early stopping. Every checkpoint gets the pruner's own file.

    With a self-regularizer, and without gradient accumulation, logs carry the parts of the loss as means since the last
    log: pins/task_loss (the cross-entropy alone) and, over the steps that had a teacher, pins/divergence and
    pins/teacher_weight.

    Works in one process, under DistributedDataParallel and under FSDP 2 (`accelerate launch`, torchrun): every rank
    prunes, and the first writes. DeepSpeed and FSDP 1 are refused.

    A Trainer doesn't tell its callbacks which checkpoint it resumes from: with one elsewhere than
    `output_dir/checkpoint-N`, pass `resume_from`. A stock Trainer removes old checkpoints before this callback writes
    into the new one, so keep two (`save_total_limit >= 2`).

    Args:
        config: what to prune, how much and when; None prunes nothing.
        self_regularizer: adds the distance from an earlier checkpoint of the model to its loss.
        resume_from: the folder of the checkpoint that training resumes from.
        metric: the metric that the "best" teacher follows, and whether greater is better, where the Trainer's own
            `metric_for_best_model` names none; accuracy, or else the loss, when None.
        from_sparse: the model is sparse already: its zeros are part of every mask, and the schedule starts from them,
            see `Pruner.from_sparse`.
        frozen_base: prune what does not learn, below adapters that do, see `Pruner`. To resume, load the base as it
            was at the start.
        release: arguments of `FusedOptimizer.release_gradients`, such as `{"max_norm": 1.0}` or `{}`: each gradient is
            used and freed inside backward. It needs the optimizer of `optimizer(args)`, `max_grad_norm=0`, one backward
            a step and one process. None: gradients wait for the step.

    Attributes:
        pruner: the running pruner, from the start of training on.
        final: what `Pruner.finalize` returned.
        timer: of the steps.
        pruning_seconds: host time spent in pruning and in counting zeros for the log so far, the fused update apart.
        regularizes_forward: whether the self-regularizer replaces the loss in the model's own outputs; a Trainer with
            `SelfRegularizedLoss` switches it off.
    """

    def __init__(
        self,
        config: PruneConfig | None,
        self_regularizer: SelfRegularizer | None = None,
        resume_from: str | Path | None = None,
        metric: tuple[str, bool] | None = None,
        *,
        from_sparse: bool = False,
        frozen_base: bool = False,
        release: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.self_regularizer, self.metric = config, self_regularizer, metric
        self.from_sparse, self.frozen_base = from_sparse, frozen_base
        self.release = dict(release) if release is not None else None
        self.resume_from = Path(resume_from) if resume_from is not None else None
        self.pruner: Pruner | None = None
        self.final: dict[str, Any] | None = None
        self.at_target = config is None
        self.timer = StepTimer()
        self.pruning_seconds = 0.0
        self.saves_in_on_save = True
        self.regularizes_forward = True
        self._run = ""
        self._stats: tuple[Any, dict[str, Any]] = (None, {})
        self._view: EvaluationView | None = None
        self._released: FusedOptimizer | None = None
        self._losses = LossMeans()
        self._best_before: tuple[Any, ...] | None = None
        self._at_last_log = (0, 0.0, 0.0, 0.0)
        self._plain_seconds: float | None = None

    # ---- training ----------------------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach to the model and its optimizer; on resuming, go on from the checkpoint's own state."""
        refuse_unsupported(args, optimizer)
        move_to_front(self)
        if model is None or optimizer is None:
            raise ValueError("PinsCallback needs the Trainer's model and optimizer")
        if self.release is not None:
            refuse_release(args, type(unwrapped_optimizer(optimizer)), self.frozen_base)
        if self.frozen_base and self.config is not None:
            refuse_frozen_base(args, self.config)
        if self.self_regularizer is not None:
            self.self_regularizer.teacher.refuse_flattened()
        if self._view is not None:
            self._view.detach()
        self._end_release()
        if self.pruner is not None:
            self.pruner.detach()
        if self.config is not None:
            self.pruner = self.new_pruner(model, optimizer, state.max_steps)
            teacher = self.self_regularizer.teacher if self.self_regularizer is not None else None
            self._view = EvaluationView(self.pruner, teacher)
            if teacher is not None:
                teacher.snapshots_in = self.pruner.masked_view
        if self.self_regularizer is not None:
            self.self_regularizer.set_total_steps(state.max_steps)
            if self.regularizes_forward:
                self.self_regularizer.attach(model)
            if self.pruner is not None and self.self_regularizer.score_gradient == "task":
                self.self_regularizer.track_task_gradients(self.pruner.names)
                self.pruner.score_gradients = self.self_regularizer.take_task_gradients
        if self.release is not None:
            self._release(optimizer)
        if state.global_step > 0:
            self._restore(args, state)
        else:
            # The first rank writes it into files that all read.
            self._run = on_first(lambda: uuid.uuid4().hex)
            state.log_history.append({"step": 0, names.RUN: self._run})  # type: ignore[dict-item]

    def new_pruner(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> Pruner:
        """A pruner as training makes it."""
        assert self.config is not None
        make = Pruner.from_sparse if self.from_sparse else Pruner
        return make(model, optimizer, self.config, total_steps, self.frozen_base)

    def _release(self, optimizer: Optimizer) -> None:
        """Let the optimizer step inside backward, once it is clear that the pruner can do without gradients."""
        owner = unwrapped_optimizer(optimizer)
        assert isinstance(owner, FusedOptimizer)
        try:
            if owner.listener is not None:
                owner.listener.check_release()
            owner.release_gradients(**(self.release or {}))
        except (RuntimeError, ValueError) as error:
            if self.pruner is not None:
                self.pruner.detach()
            raise ValueError(str(error)) from error
        self._released = owner

    def _end_release(self) -> None:
        """A backward after training, or after a failure in it, must not step."""
        if self._released is not None:
            self._released.keep_gradients()
            self._released = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget a best model that was not at the target."""
        self._close_view()
        self._forget_early_best(state)
        self.timer.on_step_begin(args, state, control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are there and clipped."""
        self.timer.on_pre_optimizer_step(args, state, control)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weights are updated and masked."""
        self.timer.on_optimizer_step(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer has stepped and the weights are masked: note a new mask, renew the teacher by its policy."""
        if self.pruner is not None and self.pruner.schedule.is_new_mask(self.pruner.step - 1):
            t = self.pruner.step - 1
            entry = names.of_a_mask(self.stats(), 1 - self.pruner.schedule.remaining_ratio(t), t)
            state.log_history.append({"step": state.global_step, **entry})
        if self.self_regularizer is not None:
            self.self_regularizer.step(state.global_step)
            # Of one batch: with gradient accumulation, losses may be parts of the step's.
            if self.self_regularizer.last is not None and args.gradient_accumulation_steps == 1:
                self._losses.add(self.self_regularizer.last)
        self.timer.on_step_end(args, state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the pruner's statistics to what the Trainer logs and keeps in its history."""
        if logs is not None and "loss" in logs and self._losses:
            parts = names.named(self._losses.take())
            logs.update(parts)
            state.log_history[-1].update(parts)
        if self.pruner is None or logs is None or not {"loss", "eval_loss"} & logs.keys():
            return
        stats = self.stats()
        if "loss" in logs:
            shown = names.of_training(stats) | self._overhead(optimizer)
        else:
            shown = {names.EVALUATED_ZEROS: stats["zeros"]}
        logs.update(shown)
        state.log_history[-1].update(shown)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note whether this model may become the best one; show its score to the teacher policy that asks for it."""
        if self.pruner is not None:
            # The weights that a checkpoint would hold, not those that were evaluated.
            as_saved = not self.pruner.masks.in_view
            self.at_target = as_saved and abs(self.stats()["zeros"] - self.config_sparsity) <= TARGET_TOLERANCE
            state.log_history[-1][names.AT_TARGET] = self.at_target
            if not self.at_target:
                self._best_before = (state.best_metric, state.best_global_step, state.best_model_checkpoint)
        if self.self_regularizer is not None and metrics:
            score = score_of(args, metrics, self.metric)
            if score is not None:
                self.self_regularizer.evaluated(score)
        self._close_view()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """The weights are those of training again."""
        self._close_view()

    def _close_view(self) -> None:
        if self._view is not None:
            self._view.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the model to its target to the last weight, whichever way training ended, and verify it."""
        if self.self_regularizer is not None:
            self.self_regularizer.detach()
        if self._view is not None:
            self._view.detach()
        self._end_release()
        if self.pruner is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The Trainer has put the best model's weights back; its masks belong to them.
            step = state.best_global_step
            origin = {"run": self._run, "step": step} if step is not None else None
            self.pruner.load(Path(state.best_model_checkpoint) / PRUNER_FILE, origin)
        self.final = self.pruner.finalize()
        self._stats = (None, {})

    @property
    def config_sparsity(self) -> float:
        """The sparsity that a finished model has."""
        return 1 - self.pruner.schedule.final_ratio if self.pruner is not None else 0.0

    def stats(self) -> dict[str, Any]:
        """`Pruner.stats`, taken at most once per step, and once more within a view of the masked model."""
        assert self.pruner is not None
        moment = (self.pruner.step, self.pruner.masks.in_view)
        if self._stats[0] != moment:
            begin = time.perf_counter()
            self._stats = (moment, self.pruner.stats())
            self.pruning_seconds += self._stats[1]["ms"] / 1e3 + time.perf_counter() - begin
        return self._stats[1]

    def _overhead(self, optimizer: Optimizer | None) -> dict[str, float]:
        """What pruning cost per step since the last log: pruning_ms and pruning_share of the step's wall time."""
        now = (self.timer.steps, self.timer.seconds, self.timer.optimizer_seconds, self.pruning_seconds)
        steps, step, optimizer_step, outside = (x - before for x, before in zip(now, self._at_last_log, strict=True))
        self._at_last_log = now
        if not steps or not step:
            return {}
        if self._plain_seconds is None and optimizer is not None and self.pruner is not None and not self.frozen_base:
            self._plain_seconds = plain_step_seconds(optimizer, self.pruner.model)
        seconds = pruning_seconds(outside / steps, optimizer_step / steps, self._plain_seconds)
        return names.named({"pruning_ms": 1e3 * seconds, "pruning_share": seconds * steps / step})

    def _forget_early_best(self, state: TrainerState) -> None:
        if self._best_before is not None:
            state.best_metric, state.best_global_step, state.best_model_checkpoint = self._best_before
            self._best_before = None

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the pruner's and the teacher's state into the checkpoint that a stock Trainer has just written."""
        self._close_view()
        self._forget_early_best(state)
        if not self.saves_in_on_save:
            return
        folder = Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.save(folder, state.global_step, writes=args.should_save)
        if args.distributed_state is not None:
            # The other ranks may read it as soon as training ends, for the best model.
            args.distributed_state.wait_for_everyone()

    def save(self, folder: Path, step: int, writes: bool = True) -> None:
        """Write what resuming needs into a checkpoint folder; the file that tells where it came from is last.

        Args:
            folder: the checkpoint's.
            step: the optimizer steps made.
            writes: whether this rank does. Every rank must call, for states that are spread are put together.
        """
        origin = {"run": self._run, "step": step}
        if self.pruner is not None and (writes or not self.pruner.masks.ranks.alone):
            self.pruner.save(folder / PRUNER_FILE, origin)
        regularizer = self.self_regularizer
        if regularizer is not None and (writes or regularizer.teacher.ranks is not None):
            regularizer.save(folder / TEACHER_FILE, origin)
        if writes:
            write_file(folder / ORIGIN_FILE, json.dumps(origin))

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        """Load from the checkpoint that the Trainer resumed from.

        Raises:
            ValueError: it holds no pruner state, or that of another run or step.
        """
        folder = self.resume_from or Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        state.log_history = names.as_named_now(state.log_history)
        runs: list[Any] = [entry[names.RUN] for entry in state.log_history if names.RUN in entry]
        try:
            origin = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            origin = {}
        if not runs or origin != {"run": runs[-1], "step": state.global_step}:
            raise ValueError(
                f"training resumes at step {state.global_step}, but {folder} does not hold that step of this run with "
                f"PinsCallback in it; pass the checkpoint's folder as PinsCallback(resume_from=...)"
            )
        self._run = runs[-1]
        if self.pruner is not None:
            self.pruner.load(folder / PRUNER_FILE, origin)
            self.at_target = abs(self.stats()["zeros"] - self.config_sparsity) <= TARGET_TOLERANCE
            if not self.at_target:
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if self.self_regularizer is not None:
            self.self_regularizer.load(folder / TEACHER_FILE, origin)
