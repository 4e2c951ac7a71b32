"""One-shot pruning of a checkpoint: data and model from their names, batches, progress, the folder, what is printed."""

from __future__ import annotations

import inspect
import shlex
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from pins_ext.files.atomic import SaveError, written_aside
from pins_ext.pruning import once
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.plan import ConflictWarning
from pins_ext.runs.errors import CommandError, UsageError
from pins_ext.runs.folder import as_typed
from pins_ext.runs.html import percent
from pins_ext.runs.prepare import Loaded, as_usage_errors, from_pretrained, load_model, numbered_as_the_model, quiet
from pins_ext.runs.request import RunOptions
from pins_ext.runs.validation import validated
from pins_ext.tasks import Task, load_task
from pins_ext.tasks.arguments import TaskArguments

_LABELS = ("label", "label_ids", "labels")
"""What collators turn into labels."""

_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Calibration:
    """What is shown to the model.

    Attributes:
        batches: how many, at most.
        batch_size: examples in each.
        seed: of what is drawn.
        learning_rate: see prune_once.
        validates: whether the model is evaluated on held-out examples before and after.
    """

    batches: int
    batch_size: int
    seed: int
    learning_rate: float
    validates: bool = True


def prune_checkpoint(
    asked: RunOptions,
    data: TaskArguments,
    config: PruneConfig,
    calibration: Calibration,
    target: Path,
    console: Console,
) -> once.PrunedOnce:
    """Load, prune, write an ordinary checkpoint, and say what came of it.

    Args:
        asked: model and dtype.
        data: what to calibrate with.
        config: what to prune, how much and by what.
        calibration: batches.
        target: the folder to make; what is there is replaced once it is complete.
        console: where to.

    Raises:
        UsageError: anything about the request that can't be done.
        CommandError: the folder could not be written.
    """
    quiet()
    name = str(asked.model)
    with as_usage_errors():
        task = load_task(data)
        task = numbered_as_the_model(task, name, name)
        task = task.tokenized(from_pretrained(AutoTokenizer, name, name, **task.tokenizer_kwargs))
        torch.manual_seed(calibration.seed)
        loaded = load_model(asked, task, name, name)
        model, new = loaded.model, loaded.new
        _refuse_random_scores(loaded, task, config, name)
        task.check_model(model)
    notes = [*task.notes, *([f"initialised at random: {new}"] if new else [])]
    if config.rule.name == "pins" and not calibration.learning_rate and isinstance(config.criterion, str):
        notes.append("pins without a learning rate is platon, |p g|: --learning-rate names that of the step to come")
    console.print("\n".join(f"note      {note}" for note in notes), soft_wrap=True, markup=False)
    if torch.cuda.is_available():
        model.cuda()
    loader = _batches(task, model, calibration)
    batches = min(len(loader), calibration.batches)
    # A head made at random is as good before as after.
    validate = partial(validated, task, model, calibration.batch_size) if calibration.validates and not new else None
    with as_usage_errors(), _shown(console, batches) as progress:
        before = validate(progress) if validate else {}
        with warnings.catch_warnings():
            # No plan tells of them, as that of training does.
            warnings.filterwarnings("always", category=ConflictWarning)
            found = once.prune_once(
                model,
                islice(loader, batches),
                config,
                learning_rate=calibration.learning_rate,
                progress=progress,
            )
        after = validate(progress) if validate else {}
    try:
        with written_aside(target) as aside:
            model.save_pretrained(aside)
            task.fitted_tokenizer().save_pretrained(aside)
    except SaveError as error:
        raise CommandError(str(error)) from error
    scores = "; ".join(f"{name} {before[name]:.4f} before, {score:.4f} after" for name, score in after.items())
    _say(found, config, f"{scores} ({task.sizes()['validation']:,} examples)" if after else "", target, console)
    return found


def _refuse_random_scores(loaded: Loaded, task: Task, config: PruneConfig, name: str) -> None:
    """Refuse to throw a trained head away, and to score by gradients that come through one made at random."""
    if loaded.replaced:
        labels = f", with {len(task.label_names)} labels," if task.label_names else ""
        raise UsageError(
            f"{name} has a head of another shape than {task.name}{labels} needs ({', '.join(loaded.replaced)}), which "
            "would be lost: prune it with data of the kind that it was trained on"
        )
    if loaded.missing and config.rule.reads_gradients:
        raise UsageError(
            f"{name} has no head for {task.name}: {config.rule.name} would score by gradients that come through one "
            f"made at random ({loaded.new}). Fine-tune it first, as pins-ext train does, or score by wanda or "
            "magnitude, which need none"
        )


def _batches(task: Task, model: Any, calibration: Calibration) -> DataLoader[Any]:
    """Of the training data in random order, with the columns that the model takes."""
    taken = {*inspect.signature(model.forward).parameters, *_LABELS}
    columns: Any = task.train.select_columns([name for name in task.train.column_names if name in taken])
    order = torch.Generator().manual_seed(calibration.seed)
    return DataLoader(columns, calibration.batch_size, shuffle=True, collate_fn=task.collator, generator=order)


@contextmanager
def _shown(console: Console, batches: int) -> Iterator[once.Progress]:
    """A bar on a terminal, else a line every now and then."""
    if not console.is_terminal:
        said = time.monotonic()

        def line(stage: str, done: int) -> None:
            nonlocal said
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                of = {"calibrating": f"/{batches} batches", "validating": " batches"}.get(stage, " tensors")
                console.print(f"{stage}  {done}{of}", soft_wrap=True)

        yield line
        return
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bars:
        tasks = {"calibrating": bars.add_task("calibrating", total=batches)}

        def bar(stage: str, done: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=None)
            bars.update(tasks[stage], completed=done)

        yield bar


def _say(found: once.PrunedOnce, config: PruneConfig, evaluated: str, target: Path, console: Console) -> None:
    """Every tensor, the whole, and what can be done next."""
    lines = ["", *(f"{share:9.2%}  {name}" for name, share in found.per_layer.items()), ""]
    scope = {"row": "within each output of a layer", "layer": "within each tensor", "global": "globally"}
    compared = scope.get(config.scope, "within groups") if isinstance(config.scope, str) else "within groups"
    looked = f", {found.batches:,} batch{'es' if found.batches > 1 else ''}" if found.batches else ""
    loss = f", their mean loss before pruning {found.loss:.4f}" if found.loss is not None else ""
    folder, more = shlex.quote(str(as_typed(target.absolute()))), found.zeros - found.pruned
    lines += [
        f"pruned    {found.zeros:,} of {found.weights:,} weights are zero: sparsity {percent(found.sparsity, 4)}",
        *(
            [f"note      {more:,} of them were zero already, beyond the {found.pruned:,} that were chosen"]
            if more
            else []
        ),
        f"scored    by {config.rule.name}, compared {compared}{looked}{loss}",
        *([f"evaluated {evaluated}"] if evaluated else []),
        f"written   {as_typed(target.absolute())}",
        f"next      pins-ext inspect {folder}, pins-ext run {folder} --text ..., pins-ext export {folder}",
    ]
    console.print("\n".join(lines), soft_wrap=True, markup=False)
