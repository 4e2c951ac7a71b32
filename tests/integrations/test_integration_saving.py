"""Folders are whole or absent, wherever a process dies: every system call of a save is tried as the last one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pins_ext.files import atomic as saving
from pins_ext.files.atomic import IncompleteError, SaveError


def write(folder: Path, content: str) -> None:
    """A checkpoint of two files, one in a subfolder."""
    with saving.written_aside(folder, {"step": 1}) as aside:
        (aside / "model").write_text(content)
        (aside / "sub").mkdir()
        (aside / "sub" / "state").write_text(content * 2)


def killed_at(call: int, action: Callable[[], None]) -> bool:
    """Run the action in a child that is killed at its n-th call into the file system; whether it got to the end."""
    child = os.fork()
    if child == 0:
        left = call

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call_or_die(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call_or_die

        for name in ("rename", "replace", "fsync", "open", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def every_death(prepare: Callable[[], None], action: Callable[[], None], check: Callable[[], None]) -> int:
    """Kill the action at its first, second, ... system call, until it survives; check what is left each time."""
    for call in range(1, 200):
        prepare()
        survived = killed_at(call, action)
        check()
        if survived:
            return call
    raise AssertionError("the action never came to its end")


def test_a_new_checkpoint_is_whole_or_absent(tmp_path: Path) -> None:
    root, folder = tmp_path / "run", tmp_path / "run" / "checkpoint-2"

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        write(root / "checkpoint-1", "old")

    def check() -> None:
        saving.clear_leftovers(root)
        newest, passed = saving.newest_complete(root)
        assert newest in (root / "checkpoint-1", folder)
        assert not passed
        assert sorted(p.name for p in root.iterdir()) == sorted({"checkpoint-1", newest.name})  # type: ignore[union-attr]

    assert every_death(prepare, lambda: write(folder, "new"), check) > 10


def test_replacing_a_folder_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    root, folder = tmp_path / "run", tmp_path / "run" / "checkpoint-1"

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        write(folder, "old")

    def check() -> None:
        saving.clear_leftovers(root)
        saving.read_manifest(folder)
        assert (folder / "model").read_text() in ("old", "new")

    assert every_death(prepare, lambda: write(folder, "new"), check) > 10


def test_rotation_never_leaves_a_torn_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        for step in range(1, 5):
            write(root / f"checkpoint-{step}", str(step))

    def check() -> None:
        saving.clear_leftovers(root)
        for _, folder in saving.checkpoints(root):
            saving.read_manifest(folder)
        assert (root / "checkpoint-4").exists()

    assert every_death(prepare, lambda: saving.rotate(root, 2, root / "checkpoint-1"), check) > 3
    assert [step for step, _ in saving.checkpoints(root)] == [4, 1]


@pytest.mark.parametrize(
    ("limit", "protected", "kept"),
    [(None, None, [3, 2, 1]), (0, None, [3, 2, 1]), (1, None, [3]), (2, None, [3, 2]), (1, 1, [3, 1]), (2, 1, [3, 1])],
)
def test_rotation_keeps_the_newest_and_the_best(
    tmp_path: Path, limit: int | None, protected: int | None, kept: list[int]
) -> None:
    for step in (1, 2, 3):
        write(tmp_path / f"checkpoint-{step}", "x")
    saving.rotate(tmp_path, limit, tmp_path / f"checkpoint-{protected}" if protected else None)
    assert [step for step, _ in saving.checkpoints(tmp_path)] == kept


def test_rotation_of_nothing(tmp_path: Path) -> None:
    saving.rotate(tmp_path, 1, None)


def test_a_failed_save_leaves_the_old_and_tells_why(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    write(folder, "old")

    def fail() -> None:
        with saving.written_aside(folder, {}) as aside:
            (aside / "model").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match=r"could not save .*checkpoint-1: .*No space left on device"):
        fail()
    assert (folder / "model").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_interrupt_while_saving_passes_through(tmp_path: Path) -> None:
    def interrupted() -> None:
        with saving.written_aside(tmp_path / "checkpoint-1", {}):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def _truncate(folder: Path) -> None:
    (folder / "model").write_text("1")


def _flip(folder: Path) -> None:
    (folder / "model").write_text("yy")


def _lose(folder: Path) -> None:
    (folder / "sub" / "state").unlink()


def _foreign(folder: Path) -> None:
    manifest = json.loads((folder / saving.MANIFEST).read_text())
    (folder / saving.MANIFEST).write_text(json.dumps(manifest | {"format": "other"}))


def _unsealed(folder: Path) -> None:
    (folder / saving.MANIFEST).unlink()


def _garbled(folder: Path) -> None:
    (folder / saving.MANIFEST).write_text("[]")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_truncate, "damaged"),
        (_flip, "damaged"),
        (_lose, "lacks sub/state"),
        (_foreign, "other software"),
        (_unsealed, "no readable"),
        (_garbled, "no readable"),
    ],
)
def test_a_harmed_checkpoint_is_passed_over(tmp_path: Path, harm: Callable[[Path], None], reason: str) -> None:
    write(tmp_path / "checkpoint-9", "xx")
    write(tmp_path / "checkpoint-10", "xx")
    harm(tmp_path / "checkpoint-10")
    with pytest.raises(IncompleteError, match=reason):
        saving.read_manifest(tmp_path / "checkpoint-10")
    newest, passed = saving.newest_complete(tmp_path)
    assert newest == tmp_path / "checkpoint-9"
    assert len(passed) == 1
    assert reason in passed[0]


def test_a_checkpoint_of_the_model_alone_is_no_place_to_resume(tmp_path: Path) -> None:
    with saving.written_aside(tmp_path / "checkpoint-1", {"resumable": False}) as aside:
        (aside / "model").write_text("x")
    assert saving.newest_complete(tmp_path) == (None, [f"{tmp_path / 'checkpoint-1'} holds the model only"])


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    saving.write_file(file, "old")

    def prepare() -> None:
        saving.write_file(file, "old")

    def check() -> None:
        assert file.read_text() in ("old", "new")

    every_death(prepare, lambda: saving.write_file(file, "new"), check)
    assert file.read_text() == "new"
    with pytest.raises(SaveError, match="could not save"):
        saving.write_file(tmp_path / "absent" / "a.json", "x")
