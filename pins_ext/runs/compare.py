"""Dense, pruned as asked, and pruned by magnitude: three runs with the same budget, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pins_ext.files.atomic import write_file
from pins_ext.runs.errors import UsageError
from pins_ext.runs.folder import RunFolder, is_result
from pins_ext.runs.html import REPORT, render
from pins_ext.runs.record import RunRecord
from pins_ext.runs.request import RegularizerOptions, Request
from pins_ext.runs.run import finished, run
from pins_ext.runs.sparse_ending import end_sparse
from pins_ext.runs.summary import print_summary
from pins_ext.tasks import Task


def compare(request: Request, console: Console) -> None:
    """Train the three, print the table, write the report that shows them side by side, and run the pruned one sparse.

    Raises:
        UsageError: the output folder holds something else. Whatever `run` raises.
    """
    root = Path(request.run.output_dir)
    requests = three(request)
    assert request.pruning is not None
    _check_place(root, requests, request.overwrite)
    for each in requests.values():
        RunFolder(Path(each.run.output_dir).absolute(), each.overwrite).check(resume=each.resume is not None)
    console.print(f"{len(requests)} runs with the same budget: {', '.join(each.label for each in requests.values())}")
    records: list[RunRecord] = []
    task: Task | None = None
    for each in requests.values():
        record = finished(each)
        if record is None:
            record, task = run(each, console, task)
        records.append(record)
    write_file(root / REPORT, render(records))
    print_summary(records, [Path(each.run.output_dir) for each in requests.values()], console)
    console.print(f"report  {root / REPORT}", soft_wrap=True)
    end_sparse(root / str(request.pruning.criterion), console)


def three(request: Request) -> Mapping[str, Request]:
    """The requests of the three runs, by the name of their folder within the output folder."""
    if request.pruning is None:
        raise UsageError("--compare needs a sparsity above 0")
    # Magnitude pruning as it is usually done: no gradient criterion, no teacher.
    by_magnitude = replace(request.pruning, criterion="magnitude")
    plain = RegularizerOptions(teacher="none")
    kinds = {
        "dense": (None, plain),
        str(request.pruning.criterion): (request.pruning, request.regularizer),
        "magnitude": (by_magnitude, plain),
    }
    root = Path(request.run.output_dir)
    # The demo is short: unless it decides something by them, it needs no evaluations on the way, nor checkpoints.
    short = request.run.compare is None and not request.needs_evaluations
    light = {"eval_strategy": "no", "save_strategy": "no"} if short else {}
    training = {**request.training, **{name: value for name, value in light.items() if name not in request.given}}
    return {
        name: replace(
            request,
            run=replace(request.run, output_dir=str(root / name), label=None, compare=False),
            pruning=pruning,
            regularizer=regularizer,
            training=training,
            overwrite=request.overwrite or _is_ours(request, root / name),
        )
        for name, (pruning, regularizer) in kinds.items()
    }


def _is_ours(request: Request, folder: Path) -> bool:
    """The demo replaces its own earlier results; they come out the same every time."""
    return request.run.compare is None and request.resume is None and (is_result(folder) or not folder.exists())


def _check_place(root: Path, names: Mapping[str, Request], overwrite: bool) -> None:
    if not root.is_dir() or overwrite:
        return
    foreign = [e.name for e in root.iterdir() if e.name != REPORT and e.name.strip(".").split(".")[0] not in names]
    if foreign:
        raise UsageError(
            f"{root} holds other files ({sorted(foreign)[0]}): choose another --output-dir, or --overwrite"
        )
