"""`pins-ext report`: write the HTML report of a run again, or compare several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pins_ext.files.atomic import SaveError, write_file
from pins_ext.runs.charts import scores_alone
from pins_ext.runs.errors import EXIT_OK, UsageError
from pins_ext.runs.folder import results_in
from pins_ext.runs.html import REPORT, render
from pins_ext.runs.options import Parser, file_to_write
from pins_ext.runs.record import RecordError, RunRecord, read_record

_ABOUT = """Writes the report of one run into its folder, or one that shows several runs side by side.

examples:
  pins-ext report runs/rte                             writes runs/rte/report.html
  pins-ext report runs/demo                            the three runs of a comparison again
  pins-ext report runs/rte-80 -o cells.html            every cell of an ablation
  pins-ext report runs/dense runs/pins -o compare.html
  pins-ext report runs/demo -o scores.svg              the picture of the scores alone
"""

_OUTPUT = (
    "where to; a name that ends in .svg gets the scores alone; by default report.html in the folder, or, for several "
    "folders, compare-N-runs.html in the first"
)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = Parser(prog="pins-ext report", description=_ABOUT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train or save_result wrote")
    parser.add_argument("-o", "--output", metavar="FILE", help=_OUTPUT)
    parser.add_argument("--title", metavar="TEXT", help="heading")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    given = vars(parser.parse_args(argv))
    asked = [Path(run) for run in given["runs"]]
    folders = [folder for each in asked for folder in results_in(each)]
    try:
        records = _told_apart([read_record(folder) for folder in folders], folders)
    except RecordError as error:
        raise UsageError(str(error)) from error
    name = REPORT if len(asked) == 1 else f"compare-{len(folders)}-runs.html"
    output = file_to_write("--output", given["output"], ".html", ".svg") if "output" in given else asked[0] / name
    try:
        write_file(output, _content(records, output, given.get("title")))
    except SaveError as error:
        raise UsageError(str(error)) from error
    print(output)
    return EXIT_OK


def _told_apart(records: Sequence[RunRecord], folders: Sequence[Path]) -> list[RunRecord]:
    """Runs with the same label get their folder beside it, as far as the folders differ."""
    labels = [record.label for record in records]
    shared = os.path.commonpath([folder.resolve() for folder in folders])
    named = []
    for record, folder in zip(records, folders, strict=True):
        place = os.path.relpath(folder.resolve(), shared)
        alike = labels.count(record.label) > 1 and place != "."
        named.append(replace(record, label=f"{record.label} ({place})") if alike else record)
    return named


def _content(records: Sequence[RunRecord], output: Path, title: str | None) -> str:
    """A page, or the picture of the scores, as the name of the file asks.

    Raises:
        UsageError: a picture of fewer than two scores.
    """
    if output.suffix != ".svg":
        return render(records, title)
    picture = scores_alone(records, title)
    if picture is None:
        raise UsageError("a picture compares two runs or more by the same metric")
    return picture
