"""Bytes of each set-up of small states, counted and there, and the time of its step, beside dense AdamW.

    python -m bench.small_states [--size bert|1b] [--steps 5] [--output FILE.json]

Every row trains in a process of its own. bert: BERT-base, 110 M weights, on a sentence of eight tokens, so that the
optimizer is most of the step. 1b: 60 matrices of 4,096 x 4,096 with a gradient from a synthetic loss; float32 is left
out. "there" is every tensor that Python holds when the optimizer is about to step (gradients included, unless they were
released); "peak" is what the process grew by, loading and forward included. torchao's AdamW with 8-bit states is a row
where torchao can be imported.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from pins_ext.optim import PinsAdamW
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.memory import memory
from pins_ext.pruning.parameters import prunable_parameters
from pins_ext.pruning.pruner import Pruner

from .memory import Peak


@dataclass(frozen=True)
class SetUp:
    """One row.

    Attributes:
        name: what it is called.
        dtype: of the weights.
        moments: PinsAdamW's moment_dtype.
        pruning: options of PruneConfig; None: a dense run.
        release: whether gradients are released.
        frozen: whether the pruned weights don't learn.
        peer: another library's optimizer.
    """

    name: str
    dtype: str = "bfloat16"
    moments: str = "float32"
    pruning: dict[str, Any] | None = field(default_factory=dict)
    release: bool = False
    frozen: bool = False
    peer: str | None = None


SET_UPS = (
    SetUp("torch fused AdamW, float32", "float32", pruning=None, peer="torch"),
    SetUp("torch fused AdamW, bfloat16 rounded to nearest", pruning=None, peer="torch"),
    SetUp("torchao AdamW8bit, bfloat16", pruning=None, peer="torchao"),
    SetUp("PinsAdamW 8 bits, bfloat16, dense", moments="8bit", pruning=None),
    SetUp("float32", "float32"),
    SetUp("bfloat16", moments="bfloat16", pruning={"state_dtype": "bfloat16"}),
    SetUp("8 bits", moments="8bit", pruning={"state_dtype": "8bit"}),
    SetUp("8 bits, released", moments="8bit", pruning={"state_dtype": "8bit"}, release=True),
    SetUp("fisher, 8-bit moments", moments="8bit", pruning={"criterion": "fisher"}),
    SetUp("fisher, 8-bit moments, released", moments="8bit", pruning={"criterion": "fisher"}, release=True),
    SetUp("frozen base, bfloat16", pruning={"criterion": "platon", "state_dtype": "bfloat16"}, frozen=True),
    SetUp("frozen base, 8 bits", pruning={"criterion": "platon", "state_dtype": "8bit"}, frozen=True),
)


class Matrices(nn.Module):
    """A billion weights whose gradients need no activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(60))
        self.classifier = nn.Linear(8, 2)

    def loss(self) -> Tensor:
        """Of every weight alone: gradients come one after another."""
        head = self.classifier(torch.ones(1, 8, dtype=self.classifier.weight.dtype)).sum()
        return sum(((p * 1e-3).square().sum().float() for p in self.layers.parameters()), head.float())


class Sentence(nn.Module):
    """BERT-base and the loss of one sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.net = BertForSequenceClassification(BertConfig())

    def loss(self) -> Tensor:
        """Of eight tokens."""
        return self.net(torch.arange(1, 9).reshape(1, 8), labels=torch.tensor([1])).loss


def _held() -> int:
    """Bytes of all tensors."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu" and thing.layout == torch.strided:
            for t in (thing, thing.grad if thing.is_leaf else None):
                if t is not None:
                    found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(found.values())


def _optimizer(row: SetUp, learning: list[nn.Parameter]) -> Any:
    if row.peer == "torch":
        return torch.optim.AdamW(learning, lr=1e-5, fused=True)
    if row.peer == "torchao":
        from torchao.optim import AdamW8bit

        return AdamW8bit(learning, lr=1e-5, bf16_stochastic_round=True)
    return PinsAdamW(learning, lr=1e-5, moment_dtype=row.moments)


