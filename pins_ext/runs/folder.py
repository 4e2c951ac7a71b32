"""Where a run lives on the disk: a folder for the finished result, and one beside it while the run is unfinished.

    runs/rte              the result: appears when it is complete, in one piece
    runs/rte.unfinished   checkpoints of the run under way; gone when it is done

An earlier result stays where it is until the new one is complete; then it moves to runs/rte.1, or goes away with
--overwrite.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pins_ext.files.atomic import (
    checkpoints,
    clear_leftovers,
    recover,
    remove,
    replace,
    sha256,
    write_file,
    written_aside,
)
from pins_ext.runs.errors import UsageError
from pins_ext.runs.record import RECORD, RecordError, read_record

if TYPE_CHECKING:
    from pins_ext.runs.request import Request

_LOCK = "lock"
_SETTINGS = "settings.json"
_PUBLISHED = "published"
"""Holds the hash of a result's record, from just before the result is in place until the unfinished run is gone."""

_PLACES = (("*",), ("*/*", "*/*/*"))
"""Where results lie: a comparison's runs in its folder; an ablation's cells as METHOD/SEED or METHOD/SETTING/SEED."""


@dataclass(frozen=True)
class RunFolder:
    """The two folders of one run.

    Attributes:
        result: where the finished result will be, absolute.
        overwrite: an earlier result, or anything else at its place, is removed once the new one is complete.
    """

    result: Path
    overwrite: bool = False

    @property
    def work(self) -> Path:
        """The folder of the unfinished run."""
        return self.result.with_name(f"{self.result.name}.unfinished")

    @property
    def finished(self) -> bool:
        """Whether a complete result of this software is in place."""
        return is_result(self.result)

    def check(self, resume: bool = False) -> None:
        """Refuse to run where something of value would be lost.

        Raises:
            UsageError: the place is taken by other files, or by an unfinished run that is not to be resumed.
        """
        self.settle()
        if self.result.exists() and not self.result.is_dir():
            raise UsageError(f"{self.result} is a file: choose another --output-dir")
        if self.overwrite:
            return
        if self.result.is_dir() and any(self.result.iterdir()) and not self.finished:
            raise UsageError(
                f"{self.result} holds files that are not the result of a run: choose another --output-dir, "
                f"or replace them with --overwrite"
            )
        found = checkpoints(self.work)
        if found and not resume:
            raise UsageError(
                f"{self.work} holds an unfinished run (step {found[0][0]}): go on with --resume, "
                f"or start anew with --overwrite"
            )

    @contextmanager
    def opened(self, resume: bool = False) -> Iterator[None]:
        """Claim the folders for one process, and tidy up after one that was killed.

        Args:
            resume: go on with an unfinished run; otherwise its checkpoints go, if `overwrite` allows it.

        Raises:
            UsageError: see `check`; or a process is still running there.
        """
        self.check(resume)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.work / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(f"{self.work} can't be written: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise UsageError(f"another process runs in {self.work}: wait, or choose another --output-dir") from error
        try:
            recover(self.result)
            clear_leftovers(self.work)
            for _, checkpoint in [] if resume else checkpoints(self.work):
                shutil.rmtree(checkpoint)
            yield
        finally:
            if not checkpoints(self.work):
                shutil.rmtree(self.work, ignore_errors=True)
            os.close(lock)

    def settle(self) -> bool:
        """After a stop between publishing and tidying up: remove the unfinished run whose result is in place.

        Returns:
            Whether there was one.
        """
        marker, record = self.work / _PUBLISHED, self.result / RECORD
        done = marker.is_file() and record.is_file() and marker.read_text(encoding="utf-8") == sha256(record)
        if done:
            remove(self.work)
        return done

    @property
    def begun(self) -> bool:
        """Whether there is something to resume, or a result."""
        return self.finished or self.work.is_dir()

    def remember(self, request: Request) -> None:
        """Note what the unfinished run was asked for; one that is resumed must have been asked for the same.

        Raises:
            UsageError: the settings that differ, another number of processes, or a file of its data that has changed.
        """
        file, settings = self.work / _SETTINGS, request.settings()
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        given = (request.task.train_file, request.task.validation_file, request.task.test_file)
        data = {path: sha256(Path(path)) for path in given if path is not None and Path(path).is_file()}
        if request.resume is not None and file.is_file():
            stored = self._settings()
            if (then := stored.get("processes", processes)) != processes:
                raise UsageError(
                    f"the unfinished run in {self.work} was started in {then} processes, and {processes} would see "
                    f"other batches: go on in as many (torchrun --nproc-per-node {then}; it is 1 without torchrun), or "
                    "start anew with --overwrite or in another --output-dir"
                )
            before, hashes = stored["settings"], stored.get("data")
            hashes = hashes if isinstance(hashes, dict) else {}
            names = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
            if names:
                changed = ", ".join(f"{name} {before.get(name)} -> {settings.get(name)}" for name in names)
                raise UsageError(
                    f"the unfinished run in {self.work} was started with other settings: {changed}. "
                    "Leave those flags out to go on with it, or start anew with --overwrite or in another --output-dir"
                )
            if other := next((path for path in data if hashes.get(path, data[path]) != data[path]), None):
                raise UsageError(
                    f"{other} has changed since the unfinished run in {self.work} was started, and its steps would see "
                    "other examples: put the file back, or start anew with --overwrite or in another --output-dir"
                )
        known = {"given": request.tokens, "settings": settings, "data": data, "processes": processes}
        write_file(file, json.dumps(known, indent=1))

    def remembered(self) -> list[str]:
        """The flags that the unfinished run was started with."""
        return list(self._settings()["given"]) if (self.work / _SETTINGS).is_file() else []

    def _settings(self) -> dict[str, Any]:
        file = self.work / _SETTINGS
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(settings["given"], list) and isinstance(settings["settings"], dict):
                return dict(settings)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass
        raise UsageError(f"{file} is damaged: remove it, and give the run's flags again with --resume")

    @contextmanager
    def publishing(self, say: Callable[[str], None]) -> Iterator[Path]:
        """Yield an empty folder for the result; afterwards it is in place, flushed, and the unfinished run is gone.

        Args:
            say: told where an earlier result has moved to, if there was one.

        Raises:
            SaveError: it could not be written; an earlier result and the checkpoints are untouched.
        """
        staged = self.work / "result"
        with written_aside(staged) as aside:
            yield aside
        if self.finished and not self.overwrite:
            earlier = self.earlier()
            os.rename(self.result, earlier)
            say(f"the earlier result is now {as_typed(earlier)}")
        write_file(self.work / _PUBLISHED, sha256(staged / RECORD))
        replace(staged, self.result)
        self.settle()

    def earlier(self) -> Path:
        """The first free name for an earlier result."""
        number = 1
        while (name := self.result.with_name(f"{self.result.name}.{number}")).exists():
            number += 1
        return name


def as_typed(folder: Path) -> Path:
    """A folder as one would type it: relative to the working directory where it lies in it."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def results_in(folder: Path) -> list[Path]:
    """The folder itself, or, where it holds a comparison or an ablation, those of its runs in the order they were made.

    Raises:
        UsageError: it is a file.
    """
    if folder.is_file() and folder.name != RECORD:
        raise UsageError(f"{folder} is a file: give the folder of a run, a comparison or an ablation")
    if (folder / RECORD).exists():
        return [folder]
    for places in _PLACES:
        inner = [each for place in places for each in folder.glob(place) if is_result(each)]
        if inner:
            return sorted(inner, key=lambda each: read_record(each).created)
    return [folder]


def is_result(folder: Path) -> bool:
    """Whether a folder is the result of a run of this software."""
    if not (folder / RECORD).is_file():
        return False
    try:
        read_record(folder)
    except RecordError:
        return False
    return True
