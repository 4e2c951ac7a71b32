"""Questions in SQuAD's layout: squad and squad_v2 from the hub or a folder, and files of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pins_ext.tasks.arguments import TaskArguments, TaskError
from pins_ext.tasks.families.questions import QuestionTask
from pins_ext.tasks.sources.files import opened
from pins_ext.tasks.sources.hub import HubSet, read_hub
from pins_ext.tasks.splits import find_files, listing, sampled, source_of

if TYPE_CHECKING:
    from datasets import Dataset

_SUFFIXES = (".json", ".json.gz")

_STEMS = (("train-v1.1", "train-v2.0", "train"), ("dev-v1.1", "dev-v2.0", "dev", "validation"), ("test",))

_DEFAULT_LENGTH = 384

QUESTION_SETS: Mapping[str, HubSet] = {
    "squad": HubSet("rajpurkar/squad", "7b6d24c440a36b6815f21b70d25016731768db1f", "plain_text"),
    "squad_v2": HubSet("rajpurkar/squad_v2", "3ffb306f725f7d2ce8394bc1873b24868140c412", "squad_v2"),
}
"""Parquet files at fixed commits."""


@dataclass(frozen=True)
class Question:
    """One question with its context.

    Attributes:
        article: title or number of the article that the context is from.
        answers: right answers; none for an unanswerable question.
        starts: where each begins in the context.
    """

    article: str
    context: str
    question: str
    answers: list[str]
    starts: list[int]


def load_questions(arguments: TaskArguments, name: str) -> QuestionTask:
    """Reads squad or squad_v2 from the hub, or from --data-dir: a train and a dev file, or one file that is split.

    Raises:
        TaskError: if a file is missing or malformed, or the hub can't be reached.
    """
    notes: tuple[str, ...] = ()
    if arguments.data_dir is None:
        splits = _from_hub(name)
    else:
        paths = _files_in(Path(arguments.data_dir), name)
        splits, notes = _read_splits(arguments, paths)
    return _assemble(name, arguments, splits, "CC BY-SA 4.0", notes)


def load_question_files(arguments: TaskArguments, name: str) -> QuestionTask:
    """Reads files of the user's own; without a validation file some articles are held out.

    Raises:
        TaskError: naming the file and the place in it.
    """
    given = [arguments.train_file, arguments.validation_file, arguments.test_file]
    paths = [None if path is None else Path(path) for path in given]
    splits, notes = _read_splits(arguments, paths)
    return _assemble(name, arguments, splits, "that of your files", notes)


def is_squad(path: str | Path) -> bool:
    """Whether a JSON file is laid out as SQuAD's: articles under "data", with paragraphs."""
    with opened(path) as file:
        try:
            document = json.load(file)
        except json.JSONDecodeError:
            return False
    articles = document.get("data") if isinstance(document, dict) else None
    return isinstance(articles, list) and any(isinstance(each, dict) and "paragraphs" in each for each in articles)


def read_squad(path: str | Path) -> list[Question]:
    """Reads all questions of a file, in its order.

    Raises:
        TaskError: naming the place of what is missing or malformed.
    """
    with opened(path) as file:
        try:
            document = json.load(file)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    questions = list(_questions(document, str(path)))
    if not questions:
        raise TaskError(f"{path} holds no questions")
    return questions


def split_by_article(questions: list[Question], fraction: float, seed: int, origin: str) -> list[list[Question]]:
    """Holds out whole articles for validation, until they have a share of the questions.

    Raises:
        TaskError: if all questions are about one article.
    """
    articles = list(dict.fromkeys(each.article for each in questions))
    if len(articles) < 2:
        raise TaskError(f"{origin}: one article cannot be both trained and validated on; use --validation-file")
    sizes = {article: sum(each.article == article for each in questions) for article in articles}
    held: set[str] = set()
    for i in np.random.default_rng(seed).permutation(len(articles))[:-1]:
        if sum(sizes[article] for article in held) >= fraction * len(questions):
            break
        held.add(articles[i])
    return [[each for each in questions if (each.article in held) == side] for side in (False, True)]


