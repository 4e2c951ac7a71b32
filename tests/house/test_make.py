"""What `make test` runs."""

from __future__ import annotations

import re
from pathlib import Path

from file_order import GPU_CODE, LONGEST

ROOT = Path(__file__).parents[2]


def test_make_finds_all_tests_of_gpu_code() -> None:
    """Collection refuses one elsewhere."""
    line = re.search(r"^GPU_CODE := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert line is not None
    assert line[1].split() == [f"tests/{place}" for place in GPU_CODE]


def test_the_longest_files_are_there() -> None:
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
