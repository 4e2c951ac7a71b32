"""`pins-ext inspect`: the zeros of any safetensors checkpoint, whoever made it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pins_ext.runs.errors import EXIT_OK, UsageError
from pins_ext.runs.options import Parser, file_to_write

if TYPE_CHECKING:
    from pins_ext.sparse.calibration import Calibration
    from pins_ext.sparse.survey import TensorSurvey

_ABOUT = """Reads a checkpoint tensor by tensor, whatever its size, and says how many of its weights are zero, in each
tensor and together; which patterns they have (N:M, square blocks, whole rows, columns and attention heads); and what
the checkpoint takes on disk, dense and with a bit for each zero (pins-ext export). --speed also measures what its
pruned matrices would gain from sparse kernels here. Nothing is loaded but tensors: no model code runs.

examples:
  pins-ext inspect runs/rte --speed
  pins-ext inspect someone/model.safetensors --picture zeros.svg
  pins-ext inspect runs/rte.sparse --json > zeros.json
"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = Parser(prog="pins-ext inspect", description=_ABOUT)
    parser.add_argument("checkpoint", metavar="CKPT", help="a .safetensors file, or a folder that holds a checkpoint")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, and nothing else")
    parser.add_argument(
        "--speed", action="store_true", help="measure dense and sparse layers of these shapes and sparsities here"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw the sparsity of every matrix, as SVG")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    given = vars(parser.parse_args(argv))
    path = Path(given["checkpoint"])
    if not path.exists():
        raise UsageError(f"there is no {path}")
    picture = file_to_write("--picture", given["picture"], ".svg") if "picture" in given else None

    from pins_ext.files.plain import to_json
    from pins_ext.sparse.survey import SurveyError, survey, together

    found: list[TensorSurvey] = []
    try:
        for each in survey(path):
            found.append(each)
            if "json" not in given and len(each.shape) >= 2:
                print(_line(each), flush=True)
    except SurveyError as error:
        raise UsageError(str(error)) from error
    total = together(found)
    calibration = _measured(found) if "speed" in given else None
    if "json" in given:
        tensors = [asdict(each) | {"sparsity": each.sparsity} for each in found]
        speed = {} if calibration is None else {"speed": calibration.as_json()}
        head = {"format": "pins-ext inspection", "version": 1, "checkpoint": str(path)}
        print(to_json(head | total | speed | {"tensors": tensors}))
    else:
        print(_summary(total, found, _packed_bytes(path)))
        if calibration is not None:
            print(_speed(calibration))
    if picture is not None:
        _draw(found, path, picture)
    return EXIT_OK


def _line(each: TensorSurvey) -> str:
    """One matrix: sparsity, shape, patterns, name."""
    shape = " x ".join(map(str, each.shape))
    notes = [*each.patterns]
    if "all zero" not in notes and "whole rows and columns" not in notes:
        notes += _dead(each.dead_rows, "row") + _dead(each.dead_columns, "column")
    notes += _dead(each.dead_heads, "head")
    notes += [f"{each.not_finite:,} NaN or infinite"] if each.not_finite else []
    return f"{each.sparsity:8.2%}  {shape:<18} {each.dtype:<9} {each.name}" + (
        f"  ({', '.join(notes)})" if notes else ""
    )


def _dead(count: int, what: str) -> list[str]:
    return [f"{count:,} dead {what}{'s' if count > 1 else ''}"] if count else []


def _measured(found: Sequence[TensorSurvey]) -> Calibration:
    from pins_ext.sparse.expected_speed import expected_speed

    return expected_speed(found, progress=lambda line: print(line, file=sys.stderr, flush=True))


def _speed(calibration: Calibration) -> str:
    """The measurements, and what they come to for all pruned matrices together."""
    from pins_ext.sparse.expected_speed import totals

    if not calibration.trials:
        return "\nspeed     no matrix has so many zeros (30 %) that sparse kernels could help"
    lines = [
        f"speed     {n} token{'s' if n > 1 else ''}: {before / 1e3:,.2f} ms in these layers dense, "
        f"{after / 1e3:,.2f} ms sparse ({before / after:.1f} x); the rest of the model comes on top"
        for n, (before, after) in totals(calibration).items()
    ]
    return "\n".join(["", calibration.table(), *lines])


def _packed_bytes(path: Path) -> int | None:
    """What a checkpoint of save_sparse takes on disk; None for another."""
    from pins_ext.sparse.source import is_sparse

    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if is_sparse(path) else None


def _summary(total: dict[str, float], found: Sequence[TensorSurvey], here: int | None) -> str:
    lines = [
        "",
        f"weights   {total['weights']:,} in {total['tensors']:,} tensors, {total['zeros']:,} of them zero: "
        f"sparsity {total['sparsity']:.2%}",
    ]
    if total["pruned_tensors"]:
        lines.append(
            f"pruned    {total['pruned_tensors']:,} matrices with {total['pruned_weights']:,} weights: "
            f"sparsity {total['pruned_sparsity']:.2%}"
        )
    shared = _shared_patterns(found)
    lines.append(
        f"patterns  {', '.join(shared) if shared else 'none: zeros without structure' if total['zeros'] else '-'}"
    )
    dense, packed = total["dense_bytes"], total["packed_bytes"]
    saved = f"; pins-ext export packs it into {packed / 1e6:,.1f} MB, {packed / dense:.0%}" if packed < dense else ""
    if here is not None:
        saved = f"; {here / 1e6:,.1f} MB here, {here / dense:.0%}: it is packed, as pins-ext export does"
    lines.append(f"size      {dense / 1e6:,.1f} MB dense{saved}")
    if total["not_finite"]:
        lines.append(f"WRONG     {total['not_finite']:,} weights are NaN or infinite")
    return "\n".join(lines)


def _shared_patterns(found: Sequence[TensorSurvey]) -> list[str]:
    """Each pattern with the number of matrices that have it."""
    names = dict.fromkeys(pattern for each in found for pattern in each.patterns)
    counts = {name: sum(name in each.patterns for each in found) for name in names}
    return [f"{name} in {count} {'matrix' if count == 1 else 'matrices'}" for name, count in counts.items()]


def _draw(found: Sequence[TensorSurvey], path: Path, file: Path) -> None:
    from pins_ext.files.atomic import SaveError, write_file
    from pins_ext.runs.charts import sparsity_map

    shares = {each.name: each.sparsity for each in found if len(each.shape) >= 2 and each.weights}
    svg = sparsity_map(shares, path.name)
    if svg is None:
        raise UsageError(f"{path} holds no matrices to draw")
    try:
        write_file(file, svg)
    except SaveError as error:
        raise UsageError(str(error)) from error
