"""A checkpoint's manifest is read as untrusted: whatever is in it, the checkpoint is whole or passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pins_ext.files import atomic
from pins_ext.files.atomic import IncompleteError, newest_complete, read_manifest, written_aside

ABOUT = {"step": 2, "resumable": True, "numerics": {"cpu": "avx2", "threads": 2}}


def checkpoint(folder: Path) -> Path:
    with written_aside(folder, ABOUT) as aside:
        (aside / "model").write_text("weights")
        (aside / "state").write_text("state")
    return folder


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"version": 99}, "has version 99, this software reads 1"),
        ({"version": None}, "has version None"),
        ({"files": {}}, "is damaged"),
        ({"files": {"model": {"byte": 7}}}, "no readable"),
        ({"files": {"model": 3}}, "no readable"),
        ({"files": ["model"]}, "no readable"),
        ({"files": {"../checkpoint-1/model": {"bytes": 7, "sha256": ""}}}, "lacks"),
        ({"files": {"mod\0el": {"bytes": 7, "sha256": ""}}}, "lacks"),
        ({"files": {"/etc/hostname": {"bytes": 7, "sha256": ""}}}, "lacks"),
        ({"resumable": "no"}, "is damaged"),
    ],
)
def test_an_odd_manifest_is_passed_over_with_its_reason(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    older, newer = checkpoint(tmp_path / "checkpoint-1"), checkpoint(tmp_path / "checkpoint-2")
    file = newer / atomic.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    newest, passed = newest_complete(tmp_path)
    assert newest == older
    assert len(passed) == 1
    assert reason in passed[0]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"null", b'"text"', b"3", b""])
def test_a_manifest_that_is_none_is_passed_over(tmp_path: Path, content: bytes) -> None:
    older, newer = checkpoint(tmp_path / "checkpoint-1"), checkpoint(tmp_path / "checkpoint-2")
    (newer / atomic.MANIFEST).write_bytes(content)
    assert newest_complete(tmp_path)[0] == older


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Every single bit of the manifest; then random bytes of it, many at once."""
    folder = checkpoint(tmp_path / "checkpoint-1")
    file = folder / atomic.MANIFEST
    sound = file.read_bytes()
    rng = np.random.default_rng(0)
    flips = [(bit,) for bit in range(8 * len(sound))] + [
        tuple(rng.integers(8 * len(sound), size=5)) for _ in range(500)
    ]
    noticed = 0
    for flip in flips:
        content = bytearray(sound)
        for bit in flip:
            content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(content))
        try:
            found = read_manifest(folder)
        except IncompleteError:
            noticed += 1
        else:
            assert {"model", "state"} >= found["files"].keys() > set()
    assert noticed > len(flips) / 2
