"""What `--resume` finds: nothing, a damaged note of the settings, or a result that was complete already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from classifier import assert_same, flags

from pins_ext.cli.main import main
from pins_ext.files import atomic
from pins_ext.files.atomic import newest_complete
from pins_ext.runs.errors import StoppedError


def test_nothing_is_resumed_where_nothing_was_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model and data it would be the demo that begins."""
    monkeypatch.chdir(tmp_path)
    for asked in (["--output-dir", "typo"], ["--output-dir", "typo", "--train-file", "x.csv"], []):
        assert main(["train", *asked, "--resume"]) == 2
        place = "typo" if asked else "runs/demo"
        assert f"pins-ext train: nothing to resume in {place}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def stopped_after_publishing(tiny: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped when its result is in place and its checkpoints are still there."""
    replace = atomic.replace

    def stopping(source: Path, folder: Path) -> None:
        replace(source, folder)
        if folder == output:
            raise StoppedError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("pins_ext.runs.folder.replace", stopping)
        assert main(["train", *flags(tiny, output)]) == 130


@pytest.mark.parametrize("resume", [True, False])
def test_a_stop_between_publishing_and_tidying_up_leaves_no_copy(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], resume: bool
) -> None:
    output = tmp_path / "run"
    stopped_after_publishing(tiny, output, monkeypatch)
    assert f"the result in {output} is complete" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    made = (output / "metrics.json").read_bytes()
    if resume:
        assert main(["train", "--output-dir", str(output), "--resume"]) == 0
        assert "nothing to resume" in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert (output / "metrics.json").read_bytes() == made


def test_a_kill_between_publishing_and_tidying_up_leaves_no_copy(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, but nothing runs after the stop."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("pins_ext.runs.folder.remove", lambda folder: None)
        patch.setattr("pins_ext.runs.folder.shutil.rmtree", lambda *args, **kwargs: None)
        assert main(["train", *flags(tiny, output)]) == 0
    assert newest_complete(tmp_path / "run.unfinished")[0]
    assert main(["train", "--output-dir", str(output), "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert main(["train", *flags(tiny, output), "--overwrite"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def broken_off(tiny: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unfinished run of six steps with its checkpoints; returns their folder."""

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("over")

    with monkeypatch.context() as patch:
        patch.setattr("pins_ext.runs.run.make_record", fails)
        assert main(["train", *flags(tiny, output)]) == 1
    return output.with_name(f"{output.name}.unfinished")


def test_damaged_settings_are_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = broken_off(tiny, tmp_path / "run", monkeypatch)
    capsys.readouterr()
    settings = work / "settings.json"
    sound = json.loads(settings.read_text())
    for damaged in ("{", "[]", json.dumps({"givn": sound["given"], "settings": sound["settings"]}), "[" * 100_000):
        settings.write_text(damaged)
        assert main(["train", "--output-dir", f"{tmp_path}/run", "--resume"]) == 2
        said = capsys.readouterr().err
        assert "settings.json is damaged" in said
        assert said.count("\n") == 1


def test_data_that_has_changed_is_no_data_of_the_unfinished_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(tiny, tmp_path / "own"))
    broken_off(own, tmp_path / "run", monkeypatch)
    before = (own / "train.csv").read_text()
    (own / "train.csv").write_text(before + before.splitlines()[-1] + "\n")
    capsys.readouterr()
    assert main(["train", "--output-dir", f"{tmp_path}/run", "--resume"]) == 2
    assert "train.csv has changed since the unfinished run in" in capsys.readouterr().err
    (own / "train.csv").write_text(before)
    assert main(["train", "--output-dir", f"{tmp_path}/run", "--resume"]) == 0


def test_a_damaged_checkpoint_gives_way_to_an_older_one(
    tiny: Path, tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = broken_off(tiny, tmp_path / "run", monkeypatch)
    manifest = work / "checkpoint-12" / atomic.MANIFEST
    manifest.write_text(manifest.read_text().replace('"bytes"', '"bxtes"'))
    assert main(["train", "--output-dir", f"{tmp_path}/run", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "passed over: " in said
    assert "resuming from checkpoint-9" in said
    assert_same(tmp_path / "run", unbroken)
