"""What training decides on the validation set is told in metrics.json and the report; by default it decides nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from classifier import flags

from pins_ext.cli.main import main

KNOWN = "the validation set, which training therefore has seen"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((), ()),
        (("--teacher", "best"), ("the teacher (--teacher best)",)),
        (("--load-best-model-at-end", "--save-steps", "6"), ("load_best_model_at_end",)),
        (("--early-stopping", "2", "--save-steps", "6"), ("early stopping", "load_best_model_at_end")),
        (("--lr-scheduler-type", "reduce_lr_on_plateau"), ("reduce_lr_on_plateau",)),
    ],
)
def test_decisions_taken_on_it_are_reported(
    tiny: Path, tmp_path: Path, asked: tuple[str, ...], said: tuple[str, ...]
) -> None:
    output = tmp_path / "run"
    assert main(["train", *flags(tiny, output), *asked]) == 0
    notes = [note for note in json.loads((output / "metrics.json").read_text())["notes"] if KNOWN in note]
    report = (output / "report.html").read_text()
    assert len(notes) == len(said)
    for words in said:
        (note,) = (note for note in notes if words in note)
        assert note in report
    assert (KNOWN in report) == bool(said)
