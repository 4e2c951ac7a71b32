"""A result folder as `pins-ext train` writes it, from any way of training: `verify` and `report` take it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pins_ext.files.atomic import write_file, written_aside
from pins_ext.files.plain import to_json
from pins_ext.integrations.callback import PRUNER_FILE, PinsCallback
from pins_ext.integrations.logs import EVALUATED_ZEROS
from pins_ext.pruning.pruner import Pruner
from pins_ext.runs.errors import one_line
from pins_ext.runs.html import REPORT, render
from pins_ext.runs.record import RECORD, Final, ModelFacts, RunRecord, Settings, as_read
from pins_ext.runs.recording import logged, pruned, surroundings

_NOT_A_SCORE = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", EVALUATED_ZEROS)


def save_result(
    folder: str | Path,
    model: nn.Module,
    pruner: Pruner,
    *,
    history: Iterable[Mapping[str, Any]] = (),
    metrics: Mapping[str, float] | None = None,
    metric: str | None = None,
    greater_is_better: bool = True,
    tokenizer: Any = None,
    label: str | None = None,
) -> RunRecord:
    """Save a pruned model of transformers with its masks, a record (metrics.json) and a report (report.html).

    The pruner is finalized if it was not. `pins-ext verify`, `report`, `export`, `run` and `inspect` take the folder.

    Args:
        folder: where to; it appears in one piece, and replaces an earlier one.
        model: a model of transformers, not wrapped.
        pruner: its pruner.
        history: dicts with a `step` and what was logged at it, as a Trainer's `state.log_history`: `loss`,
            `learning_rate`, `eval_loss`, `eval_*`.
        metrics: of the final model, by name, as `Trainer.evaluate` returns them: `eval_*`.
        metric: the main one of them; by default the first that is no loss and no time, or else eval_loss.
        greater_is_better: its direction.
        tokenizer: saved beside the model, if given.
        label: the run's name in the report; the folder's name by default.

    Returns:
        The record.

    Raises:
        TypeError: a model that transformers can't load again.
        ValueError: `metric` is none of `metrics`, or the model is sharded.
        SaveError: the folder can't be written; an earlier one is untouched.
    """
    folder, kind = Path(folder), type(model).__name__
    if not hasattr(model, "save_pretrained") or not hasattr(transformers, kind):
        raise TypeError(f"{kind} is no model of transformers: unwrap it, or save it by its own means")
    metrics = {n: v for n, v in (metrics or {}).items() if isinstance(v, (int, float)) and n.startswith("eval_")}
    if metric is None:
        metric = next((name for name in metrics if name not in _NOT_A_SCORE), "eval_loss")
        greater_is_better = greater_is_better and metric != "eval_loss"
    elif metric not in metrics:
        raise ValueError(f"metric {metric!r} is not among the metrics: {', '.join(metrics) or 'there are none'}")
    if not pruner.masks.ranks.alone:
        raise ValueError("the model is spread over ranks: gather it into one process, and save it there")
    verified = pruner.verify() if pruner.masks.frozen else pruner.finalize()
    threshold = pruner.stats()["threshold"]
    first = next(model.parameters())
    record = RunRecord(
        label=label or folder.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=ModelFacts(
            getattr(model.config, "_name_or_path", "") or kind,
            kind,
            kind,
            str(first.dtype).removeprefix("torch."),
            sum(p.numel() for p in model.parameters()),
        ),
        total_steps=pruner.step,
        planned_steps=pruner.schedule.total,
        config=Settings(pruning=pruner.config.to_dict()),
        final=Final(
            metric=metric,
            greater_is_better=greater_is_better,
            points=1.0 if metric == "eval_loss" else 100.0,
            metrics=metrics,
            **pruned(pruner, verified, threshold),
        ),
        **logged(history),
        **surroundings(first.device, pruner),
    )
    record = as_read(record)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(folder) as aside:
        write_result(aside, record, model, tokenizer, pruner)
    return record


def write_result(folder: Path, record: RunRecord, model: Any, tokenizer: Any, pruner: Pruner | None) -> str | None:
    """Write model, tokenizer, masks, record and report into a folder.

    Returns:
        Why there is no report: a picture that can't be drawn is no reason to lose a trained model.
    """
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if pruner is not None:
        pruner.save(folder / PRUNER_FILE)
    write_file(folder / RECORD, to_json(record))
    try:
        report = render([record])
    except Exception as error:
        return f"no report: {one_line(error)}; try again with pins-ext report"
    write_file(folder / REPORT, report)
    return None


def _collator(loader: Any, name: str) -> Any:
    """What the Trainer's data collator holds under a name, as a Trainer saves its tokenizer with a checkpoint."""
    collator = getattr(loader, "collate_fn", None)
    # A Trainer may wrap it, to drop columns that the model doesn't take.
    return getattr(getattr(collator, "data_collator", collator), name, None)


class SaveResult(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Calls `save_result` when training ends, with the Trainer's history, tokenizer and last evaluation.

    That evaluation counts only if it saw the final model: evaluate at the last step, or call `save_result` yourself.

    Args:
        folder: where to.
        pins: the callback that prunes.
        options: further arguments of `save_result`, such as `metric` and `label`.
    """

    def __init__(self, folder: str | Path, pins: PinsCallback, **options: Any) -> None:
        self.folder, self.pins, self.options = Path(folder), pins, options

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Save, on the first rank."""
        if self.pins.pruner is None or self.pins.final is None:
            raise ValueError("SaveResult needs a PinsCallback that prunes, among the same Trainer's callbacks")
        if not state.is_world_process_zero:
            return
        evaluations = [dict(entry) for entry in state.log_history if "eval_loss" in entry]
        last = evaluations[-1] if evaluations else {}
        seen = last.get("step") == state.global_step and last.get(EVALUATED_ZEROS) == self.pins.final["sparsity"]
        # The Trainer puts the best model's weights back before this.
        seen = seen and not args.load_best_model_at_end
        options: dict[str, Any] = {
            "metrics": last if seen else {},
            "tokenizer": kwargs.get("processing_class") or _collator(kwargs.get("train_dataloader"), "tokenizer"),
        } | self.options
        save_result(self.folder, model, self.pins.pruner, history=state.log_history, **options)
