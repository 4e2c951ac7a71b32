"""Standard output that ends early, is full, or is closed: one line at most, and an exit code that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "pins_ext"]
PRINTS = [["--version"], ["--help"], ["train", "--help"]]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("asked", PRINTS, ids=" ".join)
def test_a_reader_who_has_seen_enough(asked: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        ended = subprocess.run(
            [*COMMAND, *asked],
            stdout=broken,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("asked", PRINTS, ids=" ".join)
def test_no_room_for_what_is_printed(asked: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*COMMAND, *asked],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith("pins-ext")
    assert "No space left on device" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_closed_output() -> None:
    ended = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *COMMAND, "--version"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
