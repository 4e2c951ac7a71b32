"""One run, start to end: prepare, train, evaluate, write the result."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pins_ext.distributed.first import on_first
from pins_ext.files.atomic import SaveError, newest_complete
from pins_ext.integrations.logs import EVALUATED_ZEROS
from pins_ext.optim.step import NonFiniteError
from pins_ext.runs import adapters
from pins_ext.runs.errors import CommandError, StoppedError, UsageError
from pins_ext.runs.folder import RunFolder
from pins_ext.runs.interrupt import StopOnSignal
from pins_ext.runs.prepare import Prepared, prepare
from pins_ext.runs.progress import Watch
from pins_ext.runs.record import RunRecord, read_record
from pins_ext.runs.recording import make_record
from pins_ext.runs.request import NEWEST, Request
from pins_ext.runs.saving import write_result
from pins_ext.runs.start import SayWhatStarts
from pins_ext.tasks import Task
from pins_ext.tasks.load import EMBEDDED


def run(request: Request, console: Console, task: Task | None = None) -> tuple[RunRecord, Task]:
    """Train, evaluate and write the result folder.

    Args:
        task: one that an earlier run has loaded already.

    Returns:
        The run's record and its task.

    Raises:
        UsageError: the request can't be done; nothing was trained.
        CommandError: training or saving failed.
        StoppedError: by a signal; the message says how to go on.
    """
    folder = RunFolder(Path(request.run.output_dir).absolute(), request.overwrite)
    stop = StopOnSignal()
    watch = Watch(console, request.label)
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(folder.opened(resume=request.resume is not None)))
        stack.enter_context(stop.listening())
        try:
            model = request.run.model or "the embedded MiniLM"
            data = request.task.train_file or request.task.task or EMBEDDED
            console.print(f"{request.label}: {model} on {data}", soft_wrap=True, markup=False)
            prepared = prepare(request, folder.work, task, (watch, stop))
            on_first(partial(folder.remember, prepared.request))
            # What the task has to say was said by the run that loaded it.
            prepared.trainer.add_callback(SayWhatStarts(prepared, console, task.notes if task is not None else ()))
            record = _train(prepared, folder, console)
        except StoppedError as error:
            raise StoppedError(f"{error}; {_whereabouts(folder)}", error.signal) from error
        except SaveError as error:
            raise CommandError(f"{error}; {_whereabouts(folder)}") from error
        except NonFiniteError as error:
            raise CommandError(f"training has diverged: {error}; {_last_finite(folder)}") from error
        except ValueError as error:
            # What is refused before the first step is the request: patterns, schedule, densities, a checkpoint.
            if stop.training:
                raise
            raise UsageError(" ".join(str(error).split())) from error
        finally:
            watch.close()
    return record, prepared.task


def finished(request: Request) -> RunRecord | None:
    """The record of a run that is to be resumed and has nothing left to do."""
    folder = RunFolder(Path(request.run.output_dir).absolute())
    if request.resume is None:
        return None

    def look() -> RunRecord | None:
        folder.settle()
        return read_record(folder.result) if folder.finished and not folder.work.exists() else None

    return on_first(look)


def _train(prepared: Prepared, folder: RunFolder, console: Console) -> RunRecord:
    trainer, task, resume = prepared.trainer, prepared.task, prepared.request.resume
    checkpoint: str | bool | None = resume
    if resume == NEWEST:
        newest, passed = on_first(partial(newest_complete, folder.work))
        for reason in passed:
            console.print(f"passed over: {reason}", soft_wrap=True)
        checkpoint = str(newest) if newest is not None else None
        console.print(f"resuming from {newest.name if newest else 'the start: there is no checkpoint'}", soft_wrap=True)
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - begin
    if prepared.request.adapters.lora is not None:
        prepared.notes.append(adapters.merge(prepared))
        console.print(prepared.notes[-1], soft_wrap=True, markup=False)
    metrics = _evaluated_already(prepared) or trainer.evaluate()
    if task.test is not None:
        model = cast(PreTrainedModel, trainer.model)
        trainer.compute_metrics = partial(task.compute_metrics, split="test", model=model)
        metrics |= trainer.evaluate(task.test, metric_key_prefix="test")
    return on_first(partial(_publish, prepared, folder, console, metrics, seconds))


def _publish(
    prepared: Prepared, folder: RunFolder, console: Console, metrics: dict[str, Any], seconds: float
) -> RunRecord:
    """Write the result, and return its record."""
    trainer, task = prepared.trainer, prepared.task
    record = make_record(prepared, metrics, seconds)
    with folder.publishing(lambda text: console.print(text, soft_wrap=True, markup=False)) as result:
        model = cast(PreTrainedModel, trainer.model)
        tokenizer = cast(PreTrainedTokenizerBase, task.tokenizer)
        no_report = write_result(result, record, model, tokenizer, prepared.pins.pruner)
        if no_report is not None:
            console.print(no_report, soft_wrap=True)
    return record


def _evaluated_already(prepared: Prepared) -> dict[str, Any] | None:
    """The metrics of an evaluation at the last step, if it was one of this very model.

    After it training may put the best model's weights back, and finalizing may prune anew. That only ever sets weights
    to zero: with as many zeros as before, none has changed.
    """
    trainer, final = prepared.trainer, prepared.pins.final
    if prepared.request.adapters.lora is not None:
        return None  # the merged model is another one
    last = next((dict(entry) for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if last is None or last["step"] != trainer.state.global_step or trainer.args.load_best_model_at_end:
        return None
    if final is not None and last.get(EVALUATED_ZEROS) != final["sparsity"]:
        return None
    last.pop(EVALUATED_ZEROS, None)
    return {name: value for name, value in last.items() if name.startswith("eval_") or name == "epoch"}


def _last_finite(folder: RunFolder) -> str:
    """What to do after weights, loss or gradients were not finite; checkpoints are only written while they are."""
    newest, _ = newest_complete(folder.work)
    sound = f"{newest} is the last checkpoint, and finite; " if newest is not None else ""
    return f"{sound}train again with a lower --learning-rate, more --warmup-steps or other data"


def _whereabouts(folder: RunFolder) -> str:
    """What is left on the disk after an unfinished run."""
    if folder.settle():
        return f"the result in {folder.result} is complete"
    newest, _ = newest_complete(folder.work)
    if newest is None:
        return "no checkpoint was written"
    return f"{folder.work} holds {newest.name}: go on from there with --resume"
