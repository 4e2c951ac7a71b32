"""Sentences with a tag per word: CoNLL files, and wnut17 and conll2003 from the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pins_ext.tasks.arguments import TaskArguments, TaskError
from pins_ext.tasks.families.tokens import NO_ENTITY, TokenTask
from pins_ext.tasks.labels import Labels
from pins_ext.tasks.sources.files import opened
from pins_ext.tasks.sources.hub import PARQUET, HubSet, read_hub
from pins_ext.tasks.splits import count_shared, find_files, hold_out, sampled, source_of

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".conll", ".conll.gz", ".txt", ".txt.gz", ".bio", ".iob")

_STEMS = (("train", "wnut17train", "eng.train"), ("dev", "valid", "validation", "emerging.dev"), ("test",))

_DEFAULT_LENGTH = 128

_MARKS = "\ufeff\u200b"
"""Byte order marks and zero-width spaces, which published files have at odd places."""


@dataclass(frozen=True)
class EntitySet:
    """A published data set.

    Attributes:
        hub: where it lies.
        kinds: of entities, in the order of its tag ids.
        licence: its terms.
    """

    hub: HubSet
    kinds: tuple[str, ...]
    licence: str


ENTITY_SETS: Mapping[str, EntitySet] = {
    "wnut17": EntitySet(
        HubSet("leondz/wnut_17", PARQUET),
        ("corporation", "creative-work", "group", "location", "person", "product"),
        "CC BY 4.0",
    ),
    "conll2003": EntitySet(
        HubSet("eriktks/conll2003", PARQUET),
        ("PER", "ORG", "LOC", "MISC"),
        "Reuters' research agreement: not to be passed on",
    ),
}


@dataclass(frozen=True)
class Sentences:
    """A file's or a split's sentences.

    Attributes:
        origin: for messages.
        words: of each sentence.
        tags: of each sentence, one for each word.
        lines: where each sentence begins, from 1.
    """

    origin: str
    words: list[list[str]]
    tags: list[list[str]]
    lines: list[int]

    def take(self, indices: Sequence[int]) -> Sentences:
        """Returns the sentences at these indices, in this order."""
        chosen = [(self.words[i], self.tags[i], self.lines[i]) for i in indices]
        words, tags, lines = (list(column) for column in zip(*chosen, strict=True))
        return Sentences(self.origin, words, tags, lines)


def load_entities(arguments: TaskArguments, name: str) -> TokenTask:
    """Reads a published set from the hub, or from train, dev and test in --data-dir.

    Raises:
        TaskError: if a file is missing or malformed, or the hub can't be reached.
    """
    known, local = ENTITY_SETS[name], arguments.data_dir
    if local is None:
        splits = _from_hub(name, known)
    else:
        paths = find_files(local, name, _STEMS, SUFFIXES)
        splits = [read_conll(path) for path in paths if path is not None]
    return _assemble(
        name,
        arguments,
        splits,
        _tag_set(known.kinds),
        source=source_of(name, arguments),
        licence=known.licence,
    )


def load_conll_files(arguments: TaskArguments, name: str) -> TokenTask:
    """Reads CoNLL files of the user's own; without a validation file a share of the sentences is held out.

    Raises:
        TaskError: naming the file and the line.
    """
    paths = [arguments.train_file, arguments.validation_file, arguments.test_file]
    train, validation, test = (None if path is None else read_conll(path) for path in paths)
    assert train is not None
    kinds = sorted({tag[2:] for tags in train.tags for tag in tags if tag != NO_ENTITY})
    if not kinds:
        raise TaskError(f"{train.origin}: every tag is {NO_ENTITY}; there is no entity to learn")
    notes: tuple[str, ...] = ()
    if validation is None:
        rest, held, note = hold_out(len(train.words), arguments, train.origin)
        train, validation = train.take(rest), train.take(held)
        notes = (note,)
    return _assemble(
        name,
        arguments,
        [train, validation] if test is None else [train, validation, test],
        _tag_set(kinds),
        source=source_of(name, arguments),
        licence="that of your files",
        notes=notes,
    )


def read_conll(path: str | Path) -> Sentences:
    """Reads a word per line, its tag in the last column, an empty line after each sentence, -DOCSTART- left out.

    Raises:
        TaskError: if the file is missing, holds no sentence, or a line has no tag in IOB.
    """
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    lines = [0]
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            # Tabs part the columns where there are any: only then a word may be a space of some kind.
            line = line.strip().strip(_MARKS).strip()
            columns = line.split("\t" if "\t" in line else None)
            if not columns or not columns[0].strip() or columns[0] == "-DOCSTART-":
                if words[-1]:
                    words.append([])
                    tags.append([])
                    lines.append(0)
                continue
            tag = columns[-1].strip()
            if len(columns) < 2 or not (tag == NO_ENTITY or (tag[:2] in ("B-", "I-") and tag[2:])):
                raise TaskError(
                    f"{path}:{number}: expected a word and its tag (O, B-type or I-type), with a tab or space between; "
                    f"got {line[:60]!r}"
                )
            lines[-1] = lines[-1] or number
            words[-1].append(columns[0])
            tags[-1].append(tag)
    if not words[-1]:
        words, tags, lines = words[:-1], tags[:-1], lines[:-1]
    if not words:
        raise TaskError(f"{path} holds no sentences")
    return Sentences(str(path), words, tags, lines)


def _from_hub(name: str, known: EntitySet) -> list[Sentences]:
    data = read_hub(name, known.hub, ("train", "validation", "test"), "train.conll and dev.conll")
    splits = []
    for split, rows in data.items():
        names = rows.features["ner_tags"].feature.names
        tags = [[names[i] for i in ids] for ids in rows["ner_tags"]]
        filled = [i for i, words in enumerate(rows["tokens"]) if words]
        splits.append(
            Sentences(f"{name} {split}", list(rows["tokens"]), tags, list(range(1, len(tags) + 1))).take(filled)
        )
    return splits


def _tag_set(kinds: Sequence[str]) -> Labels:
    return Labels((NO_ENTITY, *(f"{side}-{kind}" for kind in kinds for side in "BI")))


def _assemble(
    name: str,
    arguments: TaskArguments,
    splits: list[Sentences],
    tags: Labels,
    source: str,
    licence: str,
    notes: tuple[str, ...] = (),
) -> TokenTask:
    texts = [[" ".join(words) for words in split.words] for split in splits]
    shared = [count_shared(texts[0], other) for other in texts[1:]]
    repeated = tuple(
        f"{count} of {len(split.words)} sentences of {split.origin} also occur in training"
        for count, split in zip(shared, splits[1:], strict=True)
        if count
    )
    return TokenTask.of_splits(
        sampled([_dataset(split, tags) for split in splits], arguments),
        name=name,
        tags=tags,
        source=source,
        licence=licence,
        max_length=arguments.max_length or _DEFAULT_LENGTH,
        notes=(*notes, *repeated),
    )


def _dataset(split: Sentences, tags: Labels) -> Dataset:
    from datasets import Dataset

    ids = {name: i for i, name in enumerate(tags.names)}
    for sentence, line in zip(split.tags, split.lines, strict=True):
        unknown = [(i, tag) for i, tag in enumerate(sentence) if tag not in ids]
        if unknown:
            place, tag = unknown[0]
            kinds = ", ".join(name[2:] for name in tags.names if name.startswith("B-"))
            raise TaskError(f"{split.origin}:{line + place}: unknown tag {tag}; the entities are {kinds}")
    return Dataset.from_dict(
        {"tokens": split.words, "tags": [[ids[tag] for tag in sentence] for sentence in split.tags]}
    )
