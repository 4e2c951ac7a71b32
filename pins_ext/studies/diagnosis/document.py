"""The files of a diagnosis: Markdown to read, JSON and CSV to go on with, the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pins_ext import __version__
from pins_ext.files.atomic import write_file
from pins_ext.files.plain import to_json
from pins_ext.runs.prepare import Prepared
from pins_ext.runs.tables import csv_text, markdown
from pins_ext.studies.diagnosis.changes import FRACTIONS, Change, Diagnosis
from pins_ext.studies.diagnosis.chart import draw
from pins_ext.studies.diagnosis.summary import NOT_SHOWN, agreements, reading, tables

NAME = "diagnosis"


def document(prepared: Prepared, found: Diagnosis, examples: int, seconds: float) -> dict[str, Any]:
    """Everything that was found. examples: that the loss was measured on. seconds: of the whole run."""
    request = prepared.request
    notes = [
        f"The loss is the task's own on {examples} fixed training examples, without dropout and without the distance "
        f"to a teacher, in {request.run.dtype}.",
        "A change is clear when it is three standard deviations of what rounding does to it; ratios and signs are "
        "those of clear changes.",
        "Random weights are as many as the mask's: beside newly pruned ones drawn among those that the last mask kept, "
        "beside all pruned ones among all prunable ones.",
    ]
    return {
        "format": "pins-ext diagnosis",
        "version": 1,
        "label": request.label,
        "model": prepared.model_name,
        "task": prepared.task.name,
        "total_steps": prepared.total_steps,
        "examples": examples,
        "evaluations": found.loss.evaluations,
        "seconds": seconds,
        "flags": list(request.tokens),
        "pins_ext": __version__,
        "notes": notes + ([NOT_SHOWN] if found.exchanges else []),
        "reading": reading(found.changes, found.exchanges),
        "agreements": agreements(found.changes),
        "observations": found.observations,
        "changes": found.changes,
        "exchanges": found.exchanges,
        "tables": tables(found.changes, found.exchanges),
    }


def write(content: dict[str, Any], folder: Path) -> list[Path]:
    """Write the four files.

    Raises:
        SaveError: one of them could not be written.
    """
    files = [folder / f"{NAME}{suffix}" for suffix in (".md", ".json", ".csv", ".svg")]
    changes: list[Change] = content["changes"]
    write_file(files[0], _markdown(content))
    numbers = {name: part for name, part in content.items() if name != "tables"}
    write_file(files[1], to_json({**numbers, "changes": [asdict(change) for change in changes]}))
    write_file(files[2], _csv(changes))
    write_file(files[3], draw(changes, content["label"]))
    return files


def _markdown(content: dict[str, Any]) -> str:
    title = f"{content['label']}, {content['model']}, {content['task']}, {content['total_steps']} steps"
    parts = [f"# First order against the loss: {title}", "![predicted against measured](diagnosis.svg)"]
    parts += content["reading"]
    for heading, head, rows in content["tables"]:
        parts += [f"## {heading}", markdown([head, *rows], numbers=True)]
    parts += ["## How it was measured", *content["notes"]]
    parts.append(f"`pins-ext diagnose {' '.join(content['flags'])}`")
    return "\n\n".join(parts) + "\n"


def _csv(changes: Sequence[Change]) -> str:
    names = ("step", "kind", "extent", "weights", "predicted", "measured", "noise", "predicted_sgd")
    return csv_text(
        {
            **{name: getattr(change, name) for name in names},
            **{f"measured_at_{part:g}": (change.fractions or {}).get(part) for part in FRACTIONS},
        }
        for change in changes
    )
