"""How much a diagnosis measures: one frozen dataclass, whose fields are flags of the command."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


def _flag(default: Any, help: str, least: int) -> Any:
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True)
class DiagnosisOptions:
    """How much is measured. The metadata of each field is its command-line help, and its least value.

    Raises:
        ValueError: a number below its least.
    """

    loss_batches: int = _flag(2, "batches of --per-device-eval-batch-size that the loss is measured on", 1)
    masks: int = _flag(12, "new masks to look at, evenly spread over the run", 1)
    random_masks: int = _flag(4, "random masks of the same size beside each", 1)
    exchange_masks: int = _flag(1, "of those masks, how many to try exchanges at; 0: none", 0)
    exchanges: int = _flag(16, "groups of weights to exchange, near the threshold and anywhere", 2)
    exchange_pairs: int | None = _flag(None, "pairs in a group; if not given, as few as stand out from rounding", 1)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, least = getattr(self, each.name), each.metadata["least"]
            if value is not None and value < least:
                raise ValueError(f"--{each.name.replace('_', '-')} must be at least {least}, got {value}")
