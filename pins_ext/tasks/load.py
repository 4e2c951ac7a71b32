"""From arguments to a task: which family it is of, and who reads its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from pins_ext.tasks.arguments import TaskArguments, TaskError
from pins_ext.tasks.sources import hub
from pins_ext.tasks.sources.conll import ENTITY_SETS, load_conll_files, load_entities
from pins_ext.tasks.sources.e2e import E2E, load_e2e
from pins_ext.tasks.sources.files import kind_of
from pins_ext.tasks.sources.glue import GLUE, files_needed, glue_set
from pins_ext.tasks.sources.hub import HubSet
from pins_ext.tasks.sources.running_text import WIKITEXT2, load_text_files, load_wikitext
from pins_ext.tasks.sources.sequence_data import load_glue, load_stdlib, load_table
from pins_ext.tasks.sources.squad import QUESTION_SETS, is_squad, load_question_files, load_questions
from pins_ext.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "stdlib"
OWN_FILES = "files"

Loader = Callable[[TaskArguments, str], Task]

_LOADERS: Mapping[str, Loader] = {
    EMBEDDED: load_stdlib,
    **{f"glue/{name}": load_glue for name in GLUE},
    **dict.fromkeys(ENTITY_SETS, load_entities),
    **dict.fromkeys(QUESTION_SETS, load_questions),
    "wikitext2": load_wikitext,
    "e2e": load_e2e,
}
"""Task name -> the function that reads its data."""

_HUB_SETS: Mapping[str, tuple[HubSet, str]] = {
    **{f"glue/{name}": (glue_set(name), files_needed(name)) for name in GLUE},
    **{name: (known.hub, "train.conll and dev.conll") for name, known in ENTITY_SETS.items()},
    **{name: (source, "train-v1.1.json and dev-v1.1.json") for name, source in QUESTION_SETS.items()},
    "wikitext2": (WIKITEXT2, "train.txt and valid.txt"),
    "e2e": (E2E, "trainset.csv and devset.csv"),
}
"""Task name -> where the hub has it, and what --data-dir would have to hold."""

_OWN_LOADERS: Mapping[str, Loader] = {
    "conll": load_conll_files,
    "bio": load_conll_files,
    "iob": load_conll_files,
    "txt": load_text_files,
}
"""End of a file's name -> the function that reads files of one's own; tables and SQuAD's layout have the others."""

_QUESTION_FLAGS = ("doc_stride", "n_best_size", "max_answer_length", "null_score_threshold")

_FLAGS: Mapping[Loader, tuple[str, ...]] = {
    load_table: ("text_columns", "label_column", "label_type"),
    load_questions: _QUESTION_FLAGS,
    load_question_files: _QUESTION_FLAGS,
    load_e2e: ("num_beams", "max_new_tokens"),
}
"""Arguments that only some families take."""


def task_names() -> tuple[str, ...]:
    """Returns what --task takes."""
    return tuple(_LOADERS)


def task_name(arguments: TaskArguments) -> str:
    """Returns the task's name as in `task_names`, however it was spelled; "files" for files of the user's own.

    Raises:
        TaskError: if there is no such task.
    """
    if arguments.train_file is not None:
        return OWN_FILES
    asked = arguments.task or EMBEDDED
    names = {_plain(name): name for name in _LOADERS}
    if _plain(asked) not in names:
        raise TaskError(f"unknown task {asked}; known are {', '.join(task_names())}, or use --train-file")
    return names[_plain(asked)]


def refuse_out_of_reach(arguments: TaskArguments) -> None:
    """Refuse a task of the hub that is neither cached nor to be fetched, before anything that takes time is loaded.

    Raises:
        TaskError: with what to do about it; or there is no such task.
    """
    name = task_name(arguments)
    if arguments.data_dir is None and name in _HUB_SETS:
        hub.refuse_out_of_reach(name, *_HUB_SETS[name])


def load_task(arguments: TaskArguments, tokenizer: PreTrainedTokenizerBase | None = None) -> Task:
    """Loads the data of a task; with a tokenizer also tokenises it.

    Raises:
        TaskError: for every fault of the arguments, the files or the installation, with what to do about it.
    """
    name = task_name(arguments)
    load = _LOADERS[name] if arguments.train_file is None else _own_loader(arguments.train_file)
    _refuse_foreign_flags(arguments, load, arguments.train_file or name)
    task = load(arguments, name)
    return task if tokenizer is None else task.tokenized(tokenizer)


def _own_loader(train_file: str) -> Loader:
    kind = kind_of(train_file)
    if kind == "json" and is_squad(train_file):
        return load_question_files
    return _OWN_LOADERS.get(kind, load_table)


def _refuse_foreign_flags(arguments: TaskArguments, load: Loader, what: str) -> None:
    special = {name for names in _FLAGS.values() for name in names} - set(_FLAGS.get(load, ()))
    given = [f.name for f in fields(arguments) if f.name in special and getattr(arguments, f.name) != f.default]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise TaskError(f"{flags} has no meaning for {what}: leave it out")


def _plain(name: str) -> str:
    """SST-2 and STS-B are the same names as sst2 and stsb."""
    return name.lower().removeprefix("glue/").replace("-", "").replace("_", "")
