"""PinsCallback in several processes."""

from __future__ import annotations

from pathlib import Path

import torch
from models import CONFIG, STEPS, Network
from ranks import run
from transformers import TrainerControl, TrainerState, TrainingArguments

from pins_ext.integrations import logs
from pins_ext.integrations.transformers import PinsCallback


def run_ids(folder: Path) -> list[str]:
    """What each of two trainings is called."""
    ids = []
    for _ in range(2):
        model, state = Network(), TrainerState(max_steps=STEPS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        args = TrainingArguments(str(folder), use_cpu=True)
        PinsCallback(CONFIG).on_train_begin(args, state, TrainerControl(), model=model, optimizer=optimizer)
        ids.append(str(state.log_history[0][logs.RUN]))
    return ids


def test_all_ranks_call_a_run_alike(tmp_path: Path) -> None:
    """Checkpoints are written by one and read by all."""
    first, second = run(2, run_ids, tmp_path)
    assert first == second
    assert len({*first}) == 2
