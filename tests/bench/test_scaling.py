"""`pins-ext bench --scaling`: what is measured, the fitted slope, what does not fit, the files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pins_ext.bench as bench
from pins_ext.bench import scaling, scaling_picture
from pins_ext.bench.protocol import Limits

CPU = torch.device("cpu")
FEW = Limits(rounds=1, warmups=1, patience=5.0, least=1)
POINT = scaling.Point("weights", 4000, 1)


def test_every_axis_varies_alone() -> None:
    found = scaling.points(8_000_000, 64_000_000, 2, CPU)
    for axis in scaling.AXES:
        along = [p for p in found if p.axis == axis]
        assert len(along) > 1
        middle = scaling.Point(axis, 8_000_000, 2)
        assert all(replace(p, **{axis: getattr(middle, axis)}) == middle for p in along)
    assert max(p.weights for p in found) == 64_000_000
    assert {p.tensors for p in found} == {1, 10, 100, 1000, 5000}
    assert {p.window for p in found} >= {1, 100}
    assert {p.sparsity for p in found} >= {0.01, 0.99}


@pytest.mark.parametrize("tensors", [1, 7, 4000])
def test_a_point_has_its_weights_in_its_tensors(tensors: int) -> None:
    problem = replace(POINT, tensors=tensors).problem(torch.float32, CPU, 0)
    assert problem.weights == 4000
    assert len(problem.shapes) == tensors


@pytest.mark.parametrize(("axis", "power"), [("weights", 1.0), ("threads", -1.0), ("window", 0.5)])
def test_the_slope_is_the_power(axis: str, power: float) -> None:
    found = [replace(POINT, axis=axis, **{axis: n}, seconds=3.0 * n**power) for n in (1, 4, 9, 100)]
    assert scaling.slope(found) == pytest.approx(power)
    assert scaling.slope(found[:1]) is None
    assert scaling.slope([replace(p, seconds=None) for p in found]) is None


def test_points_are_measured_and_threads_put_back() -> None:
    before = torch.get_num_threads()
    wanted = [replace(POINT, tensors=3, window=2), replace(POINT, axis="threads", threads=2)]
    found = list(scaling.measured(wanted, torch.float32, CPU, FEW, 0, 0.0))
    assert torch.get_num_threads() == before
    for point, asked in zip(found, wanted, strict=True):
        assert point.seconds
        assert point.plain_seconds
        assert point.error is None
        assert replace(point, seconds=None, p5_s=None, p95_s=None, plain_seconds=None, others=None) == asked


def test_what_does_not_fit_says_so() -> None:
    (point,) = scaling.measured([replace(POINT, weights=10**13)], torch.float32, CPU, FEW, 0, 0.0)
    assert point.seconds is None
    assert "GB are free" in str(point.error)


def test_the_picture_has_a_panel_for_each_axis(tmp_path: Path) -> None:
    found = [replace(p, seconds=1.0, plain_seconds=0.5) for p in scaling.points(8_000_000, 16_000_000, 2, CPU)]
    assert scaling_picture.draw(found, "title", tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert text.startswith("<?xml")
    assert text.count("slope +0.00") == len(scaling.AXES)
    assert not scaling_picture.draw([POINT], "title", tmp_path / "y.svg")


def test_the_command_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [replace(POINT, weights=n) for n in (2000, 4000)] + [replace(POINT, weights=10**13)]
    monkeypatch.setattr(scaling, "points", lambda *args: wanted)
    path = tmp_path / "s.json"
    assert bench.main(["--scaling", "--rounds", "1", "--device", "cpu", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert [p["weights"] for p in data["points"]] == [2000, 4000, 10**13]
    assert data["slopes"]["weights"] is not None
    assert data["slopes"]["threads"] is None
    assert path.with_suffix(".svg").exists()
    told = capsys.readouterr().out
    assert "slope over weights" in told
    assert "GB are free" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["select", "--scaling"], "leave the stems out"),
        (["--largest", "1e6"], "--largest belongs to --scaling"),
        (["--threads", "0"], "0 is not a positive whole number"),
        (["--threads", "1e9"], "between 1 and 1024"),
        (["--rounds", "1.5"], "1.5 is not a positive whole number"),
        (["--params", "inf"], "inf is not a positive"),
        (["--budget", "0"], "0 leaves no time"),
        (["--patience", "nan"], "nan leaves no time"),
        (["--ratios", "0.2", "1.5"], "1.5 is no share of the weights"),
        (["--json", "absent/x.json"], "there is no folder absent"),
        (["--json", "x.txt"], "must end in .json"),
    ],
)
def test_options_that_contradict_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(options)
    assert message in capsys.readouterr().err
