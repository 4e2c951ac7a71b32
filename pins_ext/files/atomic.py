"""Folders that are whole or absent: written aside, sealed with a manifest, flushed to disk, then renamed.

A stock Trainer writes `checkpoint-N` in place and takes the highest number for the newest, whole or not. Here a folder
appears under its name only when everything in it is on the disk, and its manifest tells later whether it still is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "checkpoint.json"
FORMAT = "pins-ext checkpoint"
VERSION = 1

_ASIDE = ".aside"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_READ_BYTES = 1 << 20

_TRIES = 100
"""To replace a folder while others do: each try that fails is a turn of another one."""


class SaveError(RuntimeError):
    """A folder could not be written; whatever was there before is untouched."""


class IncompleteError(ValueError):
    """A folder is not a whole checkpoint of this software."""


@contextmanager
def folder_aside(folder: Path, aside: Path | None = None, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty folder to write into; on success it is flushed to disk and takes the place of `folder`.

    Args:
        folder: the name to appear under. An earlier folder of that name is removed after the new one is in place.
        aside: where to write; by default beside the folder, under a name that no other process or thread takes.
        overwrite: False keeps what another writer has put at `folder` meanwhile.

    Raises:
        FileExistsError: there is something at `folder`, and `overwrite` is False.
    """
    aside = aside or _aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        flush(aside)
        if overwrite:
            replace(aside, folder)
        elif not _renamed(aside, folder):
            raise FileExistsError(f"{folder} was written by another thread or process meanwhile")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def written_aside(folder: Path, manifest: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """As folder_aside, in the one place that `clear_leftovers` tidies after a kill.

    Args:
        folder: the name to appear under.
        manifest: what to say about the content beside each file's size and SHA-256; no manifest is written for None.

    Raises:
        SaveError: the content could not be written, for example because the disk is full.
    """
    place = folder.parent / _ASIDE
    shutil.rmtree(place, ignore_errors=True)
    try:
        with folder_aside(folder, place / folder.name) as aside:
            yield aside
            if manifest is not None:
                _seal(aside, manifest)
    except Exception as error:
        raise SaveError(unsaved(folder, error)) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def replace(source: Path, folder: Path) -> None:
    """Rename `source` to `folder`; what was there gives way first and is removed last, so a kill loses neither."""
    retired = _beside(folder, "retired")
    for _ in range(_TRIES):
        if _renamed(source, folder):
            break
        shutil.rmtree(retired, ignore_errors=True)
        # Another writer of the same folder may be a step ahead.
        with suppress(FileNotFoundError):
            _renamed(folder, retired)
    else:
        raise FileExistsError(f"{folder} can't be replaced: {retired} is in the way")
    shutil.rmtree(retired, ignore_errors=True)


def _renamed(source: Path, folder: Path) -> bool:
    """Rename a folder; False where something else than an empty folder has that name."""
    try:
        os.rename(source, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False
    _sync(folder.parent)
    return True


def recover(folder: Path) -> None:
    """After a kill inside `replace`: put the earlier folder back, or finish removing it."""
    retired = _beside(folder, "retired")
    if retired.exists() and not folder.exists():
        os.rename(retired, folder)
    shutil.rmtree(retired, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder that may be read as a checkpoint: out of sight first, so that no half of it is ever seen."""
    removed = _beside(folder, "removed")
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Tidy a folder of checkpoints after a kill: nothing half-written or half-removed stays, nothing whole is lost."""
    for retired in root.glob(".*.retired"):
        recover(root / retired.name.removeprefix(".").removesuffix(".retired"))
    for leftover in (root / _ASIDE, *root.glob(".*.removed")):
        shutil.rmtree(leftover, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint.

    Raises:
        IncompleteError: no manifest, a foreign or damaged one, or a file that is missing, cut short or altered.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = (manifest["format"], manifest["version"])
        files = {str(name): (content["bytes"], content["sha256"]) for name, content in manifest["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IncompleteError(f"{folder} holds no readable {MANIFEST}") from error
    if version[0] != FORMAT:
        raise IncompleteError(f"{folder / MANIFEST} was written by other software")
    if version[1] != VERSION:
        raise IncompleteError(f"{folder / MANIFEST} has version {version[1]!r}, this software reads {VERSION}")
    if not files or not isinstance(manifest.get("resumable", True), bool):
        raise IncompleteError(f"{folder / MANIFEST} is damaged")
    for name, expected in files.items():
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
        if not inside or not (folder / name).is_file():
            raise IncompleteError(f"{folder} lacks {name}")
        try:
            found = ((folder / name).stat().st_size, sha256(folder / name))
        except OSError as error:
            raise IncompleteError(f"{folder / name} can't be read") from error
        if found != expected:
            raise IncompleteError(f"{folder / name} is damaged: it differs from what {MANIFEST} recorded")
    return dict(manifest)


def checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything in `root` that is named like a checkpoint, newest first."""
    found = [(_CHECKPOINT.fullmatch(folder.name), folder) for folder in root.glob("checkpoint-*") if folder.is_dir()]
    return sorted(((int(match[1]), folder) for match, folder in found if match), reverse=True)


def newest_complete(root: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint that training can resume from, and why each newer one was passed over."""
    passed: list[str] = []
    for _, folder in checkpoints(root):
        reason = why_not(folder)
        if reason is None:
            return folder, passed
        passed.append(reason)
    return None, passed


def why_not(folder: Path) -> str | None:
    """Why training can't resume from this folder; None if it can."""
    try:
        resumable = read_manifest(folder).get("resumable", True)
    except IncompleteError as error:
        return str(error)
    return None if resumable else f"{folder} holds the model only"


def rotate(root: Path, limit: int | None, protected: Path | None) -> None:
    """Keep at most `limit` checkpoints: always the newest, and the protected one; None or 0 keeps all."""
    if not limit or limit < 0:
        return
    (_newest, *older) = [folder for _, folder in checkpoints(root)] or [root]
    spare = limit - 1 - (protected in older)
    for folder in (folder for folder in older if folder != protected):
        if spare > 0:
            spare -= 1
        else:
            remove(folder)


@contextmanager
def file_aside(file: Path) -> Iterator[Path]:
    """Yield a path to write a file to; on success it is flushed to disk and takes the place of `file`."""
    aside = _aside(file)
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def write_file(file: Path, content: str) -> None:
    """Write a text file aside, flush it and rename it into place.

    Raises:
        SaveError: it could not be written; an earlier file is untouched.
    """
    try:
        with file_aside(file) as aside:
            aside.write_text(content, encoding="utf-8")
    except OSError as error:
        raise SaveError(unsaved(file, error)) from error


def _seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest over all files now in the folder."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    text = json.dumps({"format": FORMAT, "version": VERSION, **manifest, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _aside(path: Path) -> Path:
    """A place beside `path` that no other thread or process takes."""
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.aside")


def _beside(folder: Path, fate: str) -> Path:
    return folder.with_name(f".{folder.name}.{fate}")


def flush(folder: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def unsaved(path: Path, error: Exception) -> str:
    """One line that names the folder, the reason and, when the disk is nearly full, the space left."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else None
    space = f" ({free / 2**20:.0f} MB free on that disk)" if free is not None and free < 2**30 else ""
    return f"could not save {path}: {reason}{space}"
