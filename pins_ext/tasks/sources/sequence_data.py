"""Sequence tasks from the embedded text, from GLUE and from files of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pins_ext.tasks.arguments import TaskArguments, TaskError
from pins_ext.tasks.families.sequences import SequenceTask
from pins_ext.tasks.labels import Labels, infer_labels
from pins_ext.tasks.recipes import RECIPES, recipe_for
from pins_ext.tasks.sources.areas import area_names, read_areas
from pins_ext.tasks.sources.files import read_rows, read_table
from pins_ext.tasks.sources.glue import GLUE, LICENCE, glue_labels, read_glue_folder, read_glue_hub
from pins_ext.tasks.sources.rows import Rows
from pins_ext.tasks.splits import draw_evenly, hold_out, limits, source_of

if TYPE_CHECKING:
    from datasets import Dataset

_DEFAULT_LENGTH = 128


def load_stdlib(arguments: TaskArguments, name: str) -> SequenceTask:
    """Makes the embedded task from the text of this Python installation.

    Raises:
        TaskError: if the installation lacks that text.
    """
    if arguments.data_dir is not None:
        raise TaskError("--data-dir holds the files of a GLUE task; the stdlib task makes its own data")
    return _assemble(
        name,
        arguments,
        list(read_areas()),
        Labels(area_names()),
        metrics=("accuracy", "macro_f1"),
        source="prose of pydoc_data.topics and of the standard library's docstrings in this Python installation",
        licence="PSF-2.0",
        notes=("training and validation share no module and no topic",),
    )


def load_glue(arguments: TaskArguments, name: str) -> SequenceTask:
    """Reads a task of GLUE from the hub, or from the files in --data-dir.

    Raises:
        TaskError: if a file is missing or malformed, or the hub can't be reached.
    """
    part = name.removeprefix("glue/")
    local = arguments.data_dir
    splits = read_glue_hub(part) if local is None else read_glue_folder(part, local)
    return _assemble(
        name,
        arguments,
        splits,
        glue_labels(part),
        metrics=GLUE[part].metrics,
        source=source_of(f"GLUE {part}", arguments),
        licence=LICENCE,
        notes=("test is the mismatched validation set",) if part == "mnli" and len(splits) > 2 else (),
    )


def load_table(arguments: TaskArguments, name: str) -> SequenceTask:
    """Reads texts and labels from tables of the user's own.

    Raises:
        TaskError: naming the file, and the line where there is one.
    """
    files = [arguments.train_file, arguments.validation_file, arguments.test_file]
    train, validation, test = (
        None if path is None else read_rows(read_table(path), arguments.text_columns, arguments.label_column)
        for path in files
    )
    assert train is not None
    labels = infer_labels(train, arguments.label_type)
    notes = (labels.note,) if labels.note and arguments.label_type == "auto" else ()
    if validation is None:
        rest, held, note = hold_out(len(train), arguments, train.origin, labels.encode(train))
        train, validation, notes = train.take(rest), train.take(held), (*notes, note)
    return _assemble(
        name,
        arguments,
        [train, validation] if test is None else [train, validation, test],
        labels,
        metrics=("pearson_spearman", "pearson", "spearman") if labels.is_regression else ("accuracy", "macro_f1"),
        source=source_of(name, arguments),
        licence="that of your files",
        notes=notes,
    )


def _assemble(
    name: str,
    arguments: TaskArguments,
    splits: list[Rows],
    labels: Labels,
    metrics: tuple[str, ...],
    source: str,
    licence: str,
    notes: tuple[str, ...],
) -> SequenceTask:
    """Numbers the labels, draws at most the samples asked for, and notes what a reader should know of the data."""
    drawn, parts = [], []
    for rows, limit in zip(splits, limits(arguments), strict=False):
        values = labels.encode(rows)
        if limit is not None and limit < len(rows):
            indices = draw_evenly(values, limit, arguments.split_seed)
            rows, values = rows.take(indices), [values[i] for i in indices]
        drawn.append(rows)
        parts.append(_dataset(rows, values))
    seen = set(parts[0]["labels"][:])
    unseen = [name for i, name in enumerate(labels.names) if i not in seen]
    if unseen and len(unseen) >= len(labels.names) - 1:
        raise TaskError(f"{drawn[0].origin}: only one class among {len(drawn[0])} training examples")
    recipe = RECIPES.get(recipe_for(name) or "")
    length = (recipe.length if recipe is not None else None) or _DEFAULT_LENGTH
    return SequenceTask.of_splits(
        parts,
        name=name,
        labels=labels,
        metrics=metrics,
        source=source,
        licence=licence,
        max_length=arguments.max_length or length,
        notes=(*notes, *_observations(drawn), *(f"no training example is {name}" for name in unseen)),
        recipe=recipe,
    )


def _dataset(rows: Rows, values: list[int] | list[float]) -> Dataset:
    from datasets import Dataset

    columns: dict[str, list[str] | list[int] | list[float]] = {"text": rows.text}
    if rows.pair is not None:
        columns["text_pair"] = rows.pair
    return Dataset.from_dict(columns | {"labels": values})


def _observations(splits: list[Rows]) -> list[str]:
    notes = [f"{rows.skipped} incomplete rows left out of {rows.origin}" for rows in splits if rows.skipped]
    trained = splits[0].examples()
    for rows in splits[1:]:
        shared = sum(example in trained for example in zip(rows.text, rows.pair or [""] * len(rows), strict=True))
        if shared:
            notes.append(f"{shared} of {len(rows)} inputs of {rows.origin} also occur in training")
    return notes