def measure(row: SetUp, size: str, steps: int) -> dict[str, Any]:
    """Train a few steps in this process."""
    kind: Callable[[], Any] = {"bert": Sentence, "1b": Matrices}[size]
    torch.manual_seed(0)
    before = _held()
    with Peak(torch.device("cpu")) as peak:
        torch.set_default_dtype(getattr(torch, row.dtype))
        model = kind()
        torch.set_default_dtype(torch.float32)
        config = PruneConfig(warmup=0, cooldown=2, delta_t=1, **(row.pruning or {}))
        pruned = prunable_parameters(model, config)
        if row.frozen:
            model.requires_grad_(False)
            model.get_submodule("net.classifier" if size == "bert" else "classifier").requires_grad_(True)
        optimizer = _optimizer(row, [p for p in model.parameters() if p.requires_grad])
        if row.pruning is not None:
            Pruner(model, optimizer, config, steps + 2, frozen_base=row.frozen)
        if row.release:
            optimizer.release_gradients()
        seconds, there = [], 0
        for step in range(steps + 2):
            optimizer.zero_grad()
            begin = time.perf_counter()
            loss = model.loss()
            loss.backward()
            there = _held() - before if step == steps else there
            begin = begin if row.release or row.frozen else time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - begin)
    weights, n = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in pruned.values())
    found = {"weights": weights, "pruned": n, "bytes": there, "peak": peak.bytes}
    # The first step makes states, the second the first mask, torchao's first one its kernels.
    found["step_ms"] = 1e3 * statistics.median(seconds[2:])
    found["step_includes"] = "backward" if row.release or row.frozen else ""
    if row.peer is None:
        part = model.net if size == "bert" else model
        names = [name.removeprefix("net.") for name in pruned] if row.pruning is not None else []
        counted = memory(part, names, config, moment_dtype=row.moments, release=row.release, frozen_base=row.frozen)
        found |= {"counted": counted.total, "counted_kinds": asdict(counted)}
        found["per_weight"] = _per_weight(
            counted, weights, n if row.pruning is not None else 0, row.release or row.frozen
        )
    return found


def _per_weight(counted: Any, weights: int, pruned: int, one_gradient: bool) -> float:
    """Bytes of a pruned weight: what all weights have, and what pruned ones have; one gradient at a time is none."""
    shared = counted.weights + counted.moments
    if not one_gradient:
        shared += counted.gradients
    return shared / weights + (counted.statistics + counted.masks) / pruned if pruned else shared / weights


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("bert", "1b"), default="bert")
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose names contain one of these")
    parser.add_argument("--output", type=Path, help="write the rows as JSON, too")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        warnings.simplefilter("ignore")
        row = next(row for row in SET_UPS if row.name == args.row)
        print(json.dumps(measure(row, args.size, args.steps)))
        return
    found = []
    print(f"{'set-up':<48}{'B a weight':>11}{'there':>11}{'counted':>11}{'peak':>11}{'step':>11}")
    for row in SET_UPS:
        if args.size == "1b" and row.dtype == "float32":
            continue
        if args.only and not any(text in row.name for text in args.only):
            continue
        if row.peer == "torchao" and find_spec("torchao") is None:
            print(f"{row.name:<48} torchao is not installed: pip install --no-deps torchao")
            continue
        about = {"size": args.size, "set_up": row.name, "threads": torch.get_num_threads(), "torch": torch.__version__}
        if row.peer == "torchao":
            about["torchao"] = version("torchao")
        own = ["--size", args.size, "--steps", str(args.steps), "--row", row.name]
        done = subprocess.run([sys.executable, "-m", __spec__.name, *own], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{row.name:<48} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        found.append(about | json.loads(done.stdout.splitlines()[-1]))
        _show(found[-1])
        if args.output is not None:
            args.output.write_text(json.dumps(found, indent=1) + "\n")


def _show(row: dict[str, Any]) -> None:
    each = f"{row['per_weight']:.2f}" if "per_weight" in row else f"{row['bytes'] / row['weights']:.2f}"
    sizes = "".join(
        f"{row[key] / 1e6:>8,.0f} MB" if row.get(key) else f"{'':>11}" for key in ("bytes", "counted", "peak")
    )
    after = f"  with {row['step_includes']}" if row["step_includes"] else ""
    print(f"{row['set_up']:<48}{each:>11}{sizes}{row['step_ms']:>8,.0f} ms{after}", flush=True)


if __name__ == "__main__":
    main()