def _questions(document: Any, path: str) -> Iterator[Question]:
    for i, article in enumerate(_part(document, "data", list, path)):
        title = article.get("title") if isinstance(article, dict) else None
        for j, paragraph in enumerate(_part(article, "paragraphs", list, f"{path}: data[{i}]")):
            place = f"{path}: data[{i}].paragraphs[{j}]"
            context = _part(paragraph, "context", str, place)
            for k, each in enumerate(_part(paragraph, "qas", list, place)):
                spot = f"{place}.qas[{k}]"
                question = _part(each, "question", str, spot)
                answers = [] if each.get("is_impossible") else _part(each, "answers", list, spot)
                texts = [_part(answer, "text", str, spot) for answer in answers]
                starts = [_part(answer, "answer_start", int, spot) for answer in answers]
                # Titles are optional, and two articles may have the same one.
                yield Question(f"{i} {title}", context, question, texts, starts)


def _part(parent: Any, name: str, kind: type, place: str) -> Any:
    value = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(value, kind):
        what = {list: "a list", str: "a text", int: "a number"}[kind]
        raise TaskError(f"{place}: {name} must be {what}, as in SQuAD's files; got {str(value)[:40]!r}")
    return value


def _files_in(folder: Path, name: str) -> list[Path | None]:
    train, dev, test = find_files(folder, name, _STEMS, _SUFFIXES, required=0)
    if train is not None:
        return [train, dev, test]
    alone = [path for path in sorted(folder.iterdir()) if path.name.lower().endswith(_SUFFIXES)]
    if len(alone) != 1:
        raise TaskError(f"{folder} has no train.json for {name}, nor one .json file to split; it has {listing(folder)}")
    return [alone[0], None, None]


def _read_splits(arguments: TaskArguments, paths: list[Path | None]) -> tuple[list[list[Question]], tuple[str, ...]]:
    splits = [read_squad(path) for path in paths if path is not None]
    if paths[1] is not None:
        return splits, ()
    share, seed = arguments.eval_fraction, arguments.split_seed
    parted = split_by_article(splits[0], share, seed, str(paths[0]))
    articles = [len({each.article for each in part}) for part in parted]
    note = (
        f"validation is {articles[1]} of {sum(articles)} articles, about {share:g} of the questions, "
        f"drawn with seed {seed}"
    )
    return [*parted, *splits[1:]], (note,)


def _from_hub(name: str) -> list[list[Question]]:
    data = read_hub(name, QUESTION_SETS[name], ("train", "validation"), "train-v1.1.json and dev-v1.1.json")
    return [[_hub_question(row) for row in rows] for rows in data.values()]


def _hub_question(row: Mapping[str, Any]) -> Question:
    answers = row["answers"]
    return Question(row["title"], row["context"], row["question"], answers["text"], answers["answer_start"])


def _assemble(
    name: str,
    arguments: TaskArguments,
    splits: list[list[Question]],
    licence: str,
    notes: tuple[str, ...],
) -> QuestionTask:
    may_be_unanswerable = any(not each.answers for each in splits[0])
    if arguments.null_score_threshold is not None and not may_be_unanswerable:
        raise TaskError("--null-score-threshold: every training question has an answer, so no answer is never given")
    strayed = sum(
        each.context[start : start + len(text)] != text
        for split in splits
        for each in split
        for text, start in zip(each.answers, each.starts, strict=True)
    )
    if strayed:
        notes = (*notes, f"{strayed} answers are not where the data says they begin")
    return QuestionTask.of_splits(
        sampled([_dataset(split) for split in splits], arguments),
        name=name,
        source=source_of(name, arguments),
        licence=licence,
        max_length=arguments.max_length or _DEFAULT_LENGTH,
        notes=notes,
        doc_stride=arguments.doc_stride,
        n_best_size=arguments.n_best_size or 20,
        max_answer_length=arguments.max_answer_length or 30,
        null_score_threshold=(arguments.null_score_threshold or 0.0) if may_be_unanswerable else None,
    )


def _dataset(questions: list[Question]) -> Dataset:
    from datasets import Dataset

    names = ("article", "question", "context", "answers", "starts")
    return Dataset.from_dict({name: [getattr(each, name) for each in questions] for name in names})
