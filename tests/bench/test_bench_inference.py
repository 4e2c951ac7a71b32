"""`pins-ext bench-inference`: a small run of everything that is installed, and what is not is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pins_ext.bench import inference_peers
from pins_ext.bench.inference_curves import Point, crossing, lines, summary
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
        (["none", "--curves"], "leave the checkpoint out"),
        (["--curves", "--sparsity", "0.5"], "at least two places"),
        (["--curves", "--sparsity", "0.5", "1.5"], "--sparsity must lie between 0 and 1"),
    ]:
        assert main(["bench-inference", *argv]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_curves_cover_sparsity_and_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(*args: object) -> None:
        raise inference_peers.AbsentError("left out: an export for each place would take a minute")

    monkeypatch.setattr(inference_peers, "exported", exported)
    file = tmp_path / "curves.json"
    argv = ["--curves", "--layers", "1", "--sparsity", "0.5", "0.98", "--tokens", "2x3", "1", "--rounds", "1"]
    assert main(["bench-inference", *argv, "--output", str(file)]) == 0
    said = capsys.readouterr().out
    assert "1/6: 1 x 1 tokens, 50.0% zeros" in said
    assert "pins_ext float32 is faster than: torch float32 " in said
    found = json.loads(file.read_text())["curves"]
    assert [(c["over"], c["where"], c["x"]) for c in found] == [
        ("sparsity", "1 x 1 tokens", [0.5, 0.98]),
        ("sparsity", "1 x 128 tokens", [0.5, 0.98]),
        ("tokens", "90 % zeros", [1, 6]),
    ]
    for curve in found:
        assert {"torch float32", "pins_ext float32", "pins_ext int8"} <= curve["series"].keys()
        assert all(len(times) == 2 and min(times) > 0 for times in curve["series"].values())
    assert file.with_suffix(".svg").is_file()


@pytest.mark.parametrize(
    ("ours", "word", "place"),
    [
        ([1.0, 1.0, 1.0], "everywhere", None),
        ([4.0, 5.0, 6.0], "nowhere", None),
        ([8.0, 8.0, 0.5], "from", 0.7),  # log ratios -2, -2, 2: half way
        ([1.0, 4.0, 4.0], "up to", 0.4),  # 1, -1
        ([1.0, 4.0, 1.0], "on and off", None),
    ],
)
def test_crossings(ours: list[float], word: str, place: float | None) -> None:
    points = [Point(x, {"pins_ext a": ms, "b": 2.0}) for x, ms in zip((0.3, 0.5, 0.9), ours, strict=True)]
    found = crossing(points, "pins_ext a", "b")
    assert found == (word, None if place is None else pytest.approx(place))
    assert word in "\n".join(lines(summary("sparsity", "here", points)))
