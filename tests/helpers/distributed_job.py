"""What each rank of test_distributed.py does, under `accelerate launch`; and one process alone, to compare."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bert import CONFIG, EVALUATED, STEPS, WITHOUT_DROPOUT, Looks, arguments, collate, data, model, pins, stock, weights
from torch import Tensor
from transformers import Trainer, TrainerCallback

from pins_ext.integrations.callback import PinsCallback
from pins_ext.integrations.optimizer import optimizer
from pins_ext.integrations.trainer import PinsTrainer
from pins_ext.regularization.self_regularizer import SelfRegularizer


def digest(tensors: Iterable[Tensor]) -> str:
    """One for all of them."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


class Digests(TrainerCallback):
    """Notes the masks and the weights after every step; with `until`, dies there."""

    def __init__(self, callback: PinsCallback, until: int | None = None) -> None:
        self.callback, self.until = callback, until
        self.masks: list[str] = []
        self.weights: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self.callback.pruner is not None
        self.masks.append(digest(self.callback.pruner.masks.bits))
        self.weights.append(digest(model.state_dict().values()))
        if state.global_step == self.until:
            raise KeyboardInterrupt


class Writes(PinsCallback):
    """Notes which checkpoints this rank writes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.written: list[int] = []

    def save(self, folder: Path, step: int, writes: bool = True) -> None:
        self.written += [step] * writes
        super().save(folder, step, writes)


def different_batches(folder: Path, until: int | None = None, resume: bool = False) -> dict[str, Any]:
    """Every rank has batches, and dropout, of its own: DistributedDataParallel as it is used."""
    net = model()
    callback = Writes(CONFIG, SelfRegularizer(net, every=3))
    digests = Digests(callback, until)
    args = arguments(folder, gradient_accumulation_steps=1)
    run = Trainer(
        net, args, train_dataset=data(96), data_collator=collate, callbacks=[callback, digests],
        optimizer_cls_and_kwargs=optimizer(args),
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        run.train(resume_from_checkpoint=resume)
    wrapped = type(run.model_wrapped).__name__
    told = {"masks": digests.masks, "weights": digests.weights, "written": callback.written, "wrapped": wrapped}
    return told | {"final": callback.final, "at end": digest(weights(run).values())}


class Doubled(Trainer):
    """Gives every rank the same batches, in order: their gradients are equal, and so is the mean of them."""

    def get_train_dataloader(self) -> Any:
        rows = data(8 * STEPS)
        return [collate(rows[i : i + 4]) for i in range(0, len(rows), 4)]


def same_batches(folder: Path, fused: bool) -> dict[str, Any]:
    """Full gradients that are the same on every rank as in one process: (g + g) / 2 is g in binary."""
    net = model(**WITHOUT_DROPOUT)
    callback = PinsCallback(CONFIG, SelfRegularizer(net, every=3))
    digests = Digests(callback)
    args = arguments(folder, save_strategy="no", average_tokens_across_devices=False)
    options = {"optimizer_cls_and_kwargs": optimizer(args)} if fused else {}
    run = Doubled(net, args, callbacks=[callback, digests], **options)
    run.train()
    return {"masks": digests.masks, "weights": digests.weights, "final": pins(run).final}


def evaluations(folder: Path, kind: type[Trainer], **changes: Any) -> dict[str, Any]:
    """An evaluation after every step: what this rank's forward passes saw, and the weights afterwards."""
    net, looks, callback = model(**WITHOUT_DROPOUT), Looks(), PinsCallback(CONFIG)
    object.__setattr__(net, "pins", callback)
    args = arguments(folder, gradient_accumulation_steps=1, **(EVALUATED | changes))
    if kind is PinsTrainer:
        run = stock(net, args, looks, kind=kind, pins=callback)
    else:
        run = stock(net, args, callback, looks)
    run.train()
    return {"during": looks.during, "after": looks.after, "weights": digest(weights(run).values())}


def refusals(folder: Path) -> dict[str, str]:
    """What several processes can't do says so."""
    from pins_ext.cli.train import main
    from pins_ext.runs.errors import CommandError

    said = {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main(["--max-steps", "1", "--output-dir", str(folder / "command")])
    except CommandError as error:
        said["pins-ext train"] = str(error)
    return said


def main(folder: Path) -> None:
    """All of it in one launch: importing takes longer than training."""
    torch.set_num_threads(1)
    told: dict[str, Any] = {
        "same": {str(fused): same_batches(folder / "same", fused) for fused in (True, False)},
        "unbroken": different_batches(folder / "unbroken"),
        "killed": different_batches(folder / "killed", until=10),
        "resumed": different_batches(folder / "killed", resume=True),
        "evaluated": {kind.__name__: evaluations(folder / kind.__name__, kind) for kind in (Trainer, PinsTrainer)},
        "not evaluated": evaluations(folder / "none", Trainer, eval_strategy="no"),
        "refused": refusals(folder),
    }
    state = arguments(folder).distributed_state
    assert state is not None
    told |= {"type": str(state.distributed_type), "backend": state.backend, "ranks": state.num_processes}
    (folder / f"rank-{state.process_index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
