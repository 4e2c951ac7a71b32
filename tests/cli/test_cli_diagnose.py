"""`pins-ext diagnose` on a tiny model: its files, its refusals, and what its sentences say."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from classifier import flags

from pins_ext.cli.main import main
from pins_ext.studies.diagnosis.changes import FRACTIONS, Change
from pins_ext.studies.diagnosis.exchanges import Exchange, Exchanges, Stratum
from pins_ext.studies.diagnosis.summary import agreements, fraction_ratios, reading


def test_a_diagnosis_is_written(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "diagnosis"
    more = ["--masks", "3", "--random-masks", "2", "--exchanges", "4", "--exchange-pairs", "8", "--loss-batches", "1"]
    asked = ["diagnose", *flags(tiny, output, *more), "--per-device-eval-batch-size", "16"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert sorted(f.name for f in output.iterdir()) == [f"diagnosis.{x}" for x in ("csv", "json", "md", "svg")]
    content = json.loads((output / "diagnosis.json").read_text())
    assert content["examples"] == 16
    assert len(content["observations"]) == 3
    assert len(content["changes"]) == 3 * (3 + 2 * 3)
    assert all(line in said for line in content["reading"])
    (tried,) = content["exchanges"]
    assert [s["name"] for s in tried["strata"]] == ["near", "anywhere"]
    assert all(len(s["groups"]) == 4 and s["pairs"] == 8 for s in tried["strata"])
    with open(output / "diagnosis.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["measured"]) for row in rows] == [c["measured"] for c in content["changes"]]
    text = (output / "diagnosis.md").read_text()
    assert all(line in text for line in [*content["reading"], *content["notes"]])
    assert (output / "diagnosis.svg").read_text().rstrip().endswith("</svg>")
    # The same again: everything drawn has a seed. And what is there is not written over unasked.
    assert main(asked) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*asked, "--overwrite"]) == 0
    again = json.loads((output / "diagnosis.json").read_text())
    assert again["changes"] == content["changes"]
    assert again["exchanges"] == content["exchanges"]


REFUSED = {
    "sparsity is 0": ["--sparsity", "0"],
    "--compare is a flag of train that diagnose does not take": ["--compare"],
    "--resume is a flag of train": ["--resume"],
    "--early-stopping is a flag of train": ["--early-stopping", "2"],
    "--label is a flag of train": ["--label=x"],
    "--random-masks must be at least 1": ["--random-masks", "0"],
    "--exchange-pairs must be at least 1": ["--exchange-pairs", "0"],
    "float16": ["--dtype", "float16"],
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_refuses(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], why: str) -> None:
    assert main(["diagnose", *flags(tiny, tmp_path / "out", *REFUSED[why])]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_names_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--loss-batches", "--masks", "--exchange-pairs", "--sparsity", "--overwrite"))
    assert "[runs/TASK-diagnosis]" in said
    assert not any(flag in said for flag in ("--compare", "--resume", "--label ", "--early-stopping"))


def changes(ratio: float, small: float) -> list[Change]:
    """Four masks whose prediction is `ratio` of what is measured, and `small` of it on the first bit of the way."""
    made = []
    for step in range(1, 5):
        measured = 0.1 * step
        parts = {part: part * ratio * measured / small for part in FRACTIONS}
        for kind in ("criterion", "random"):
            for extent in ("new", "whole", "step"):
                fractions = parts if kind == "criterion" else None
                sgd = 3.0 if extent == "step" else None
                made.append(Change(step, kind, extent, 9, ratio * measured, measured, sgd, fractions))
    return made


def test_agreement_is_measured() -> None:
    found = agreements(changes(-0.5, 1.0))
    assert [(a.kind, a.extent) for a in found[:2]] == [("criterion", "new"), ("random", "new")]
    for each in found:
        assert (each.n, each.same_sign) == (4, 0)
        assert each.ratio == pytest.approx(-0.5)
        assert each.pearson == pytest.approx(-1)
        assert each.spearman == pytest.approx(-1)
        assert each.measured == pytest.approx(0.25)
    assert agreements(changes(1.0, 1.0)[:6])[0].pearson is None
    assert [a.clear for a in agreements([replace(c, noise=0.08) for c in changes(1.0, 1.0)])] == [2] * 6
    hidden = agreements([replace(c, noise=1.0) for c in changes(1.0, 1.0)])
    assert {(a.clear, a.ratio, a.same_sign) for a in hidden} == {(0, None, None)}
    assert fraction_ratios(changes(0.3, 0.9), "new")[1 / 64] == pytest.approx(0.9)


def test_the_sentences_follow_the_numbers() -> None:
    assert "first order holds all the way" in " ".join(reading(changes(1.0, 1.0), []))
    bent = " ".join(reading(changes(-0.2, 1.02), []))
    assert "sign is right at 0 of 4 changes" in bent
    assert "curvature and interaction" in bent
    assert "predicts -5.00e-02 on average (+3.00e+00 if the step were one of SGD), and +2.50e-01 is measured" in bent
    assert "even a small part" in " ".join(reading(changes(0.2, 0.3), []))
    groups = (Exchange(-2e-3, -1e-3), Exchange(1e-3, 2e-3), Exchange(0.0, -1e-9))
    tried = Exchanges(7, 1e-8, 0.5, 2.0, (Stratum("near", 64, groups, 1e-3, -1e-3),))
    said = reading(changes(1.0, 1.0), [tried])[-1]
    assert "2 of 3 exchanges of 64 pairs lower the loss (1 clearly above rounding)" in said
    assert "0.2 % of what the mask changes, 0.05 % of what random masks change" in said
    large = Exchanges(7, 1e-8, 1e-3, 1e-5, (Stratum("near", 64, groups, 1e-3, -1e-3),))
    assert (
        "(100 % of what the mask changes, 10,000 % of what random masks change)" in reading(changes(1, 1), [large])[-1]
    )
    small = Exchanges(7, 1e-8, 1e4, 1.1, (Stratum("near", 64, groups, 1e-3, -1e-3),))
    assert "(less than 0.001 % of what the mask changes, 0.091 % of" in reading(changes(1, 1), [small])[-1]
