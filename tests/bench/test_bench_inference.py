"""`pins-ext bench-inference`: a small run of everything that is installed, and what is not is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pins_ext.cli.main import main


def test_every_runtime_that_is_here_takes_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    argv = ["--layers", "1", "--sparsity", "0.9", "--tokens", "1", "2x5", "--rounds", "2", "--output", str(file)]
    assert main(["bench-inference", *argv]) == 0
    said = capsys.readouterr().out
    assert "1 x 1 tokens, 1 thread(s)" in said
    cases = json.loads(file.read_text())["cases"]
    assert [case["shape"] for case in cases] == [[1, 1], [2, 5]]
    for case in cases:
        names = {"torch float32", "torch bfloat16", "torch CSR 90%"}
        names |= {f"pins_ext {values} 90%" for values in ("float32", "bfloat16", "int8")}
        assert names <= case["rows"].keys()
        for row in case["rows"].values():
            assert 0 < row["least_ms"] <= row["p50_ms"] <= row["p95_ms"]
        for name, reason in case["absent"].items():
            assert name in said
            assert "pip install" in reason
    assert file.with_suffix(".svg").is_file()


def test_bad_requests_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in [
        (["--tokens", "8y"], "--tokens 8y: a number of tokens, or sequences x tokens as in 8x128"),
        (["--tokens", "1x2x3"], "sequences x tokens as in 8x128"),
        (["--sparsity", "0.2"], "--sparsity must lie between 0.7 and 1"),
        (["--threads", "0"], "--threads and --rounds must be at least 1"),
        (["none", "--sparsity", "0.9"], "leave them out with a checkpoint"),
        (["none"], "none is no folder"),
    ]:
        assert main(["bench-inference", *argv]) == 2
        assert message in capsys.readouterr().err
