"""Ctrl-C and SIGTERM while training: finish the step, save a checkpoint, stop."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pins_ext.distributed.first import several
from pins_ext.runs.errors import StoppedError
from pins_ext.runs.signals import handled

_STEPS_BETWEEN_QUESTIONS = 4
_SAME_SIGNAL_SECONDS = 2.0


class StopOnSignal(TrainerCallback):
    """Turns the first signal into a checkpoint and a clean end; a second one ends at once.

    Of several processes each gets a signal twice where all of them and their launcher get it, which forwards it: what
    comes within a moment of the first is the same one.

    Nothing half-written can be left behind either way: checkpoints and results are renamed into place when complete.
    Several processes agree on the step they stop after; they ask each other every few steps.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._agreed: int | None = None
        self._at = 0.0
        self.training = self.finished = False

    def listening(self) -> AbstractContextManager[None]:
        """Take the signals over inside."""
        return handled(self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and several() and time.monotonic() - self._at < _SAME_SIGNAL_SECONDS:
            return
        if not self.training or self.finished or self.received is not None:
            raise StoppedError("stopped", number)
        self.received, self._at = number, time.monotonic()
        print("\nstopping after this step; once more to stop without saving", file=sys.stderr, flush=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on there is something worth saving."""
        self.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint of this step."""
        if not several():
            self._agreed = self.received
        elif state.global_step % _STEPS_BETWEEN_QUESTIONS == 0:
            number = torch.tensor(self.received or 0, device=args.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self._agreed = int(number) or None
        if self._agreed is not None:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It is on the disk: stop."""
        number = self._agreed if several() else self.received
        if number is not None:
            raise StoppedError(f"stopped at step {state.global_step}", number)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a signal stops at once: what follows is short and leaves nothing behind when it is cut off."""
        self.finished = True
