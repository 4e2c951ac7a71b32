"""Masks of small statistics beside those of float32, from the same gradients of one run.

    python -m bench.eight_bits MRPC_TRAIN.tsv [--steps 60] [--output FILE.json]
    python -m bench.eight_bits WIKITEXT2_TRAIN.txt.gz

The embedded MiniLM learns paraphrases (tab-separated: label, two ids, two sentences), or the masked words of running
text; nothing is pruned, so that scores stay close around the threshold. All settings see the same gradients.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from pins_ext import ops
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.tasks import minilm_folder

STORAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}
RATE = 3e-5
SETTINGS = tuple(product((1, 10), (0.95, 0.99)))
"""Window in steps, and beta2."""

Batch = dict[str, Tensor]


class Statistics:
    """The three states of all pruned tensors in one storage."""

    def __init__(self, weights: list[Tensor], layout: ops.Layout, dtype: torch.dtype, beta2: float) -> None:
        self.weights, self.layout, self.beta2 = weights, layout, beta2
        self.ipt, self.mean, self.unc = ([ops.new_state(p, dtype) for p in weights] for _ in range(3))
        self.masks = [ops.new_mask(p) for p in weights]
        self.tables = (layout.places, layout.chunks)
        self.windows = 0

    def take(self, grads: list[Tensor], accepted: int, step: int) -> None:
        rates, count = torch.full((len(grads),), RATE), torch.tensor([float(accepted)])
        rng = torch.tensor(ops.rounding_key(0, step, 0))
        ops.accumulate_(self.ipt, self.weights, grads, *self.tables, rates, count, rng, "pins")

    def select(self, share: float, step: int) -> float:
        """Fold, and keep this share; returns the threshold."""
        self.windows += 1
        coded = self.ipt[0].dtype in ops.CODED
        rng = torch.tensor(ops.fold_key(self.windows) if coded else ops.rounding_key(0, step, 1))
        ops.fold_(self.mean, self.unc, self.ipt, *self.tables, torch.ones(1), rng, 0.85, self.beta2)
        total = self.layout.total
        operands = (self.mean, self.unc, *self.tables, "product")
        cutoff = ops.select(*operands, torch.tensor(total - round(share * total)))
        ops.pack_(self.masks, torch.zeros(len(self.masks), 3, dtype=torch.int64), *operands, cutoff.reshape(1, 2))
        return ops.score_of_key(cutoff).item()


def overlap(one: list[Tensor], other: list[Tensor]) -> float:
    """Share of the kept weights of one that the other keeps."""
    both = sum(int(ops.set_bits(a & b)) for a, b in zip(one, other, strict=True))
    return both / sum(int(ops.set_bits(a)) for a in one)


def pairs(path: Path, steps: int, tokenizer: Any) -> Iterator[Batch]:
    """Batches of 16 pairs of sentences."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    for i in range(steps):
        part = [rows[(16 * i + j) % len(rows)] for j in range(16)]
        first, second = [row[3] for row in part], [row[4] for row in part]
        batch = dict(tokenizer(first, second, padding=True, truncation=True, max_length=96, return_tensors="pt"))
        yield batch | {"labels": torch.tensor([int(row[0]) for row in part])}


def masked_text(path: Path, steps: int, tokenizer: Any) -> Iterator[Batch]:
    """Batches of 16 paragraphs, 15 % of whose words are hidden and to be found."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file if len(line) > 100]
    generator = torch.Generator().manual_seed(0)
    for i in range(steps):
        part = [lines[(16 * i + j) % len(lines)] for j in range(16)]
        batch = dict(tokenizer(part, padding=True, truncation=True, max_length=96, return_tensors="pt"))
        ids = batch["input_ids"]
        hidden = (torch.rand(ids.shape, generator=generator) < 0.15) & (ids > tokenizer.mask_token_id)
        batch["input_ids"] = ids.masked_fill(hidden, tokenizer.mask_token_id)
        yield batch | {"labels": ids.masked_fill(~hidden, -100)}


def measure(path: Path, steps: int, share: float) -> list[dict[str, Any]]:
    """Overlaps and drifts of every setting, means over the second half of its windows; printed as they are known."""
    torch.manual_seed(0)
    folder, text = minilm_folder(), path.suffix == ".gz"
    kind = AutoModelForMaskedLM if text else AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=torch.float32)
    parameters = list(prunable_parameters(model, PruneConfig()).values())
    pruned = [p.data for p in parameters]
    layout = ops.Layout.of(pruned)
    kept = {
        setting: {name: Statistics(pruned, layout, dtype, setting[1]) for name, dtype in STORAGES.items()}
        for setting in SETTINGS
    }
    found: dict[tuple[int, float], list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
    before: dict[tuple[int, float], list[Tensor]] = {}
    optimizer = PinsAdamW(model.parameters(), lr=RATE)
    model.train()
    for step, batch in enumerate((masked_text if text else pairs)(path, steps, AutoTokenizer.from_pretrained(folder))):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        grads = [p.grad for p in parameters if p.grad is not None]
        for (delta_t, _), storages in kept.items():
            for statistics in storages.values():
                statistics.take(grads, step % delta_t, step)
        optimizer.step()
        for setting, storages in kept.items():
            if (step + 1) % setting[0] == 0:
                found[setting].append(_window(storages, before.get(setting), share, step))
                before[setting] = [mask.clone() for mask in storages["float32"].masks]
    rows = []
    for (delta_t, beta2), windows in found.items():
        last = windows[len(windows) // 2 :]
        means = {key: sum(r[key] for r in last) / len(last) for key in last[-1]}
        rows.append(
            {"data": path.name, "delta_t": delta_t, "beta2": beta2, "kept": share, "windows": len(last), **means}
        )
        shown = ", ".join(f"{key} {value:.4f}" for key, value in means.items())
        print(f"{path.name}, delta_t {delta_t}, beta2 {beta2}, {share:.0%} kept, last {len(last)} windows: {shown}")
    return rows


def _window(storages: dict[str, Statistics], before: list[Tensor] | None, share: float, step: int) -> dict[str, float]:
    """Overlaps with the mask of float32 at a window's end, and drifts of the threshold."""
    thresholds = {name: statistics.select(share, step) for name, statistics in storages.items()}
    exact = storages["float32"].masks
    row = {"noise floor": overlap(exact, before) if before else float("nan")}
    for name in ("bfloat16", "8bit"):
        row[name] = overlap(exact, storages[name].masks)
        row[f"{name} drift"] = abs(thresholds[name] / thresholds["float32"] - 1) if thresholds["float32"] else 0.0
    return row


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="pairs (.tsv) or running text (.txt.gz)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--share", type=float, default=0.2, help="of the weights that is kept")
    parser.add_argument("--output", type=Path, help="write the rows as JSON, too")
    args = parser.parse_args()
    rows = [row for path in args.data for row in measure(path, args.steps, args.share)]
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
