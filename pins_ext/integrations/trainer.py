"""A Trainer whose checkpoints are whole or absent, and whose resumed run ends with the weights of an unbroken one."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from pins_ext.distributed.first import on_first
from pins_ext.files import random_state
from pins_ext.files.atomic import (
    IncompleteError,
    clear_leftovers,
    newest_complete,
    read_manifest,
    rotate,
    written_aside,
)
from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.clipping import ClipInPass
from pins_ext.integrations.finite import FiniteWatch, check_weights
from pins_ext.wrappers import unwrapped_optimizer

EPOCH_RANDOM_STATE = "random_state_of_epoch"

logger = logging.get_logger(__name__)


class PinsTrainer(ClipInPass, Trainer):
    """A Trainer with a `PinsCallback` built in.

    A checkpoint is written aside, pruner and teacher included, flushed to disk, renamed, and only then old ones go;
    resuming takes the newest whole one. Evaluations draw no random numbers from training, and every epoch begins with
    the random state it had, so data order and dropout of a resumed run are those of an unbroken one. Training stops at
    the first loss or gradient norm that is not finite, and weights that are not finite are never saved.

    In several processes it works under DistributedDataParallel, and the first process writes.

    Args:
        pins: the callback that prunes; it must not be among `callbacks` as well.
        others: what Trainer takes, by keyword.

    Raises:
        ValueError: FSDP, or several GPUs in one process.
    """

    def __init__(self, pins: PinsCallback, callbacks: list[Any] | None = None, **kwargs: Any) -> None:
        self.pins = pins
        pins.saves_in_on_save = False
        self._epoch_random_state: dict[str, Any] | None = None
        self._resumed_from: Path | None = None
        self._saving_in: Path | None = None
        self._finite = FiniteWatch()
        super().__init__(callbacks=[pins, *(callbacks or [])], **kwargs)
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("PinsTrainer saves whole models: under FSDP use a stock Trainer with PinsCallback")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible, and one process takes one: set CUDA_VISIBLE_DEVICES=0, or start "
                f"with torchrun --nproc-per-node {self.args.n_gpu}"
            )

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; True resumes from the newest whole checkpoint in the output folder, a path from that one.

        Raises:
            IncompleteError: there is none, or the one at the path is damaged.
            NonFiniteError: a loss, a gradient norm or a weight became NaN or infinite.
        """
        on_first(partial(clear_leftovers, Path(self.args.output_dir or "")))
        self._resumed_from = on_first(partial(self._checkpoint, resume_from_checkpoint))
        self.pins.resume_from = self._resumed_from
        output = super().train(str(self._resumed_from) if self._resumed_from else None, *args, **kwargs)
        self._check_finite()
        return output

    # ---- finite numbers ----------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's, and looks at the loss."""
        loss = super().training_step(*args, **kwargs)
        self._finite.look("loss", self.state.global_step + 1, loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(unwrapped_optimizer(self.optimizer), "release", None) is not None:
            # The gradients are gone: a norm of none would be 0.
            return None
        norm = super()._get_grad_norm(*args, **kwargs)
        # A gradient scaler finds its scale by infinite gradients, and leaves those steps out.
        if norm is not None and self.accelerator.scaler is None:
            self._finite.look("gradient norm", self.state.global_step + 1, norm)
        return norm

    def _check_finite(self) -> None:
        self._finite.settle()
        check_weights(cast(nn.Module, self.model), self.state.global_step)

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def _checkpoint(self, wanted: str | bool | None) -> Path | None:
        if not wanted:
            return None
        root = Path(self.args.output_dir or "")
        folder, passed = (Path(wanted), []) if isinstance(wanted, str) else newest_complete(root)
        for reason in passed:
            logger.warning(f"passed over: {reason}")
        if folder is None:
            raise IncompleteError(f"{root} holds no whole checkpoint to resume from")
        then, now = read_manifest(folder).get("numerics"), _numerics()
        numerics = then if isinstance(then, dict) else {}
        changed = [
            f"{name} {numerics[name]} -> {now[name]}" for name in now if numerics.get(name, now[name]) != now[name]
        ]
        if changed:
            logger.warning(f"resumed weights may differ in their last bits: {', '.join(changed)}")
        return folder

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last checkpoint of a finished run: a stock Trainer would take one step more.
            self.control.should_training_stop = True
            return
        if self._resumed_from is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            if kwargs["steps_trained_in_current_epoch"]:
                file = self._resumed_from / self._epoch_file
                written = len([*self._resumed_from.glob(f"{EPOCH_RANDOM_STATE}*.pt")])
                if not file.exists() or written != self.args.world_size:
                    raise IncompleteError(
                        f"{self._resumed_from} was written by {written} processes, each with an order of data of its "
                        f"own, and this is {self.args.world_size}: go on with as many"
                    )
                random_state.restore(torch.load(file, weights_only=True))
            else:
                self._load_rng_state(str(self._resumed_from))
        self._epoch_random_state = random_state.capture()
        super()._run_epoch(**kwargs)

    @property
    def _epoch_file(self) -> str:
        """As the Trainer names the random state at the checkpoint itself."""
        several = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return f"{EPOCH_RANDOM_STATE}{several}.pt"

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A resumed or best model must be there to the last tensor; tied weights are stored once."""
        tensors = cast(nn.Module, self.model).state_dict()
        stored = {t.data_ptr() for name, t in tensors.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if tensors[name].data_ptr() not in stored]
        if missing or load_result.unexpected_keys:
            raise IncompleteError(
                f"the checkpoint's weights don't fit this model: missing {missing}, "
                f"unexpected {load_result.unexpected_keys}"
            )

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before it could take the place of a checkpoint that is sound.
        self._check_finite()
        step = self.state.global_step
        root = Path(super()._get_output_dir(trial))
        folder = root / f"checkpoint-{step}"
        about = {"step": step, "resumable": not self.args.save_only_model, "numerics": _numerics()}
        best = self.state.best_model_checkpoint
        with ExitStack() as stack:
            # Every process writes its random state into it.
            aside = on_first(lambda: stack.enter_context(written_aside(folder, about)))
            self._saving_in = aside.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_in = None
                self.state.best_model_checkpoint = str(folder) if self.state.best_global_step == step else best
            if self.args.should_save:
                self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
            self.pins.save(aside, step, writes=self.args.should_save)
            torch.save(self._epoch_random_state, aside / self._epoch_file)
            on_first(stack.close)
        if self.args.push_to_hub and self.args.should_save:
            super()._push_from_checkpoint(str(folder))
        best = self.state.best_model_checkpoint
        on_first(partial(rotate, root, self.args.save_total_limit, Path(best) if best else None))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_in or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not while the folder still has its provisional name."""

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return self.pins.at_target and super()._determine_best_metric(metrics, trial)

    # ---- evaluating --------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, but of the masked model, and training's random numbers stay as they are."""
        with random_state.untouched(), self._masked_view():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, but training's random numbers stay as they are."""
        with random_state.untouched(), self._masked_view():
            return super().predict(*args, **kwargs)

    def _masked_view(self) -> AbstractContextManager[None]:
        return self.pins.pruner.masked_view() if self.pins.pruner is not None else nullcontext()


def _numerics() -> dict[str, Any]:
    """What the last bits of a float32 sum depend on."""
    return {
        "machine": platform.machine(),
        "cpu": torch.ops.pins_ext.cpu_capability(),
        "torch cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
    }
