"""`pins-ext ablate`: train a grid of runs, and write the tables and the picture that compare them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pins_ext.runs.errors import EXIT_FAILED, EXIT_OK, UsageError
from pins_ext.runs.options import Parser, normalised

if TYPE_CHECKING:
    from rich.console import Console

    from pins_ext.studies.ablation.cells import Cell, Row
    from pins_ext.studies.ablation.grid import Grid

_USAGE = "pins-ext ablate GRID [flags] [flags of train]"

_ABOUT = """Trains every cell of a grid (method x setting x seed) in a process of its own, one after another, and writes
  ablation.md    mean and standard deviation over seeds, differences to a reference method, cost, overlap of masks
  ablation.csv   the same as numbers; cells.csv has every run, overlap.csv every pair of masks
  ablation.svg   the picture
Called again it goes on where it was: finished cells stay, an interrupted one resumes from its checkpoint. A cell that
fails is reported and does not stop the others; the exit code is then 1.

GRID is the name of a grid that comes with the package (--list) or a YAML file:
  about: one line
  base: {task: glue/rte, max-steps: 300}         flags of every run
  methods:                                       name -> flags that make the method
    dense: {sparsity: 0}
    pins: {}
    platon: {criterion: platon, teacher: none}
  vary: {sparsity: [0.8, 0.9]}                   flag -> values: every combination, with every method
  seeds: [42, 12, 100]
  reference: pins                                differences are taken to this method
Flags of train that are typed here go to every cell. They replace what base and vary say; what a method sets itself
stays. {task} in --data-dir stands for the task's name without glue/."""

_EXAMPLES = """examples:
  pins-ext ablate --list
  pins-ext ablate rte-80 --dry-run
  pins-ext ablate rte-80 --model bert-base-uncased --seeds 42 12 100 9 2
  pins-ext ablate mine.yaml --only 'pins/*' --max-steps 30 --output-dir runs/try
  pins-ext ablate rte-80 --report-only"""


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when a cell failed."""
    given, grid_name, others = _parse(argv)
    if "list" in given:
        return _list()

    from pins_ext.runs.terminal import console
    from pins_ext.studies.ablation.cells import chosen, rows_of, with_typed
    from pins_ext.studies.ablation.grid import read_grid

    grid = with_typed(read_grid(grid_name), _typed_flags(others), given.get("seeds"))
    root = Path(given.get("output_dir", Path("runs", grid.name))).absolute()
    rows = rows_of(grid, root)
    everything = chosen(rows, [])
    cells = chosen(rows, given.get("only", []))
    if "dry_run" in given:
        return _show(grid, cells, len(everything), "overwrite" in given)
    screen = console()
    failed: list[Cell] = []
    if "report_only" not in given:
        failed = _train(cells, root, "overwrite" in given, screen)
    _report(grid, root, rows, everything, screen)
    return EXIT_FAILED if failed else EXIT_OK


def _parse(argv: Sequence[str]) -> tuple[dict[str, Any], str, list[str]]:
    """Our flags, the grid's name, and what else was typed."""
    parser = Parser(prog="pins-ext ablate", usage=_USAGE, description=f"{_ABOUT}\n\n{_EXAMPLES}")
    parser.add_argument("--list", action="store_true", help="the grids that come with the package")
    parser.add_argument("--dry-run", action="store_true", help="list the cells with their flags; train nothing")
    parser.add_argument("--report-only", action="store_true", help="write tables and picture from finished cells")
    text = "only the cells whose name fits, as --dry-run lists them; may be given several times"
    parser.add_argument("--only", action="append", metavar="GLOB", help=text)
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the grid's")
    parser.add_argument("--output-dir", metavar="DIR", help="folder of the cells and tables [runs/GRID]")
    parser.add_argument("--overwrite", action="store_true", help="train finished cells again, replace other settings'")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    tokens = normalised(argv)
    name = tokens.pop(0) if tokens and not tokens[0].startswith("-") else ""
    known, others = parser.parse_known_args(tokens)
    given = vars(known)
    if not name and "list" not in given:
        raise UsageError(f"which grid? {_USAGE}; --list shows those that come with the package")
    seeds = given.get("seeds", [])
    if len(set(seeds)) < len(seeds):
        raise UsageError("--seeds must be different numbers")
    return given, name, others


def _typed_flags(tokens: Sequence[str]) -> dict[str, Any]:
    """Flags of train, typed for all cells, by name."""
    from pins_ext.studies.ablation.grid import checked_flags

    flags: dict[str, list[str]] = {}
    name = ""
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            flags[name] = [value] if equals else []
        elif name:
            flags[name].append(token)
        else:
            raise UsageError(f"unexpected argument {token!r}")
    return checked_flags({name: _value(values) for name, values in flags.items()}, "typed flags")


def _value(values: list[str]) -> Any:
    """A bare flag is true, one value is itself, several are a list."""
    return True if not values else values[0] if len(values) == 1 else values


def _list() -> int:
    from pins_ext.studies.ablation.grid import read_grid, shipped

    for name in shipped():
        grid = read_grid(name)
        runs = len(grid.methods) * len(grid.combinations()) * len(grid.seeds)
        print(f"{name:<24}at most {runs} runs: {grid.about}")
    return EXIT_OK


def _show(grid: Grid, cells: Sequence[Cell], total: int, overwrite: bool) -> int:
    from pins_ext.runs.folder import as_typed

    models = dict.fromkeys(cell.request.run.model or "the embedded MiniLM" for cell in cells)
    print(f"{grid.name}: {len(cells)} of {total} cells, seeds {', '.join(map(str, grid.seeds))}, {', '.join(models)}")
    print(f"{grid.about}\n")
    for cell in cells:
        conflict = None if overwrite else cell.conflict()
        state = "finished" if cell.record() else "resumes" if cell.interrupted else "refused" if conflict else "to run"
        command = shlex.join(["pins-ext", "train", *cell.flags, "--output-dir", str(as_typed(cell.folder))])
        print(f"{'to run' if overwrite else state:<9} {cell.name}\n          {conflict or command}")
    return EXIT_OK


def _train(cells: Sequence[Cell], root: Path, overwrite: bool, console: Console) -> list[Cell]:
    """Run the cells, unless one of them would lose another run's work; returns those that failed."""
    from pins_ext.studies.ablation.launch import run_cells

    conflicts = [conflict for cell in cells if (conflict := cell.conflict())]
    if conflicts and not overwrite:
        raise UsageError(conflicts[0])
    console.print(f"{len(cells)} cells, results in {root}", soft_wrap=True)
    return run_cells(cells, console, overwrite)


def _report(grid: Grid, root: Path, rows: Sequence[Row], cells: Sequence[Cell], console: Console) -> None:
    from rich.table import Table

    from pins_ext.studies.ablation.document import DOCUMENT, results, write
    from pins_ext.studies.ablation.launch import failure

    why_not = {cell.name: failure(cell) for cell in cells if cell.record() is None}
    head, *lines = results(write(root, grid, rows, cells, why_not), grid.reference)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(head):
        table.add_column(column, justify="left" if i <= head.index("method") else "right")
    for line in lines:
        table.add_row(*line)
    console.print()
    console.print(table)
    console.print()
    if why_not:
        console.print(f"{len(why_not)} of {len(cells)} cells have no result; {DOCUMENT} says why", soft_wrap=True)
    console.print(f"report  {root / DOCUMENT}", soft_wrap=True)
