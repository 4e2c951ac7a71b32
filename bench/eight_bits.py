"""Masks of small statistics beside those of float32, from the same gradients of one run.

    python -m bench.eight_bits MRPC_TRAIN.tsv [--steps 60]

The embedded MiniLM learns paraphrases (tab-separated: label, two ids, two sentences); nothing is pruned, so that scores
stay close around the threshold.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pins_ext import ops
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.tasks import minilm_folder

STORAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}
RATE = 3e-5


class Statistics:
    """The three states of all pruned tensors in one storage."""

    def __init__(self, weights: list[Tensor], layout: ops.Layout, dtype: torch.dtype, beta2: float) -> None:
        self.weights, self.layout, self.beta2 = weights, layout, beta2
        self.ipt, self.mean, self.unc = ([ops.new_state(p, dtype) for p in weights] for _ in range(3))
        self.masks = [ops.new_mask(p) for p in weights]
        self.tables = (layout.places, layout.chunks)

    def take(self, grads: list[Tensor], accepted: int, step: int) -> None:
        rates, count = torch.full((len(grads),), RATE), torch.tensor([float(accepted)])
        rng = torch.tensor(ops.rounding_key(0, step, 0))
        ops.accumulate_(self.ipt, self.weights, grads, *self.tables, rates, count, rng, "pins")

    def select(self, share: float, step: int) -> float:
        """Fold, and keep this share; returns the threshold."""
        rng = torch.tensor(ops.rounding_key(0, step, 1))
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


def batches(path: Path, steps: int, tokenizer: object) -> list[dict[str, Tensor]]:
    """Batches of 16 pairs."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    made = []
    for i in range(steps):
        part = [rows[(16 * i + j) % len(rows)] for j in range(16)]
        first, second = [row[3] for row in part], [row[4] for row in part]
        batch = dict(tokenizer(first, second, padding=True, truncation=True, max_length=96, return_tensors="pt"))  # type: ignore[operator]
        made.append(batch | {"labels": torch.tensor([int(row[0]) for row in part])})
    return made


def measure(path: Path, steps: int, delta_t: int, beta2: float, share: float) -> None:
    """Print, for each window, overlap and drift of the threshold."""
    torch.manual_seed(0)
    folder = minilm_folder()
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    pruned = [p.data for p in prunable_parameters(model, PruneConfig()).values()]
    parameters = list(prunable_parameters(model, PruneConfig()).values())
    layout = ops.Layout.of(pruned)
    kept = {name: Statistics(pruned, layout, dtype, beta2) for name, dtype in STORAGES.items()}
    optimizer = PinsAdamW(model.parameters(), lr=RATE)
    found: list[dict[str, float]] = []
    before: list[Tensor] = []
    model.train()
    for step, batch in enumerate(batches(path, steps, AutoTokenizer.from_pretrained(folder))):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        grads = [p.grad for p in parameters if p.grad is not None]
        for statistics in kept.values():
            statistics.take(grads, step % delta_t, step)
        optimizer.step()
        if (step + 1) % delta_t:
            continue
        thresholds = {name: statistics.select(share, step) for name, statistics in kept.items()}
        exact = kept["float32"].masks
        row = {"noise floor": overlap(exact, before) if before else float("nan")}
        for name in ("bfloat16", "8bit"):
            row[name] = overlap(exact, kept[name].masks)
            row[f"{name} drift"] = abs(thresholds[name] / thresholds["float32"] - 1) if thresholds["float32"] else 0.0
        found.append(row)
        before = [mask.clone() for mask in exact]
    last = found[len(found) // 2 :]
    shown = ", ".join(f"{key} {sum(r[key] for r in last) / len(last):.4f}" for key in last[0])
    print(
        f"delta_t {delta_t}, beta2 {beta2}, {share:.0%} kept, second half of {len(found)} windows: {shown}", flush=True
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--share", type=float, default=0.2)
    args = parser.parse_args()
    for delta_t, beta2 in ((10, 0.95), (10, 0.99), (1, 0.95), (1, 0.99)):
        measure(args.data, args.steps, delta_t, beta2, args.share)


if __name__ == "__main__":
    main()
