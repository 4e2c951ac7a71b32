"""The embedded task: balanced, the same in every process, nothing shared between training and validation."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pins_ext.tasks import TaskError, minilm_folder
from pins_ext.tasks.sources import areas, minilm
from pins_ext.tasks.sources.areas import AREAS, MAX_TRAIN, MAX_VALIDATION, area_names, read_areas
from pins_ext.tasks.sources.prose import MIN_WORDS
from pins_ext.tasks.sources.rows import Rows


@pytest.fixture(scope="module")
def splits() -> tuple[Rows, Rows]:
    return read_areas()


def digest(splits: tuple[Rows, Rows]) -> str:
    return hashlib.sha256(repr([(rows.text, rows.labels) for rows in splits]).encode()).hexdigest()


def test_classes_are_nearly_balanced(splits: tuple[Rows, Rows]) -> None:
    for rows, limit in zip(splits, (MAX_TRAIN, MAX_VALIDATION), strict=True):
        counts = Counter(rows.labels)
        assert set(counts) == set(area_names())
        assert max(counts.values()) == limit
        assert min(counts.values()) >= 0.6 * limit


def test_passages_are_prose(splits: tuple[Rows, Rows]) -> None:
    for rows in splits:
        assert all(len(text.split()) >= MIN_WORDS for text in rows.text)
        assert not any(re.search(r">>>|\bdef \w+\(|::=|https?:", text) for text in rows.text)


def test_no_sentence_is_on_both_sides(splits: tuple[Rows, Rows]) -> None:
    train, validation = ({s for text in rows.text for s in re.split(r"(?<=[.!?]) ", text)} for rows in splits)
    assert not {sentence for sentence in train & validation if len(sentence.split()) > 5}


def test_every_process_makes_the_same_passages(splits: tuple[Rows, Rows]) -> None:
    code = "from test_tasks_areas import digest, read_areas; print(digest(read_areas()))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, stdout=subprocess.PIPE, check=True
    )
    assert run.stdout.decode().split()[-1] == digest(splits)


def test_no_module_is_named_twice() -> None:
    names = [name for area in AREAS.values() for name in (*area.train.split(), *area.validation.split())]
    assert len(names) == len(set(names))
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names) | {"tomllib", "_pydatetime"}


def test_a_package_may_be_parted_between_the_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    library = {"email": [(name, [name]) for name in ("email", "email.header", "email.message", "email.messages")]}
    monkeypatch.setattr(areas, "passages", lambda texts, seen, hide: texts)
    train = areas._module_passages(["email"], ["email.message"], library, set())
    validation = areas._module_passages(["email.message"], ["email"], library, set())
    assert list(train) == ["email", "email.header", "email.messages"]
    assert list(validation) == ["email.message"]


def test_a_stripped_installation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="lacks the text of the stdlib task"):
        read_areas([str(tmp_path)])


def test_a_missing_model_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r'pip install --no-build-isolation "\.\[demo\]" in a checkout'):
        minilm_folder()


def test_an_incomplete_model_names_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_model").mkdir()
    (tmp_path / "broken_model" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(minilm, "PACKAGE", "broken_model")
    with pytest.raises(TaskError, match=r"lacks config\.json, model\.safetensors, tokenizer\.json"):
        minilm_folder()


def test_the_model_is_found_without_importing_its_package() -> None:
    pytest.importorskip("transformers")
    if minilm.find_spec(minilm.PACKAGE) is None:
        pytest.skip("the demo extra is not installed")
    assert (minilm_folder() / "config.json").is_file()
    assert minilm.PACKAGE not in sys.modules
