"""Pruning inside the Hugging Face Trainer: a callback for any Trainer; `trainer.PinsTrainer` also saves safely.

Trainer(..., callbacks=[PinsCallback(PruneConfig(sparsity=0.8))])
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pins_ext.config import PruneConfig
from pins_ext.integrations.saving import write_file
from pins_ext.pruner import Pruner

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from pins_ext.teacher import SelfRegularizer

PRUNER_FILE = "pins_pruner.safetensors"
TEACHER_FILE = "pins_teacher.safetensors"
ORIGIN_FILE = "pins_origin.json"

TARGET_TOLERANCE = 0.01
"""How far from its final sparsity a model may be and still become the best one (released code: |r - rF| <= .01)."""

MASK_ENTRY = "mask_sparsity"
"""An entry of the Trainer's history with this key was made right after a mask was applied."""

_LOGGED = ("sparsity", "target_sparsity", "threshold", "nan")


class PinsCallback(TrainerCallback):
    """Prunes the model of a Trainer, and finalizes it when training ends.

    Logs carry sparsity and threshold, and the history gets an entry for every new mask. A model that is not at its
    target sparsity can neither become the best one nor use up the patience of early stopping. Every checkpoint gets the
    pruner's own file.

    A Trainer doesn't tell its callbacks which checkpoint it resumes from: with one elsewhere than
    `output_dir/checkpoint-N`, pass `resume_from`. A stock Trainer removes old checkpoints before this callback writes
    into the new one, so keep two (`save_total_limit >= 2`).

    Args:
        config: what to prune, how much and when; None prunes nothing.
        self_regularizer: adds the distance from an earlier checkpoint of the model to its loss.
        resume_from: the folder of the checkpoint that training resumes from.

    Attributes:
        pruner: the running pruner, from the start of training on. final: what `Pruner.finalize` returned.
        pruning_seconds: host time spent in pruning so far, the fused update apart.
    """

    def __init__(
        self,
        config: PruneConfig | None,
        self_regularizer: SelfRegularizer | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        self.config, self.self_regularizer = config, self_regularizer
        self.resume_from = Path(resume_from) if resume_from is not None else None
        self.pruner: Pruner | None = None
        self.final: dict[str, Any] | None = None
        self.at_target = config is None
        self.pruning_seconds = 0.0
        self.saves_in_on_save = True
        self._run = uuid.uuid4().hex
        self._stats: dict[str, Any] = {}
        self._best_before: tuple[Any, ...] | None = None

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
        refuse_unsupported(args)
        if model is None or optimizer is None:
            raise ValueError("PinsCallback needs the Trainer's model and optimizer")
        if self.pruner is not None:
            self.pruner.detach()
        if self.config is not None:
            self.pruner = Pruner(model, optimizer, self.config, total_steps=state.max_steps)
        if self.self_regularizer is not None:
            self.self_regularizer.set_total_steps(state.max_steps)
            self.self_regularizer.attach(model)
            if self.pruner is not None and self.self_regularizer.score_gradient == "task":
                self.self_regularizer.track_task_gradients(self.pruner.names)
                self.pruner.score_gradients = self.self_regularizer.take_task_gradients
        if state.global_step > 0:
            self._restore(args, state)
        else:
            state.log_history.append({"step": 0, "pins_run": self._run})  # type: ignore[dict-item]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget a best model that was not at the target."""
        self._forget_early_best(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer has stepped and the weights are masked: note a new mask, take a new teacher if one is due."""
        if self.pruner is not None and _has_new_mask(self.pruner):
            stats, schedule, t = self.stats(), self.pruner.schedule, self.pruner.step - 1
            entry = {"step": state.global_step, MASK_ENTRY: stats["sparsity"]}
            entry["target_sparsity"] = 1 - schedule.remaining_ratio(t)
            state.log_history.append(entry | {name: stats[name] for name in ("threshold", "churn")})
        if self.self_regularizer is not None:
            self.self_regularizer.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the pruner's statistics to what the Trainer logs and keeps in its history."""
        if self.pruner is None or logs is None or not {"loss", "eval_loss"} & logs.keys():
            return
        stats = self.stats()
        if "loss" in logs:
            shown = {name: stats[name] for name in _LOGGED}
            masks = [entry for entry in state.log_history if MASK_ENTRY in entry]
            logs.update({MASK_ENTRY: masks[-1][MASK_ENTRY]} if masks else {})
        else:
            shown = {"eval_sparsity": stats["sparsity"]}
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
            self.at_target = abs(self.stats()["sparsity"] - self.config_sparsity) <= TARGET_TOLERANCE
            state.log_history[-1]["at_target"] = self.at_target
            if not self.at_target:
                self._best_before = (state.best_metric, state.best_global_step, state.best_model_checkpoint)
        if self.self_regularizer is not None and metrics:
            score = _score(args, metrics)
            if score is not None:
                self.self_regularizer.evaluated(score)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the model to its target to the last weight, whichever way training ended, and verify it."""
        if self.self_regularizer is not None:
            self.self_regularizer.detach()
        if self.pruner is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The Trainer has put the best model's weights back; its masks belong to them.
            self.pruner.load(Path(state.best_model_checkpoint) / PRUNER_FILE)
        self.final = self.pruner.finalize()
        self._stats = {}

    @property
    def config_sparsity(self) -> float:
        """The sparsity that a finished model has."""
        return 1 - self.pruner.schedule.final_ratio if self.pruner is not None else 0.0

    def stats(self) -> dict[str, Any]:
        """`Pruner.stats`, taken at most once per step."""
        assert self.pruner is not None
        if self._stats.get("step") != self.pruner.step:
            self._stats = self.pruner.stats()
            self.pruning_seconds += self._stats["ms"] / 1e3
        return self._stats

    def _forget_early_best(self, state: TrainerState) -> None:
        if self._best_before is not None:
            state.best_metric, state.best_global_step, state.best_model_checkpoint = self._best_before
            self._best_before = None

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the pruner's and the teacher's state into the checkpoint that a stock Trainer has just written."""
        self._forget_early_best(state)
        if self.saves_in_on_save and state.is_world_process_zero:
            self.save(Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", state.global_step)

    def save(self, folder: Path, step: int) -> None:
        """Write what resuming needs into a checkpoint folder; the file that tells where it came from is last."""
        if self.pruner is not None:
            self.pruner.save(folder / PRUNER_FILE)
        if self.self_regularizer is not None:
            self.self_regularizer.save(folder / TEACHER_FILE)
        write_file(folder / ORIGIN_FILE, json.dumps({"run": self._run, "step": step}))

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        """Load from the checkpoint that the Trainer resumed from.

        Raises:
            ValueError: it holds no pruner state, or that of another run or step.
        """
        folder = self.resume_from or Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        runs: list[Any] = [entry["pins_run"] for entry in state.log_history if "pins_run" in entry]
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
            self.pruner.load(folder / PRUNER_FILE)
            self.at_target = abs(self.stats()["sparsity"] - self.config_sparsity) <= TARGET_TOLERANCE
            if not self.at_target:
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if self.self_regularizer is not None:
            self.self_regularizer.load(folder / TEACHER_FILE)


def _has_new_mask(pruner: Pruner) -> bool:
    """Whether the step that has just ended applied a mask of its own, not merely the last one again."""
    t, schedule = pruner.step - 1, pruner.schedule
    return schedule.mask_due(t) and (t % schedule.delta_t == 0 or t == schedule.final_start)


def refuse_unsupported(args: TrainingArguments) -> None:
    """Raise ValueError for a way of training in which pruning would silently do the wrong thing."""
    launched = args.distributed_state.distributed_type if args.distributed_state is not None else None
    if args.deepspeed or launched == "DEEPSPEED":
        raise ValueError("DeepSpeed steps its optimizer inside backward, where pruning can't follow: train without it")
    if args.fsdp:
        raise ValueError("FSDP is not supported by PinsCallback yet: train on one device")


def _score(args: TrainingArguments, metrics: Mapping[str, float]) -> float | None:
    """The evaluation's score, higher is better: the best model's metric, else accuracy, else the negative loss."""
    name = args.metric_for_best_model or ("eval_accuracy" if "eval_accuracy" in metrics else "eval_loss")
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        return None
    greater = args.greater_is_better if args.metric_for_best_model else not name.endswith("loss")
    return metrics[name] if greater else -metrics[name]
