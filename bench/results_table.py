"""The table of figures, from the committed result files alone: `python -m bench.results_table --check | --write`.

The table stands between two markers in bench/RESULTS.md; `--check` fails when it no longer says what the files say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pins_ext.contention import QUIET
from pins_ext.runs.tables import markdown

from .records import Run
from .screen import DISTURBED, place
from .targets import Line, lines, shown

BEGIN, END = "<!-- status:begin -->", "<!-- status:end -->"
_ROOT = Path(__file__).resolve().parent.parent
_NO_GPU = (
    "**GPU**: no figure. The Triton and CUDA kernels are compiled, inspected and interpreted in the tests, "
    "and have never run on a GPU; every target for one is open."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Check or write; 1 when the document says something else than the files."""
    parser = argparse.ArgumentParser(prog="python -m bench.results_table", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail if the document is not up to date")
    what.add_argument("--write", action="store_true", help="bring the document up to date")
    parser.add_argument("--document", type=Path, default=_ROOT / "bench" / "RESULTS.md", metavar="PATH")
    parser.add_argument("--results", type=Path, default=_ROOT / "bench" / "results", metavar="FOLDER")
    options = parser.parse_args(argv)
    section = render(options.results, options.document.parent)
    if not (options.check or options.write):
        print(section)
        return 0
    text = options.document.read_text()
    try:
        wanted = replaced(text, section)
    except ValueError as error:
        print(f"{options.document.name}: {error}", file=sys.stderr)
        return 1
    if options.write:
        options.document.write_text(wanted)
    elif text != wanted:
        print(f"{options.document.name} is out of date: python -m bench.results_table --write", file=sys.stderr)
        return 1
    return 0


def replaced(text: str, section: str) -> str:
    """The text with what stands between the markers exchanged.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} … {END} in it")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def render(results: Path, relative_to: Path) -> str:
    """Markdown of the newest full run of every machine and problem, each with its targets and its file."""
    runs = newest(results)
    parts = [_section(path, run, relative_to) for path, run in runs]
    if not any(run.machine["device"] == "cuda" for _, run in runs):
        parts.append(_NO_GPU)
    return "\n\n".join(parts)


def newest(results: Path) -> list[tuple[Path, Run]]:
    """The result files to quote: of every name without its date the latest; quick runs are not quoted."""
    found: dict[str, tuple[Path, Run]] = {}
    for path in sorted(results.glob("*.json")):
        if '"records"' not in path.read_text():
            # The summary of `make gpu-check` lies here too.
            continue
        run = Run.load(path)
        if not run.options["quick"]:
            name = path.stem.replace(run.date, "")
            if name not in found or found[name][1].date <= run.date:
                found[name] = (path, run)
    return [found[name] for name in sorted(found)]


def _section(path: Path, run: Run, relative_to: Path) -> str:
    about = run.machine
    device = about["name"] if about["device"] == "cuda" else f"{about['name']}, {about['threads']} threads"
    place_of = path.relative_to(relative_to).as_posix() if path.is_relative_to(relative_to) else path.name
    links = f"[figures]({place_of})"
    if path.with_suffix(".svg").exists():
        links += f", [picture]({Path(place_of).with_suffix('.svg').as_posix()})"
    head = (
        f"**{'GPU' if about['device'] == 'cuda' else 'CPU'}**: {device}, torch {about['torch']}, {run.date} ({links})"
    )
    if run.others > QUIET:
        head += f"; other processes used up to {run.others:.0%} of the CPU meanwhile: {DISTURBED}"
    measured = lines(run.records, about["device"], all_targets=not run.options["stems"])
    heading = ("metric", "pass", "stretch", "measured", "", "on")
    return f"{head}\n\n{markdown([heading, *map(_row, measured)])}"


def _row(line: Line) -> tuple[str, ...]:
    target, sign = line.target, "≥" if line.target.more else "≤"
    metric = f"{target.metric}: `{line.label}`" if line.label else target.metric
    verdict = f"**{line.verdict}**" if line.verdict == "missed" else line.verdict
    bounds = (f"{sign} {shown(bound, target.unit)}" for bound in (target.least, target.wish))
    return metric, *bounds, line.shown, verdict, place(line.record)


if __name__ == "__main__":
    raise SystemExit(main())
