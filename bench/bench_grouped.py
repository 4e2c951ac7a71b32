"""Decoding with packed weights on a GPU against cuBLAS: all linear layers of a 7 B model's layer, weights not in L2.

    python -m bench.bench_grouped [--json FILE]

One to four tokens by `grouped_linear`, more by `grouped_expand` and cuBLAS. Beside them what torch has of fewer bits
and of 2:4 for the same shapes, which costs the same whatever is zero. Each layer is captured as a CUDA graph, so that
launches from Python cost nothing, and copies take turns that together are several times the L2 cache; medians.
Below twice the speed of cuBLAS at 80 % and one token the kernel is not worth shipping: expand instead. That is measured
first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pins_ext.sparse.grouped import GroupedLinear

from .graphs import captured
from .inference_gpu_peers import LAYERS, kernels_for
from .inference_peers import AbsentError
from .machine import describe

LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
"""[out, in] of Llama-2-7B: q, k, v, o, gate, up, down."""

SPARSITIES, TOKENS = (0.8, 0.5, 0.9), (1, 2, 4, 128)
PEERS_SPARSITY = 0.5
"""Of the weights of torch's other layers, and of those that cuBLAS multiplies in their ratio: 2:4 keeps half."""

COPIES = 4
"""Of the layer: 66 MB packed at 90 %, where an H200 has 50 MB of L2."""

Layer = Callable[[Tensor], Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each sparsity and number of tokens, and then for each peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu is for trying out")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide the sizes by N")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    shapes = [(out // options.shrink, in_ // options.shrink) for out, in_ in LAYER]
    run = partial(measured, shapes=shapes, device=device, rounds=options.rounds)
    print(f"{'zeros':>6}{'tokens':>8}{'cuBLAS us':>11}{'ours us':>9}{'ratio':>7}{'bytes':>7}{'GB/s':>7}")
    rows: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    with torch.inference_mode(), ExitStack() as end:
        # Also what an interrupted run has found.
        end.callback(save, options.json, {"machine": describe(device), "rows": rows, "peers": peers})
        for row in compared(shapes, device, run):
            rows.append(row)
            print(f"{row['sparsity']:>6.0%}{row['tokens']:>8}{row['cublas_us']:>11.1f}{row['ours_us']:>9.1f}"
                  f"{row['ratio']:>7.2f}{row['bytes']:>7.3f}{row['gb_per_s']:>7.0f}", flush=True)  # fmt: skip
            if (row["sparsity"], row["tokens"]) == (0.8, 1):
                verdict = "keep" if row["ratio"] >= 2 else "below 2: expand for cuBLAS alone"
                print(f"80 %, one token: {row['ratio']:.2f} x cuBLAS ({verdict})", flush=True)
        cublas = {row["tokens"]: row["cublas_us"] for row in rows if row["sparsity"] == PEERS_SPARSITY}
        print(f"torch's of fewer bits and 2:4, beside cuBLAS, all at {PEERS_SPARSITY:.0%} zeros", flush=True)
        for row in (row for name in LAYERS for row in peer(name, shapes, device, run)):
            peers.append(row)
            if "absent" in row:
                print(f"{row['name']:<14}absent: {row['absent']}", flush=True)
            else:
                ratio = cublas[row["tokens"]] / row["us"]
                print(f"{row['name']:<14}{row['tokens']:>8}{row['us']:>12.1f}{ratio:>7.2f}", flush=True)
    return 0


def save(path: Path | None, found: dict[str, Any]) -> None:
    """Write what was found, where that is asked for."""
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def compared(
    shapes: Sequence[tuple[int, int]], device: torch.device, run: Callable[..., float]
) -> Iterator[dict[str, Any]]:
    """cuBLAS and our layer at each sparsity and number of tokens."""
    for sparsity in SPARSITIES:
        weights = [pruned(shape, sparsity, device) for shape in shapes]
        packed = [GroupedLinear(weight) for weight in weights]
        size = sum(layer.bytes for layer in packed)
        dense = [[linear(weight.clone()) for weight in weights] for _ in range(COPIES)]
        ours = [[clone(layer) for layer in packed] for _ in range(COPIES)]
        for tokens in TOKENS:
            before, after = run(dense, tokens=tokens), run(ours, tokens=tokens)
            yield {"sparsity": sparsity, "tokens": tokens, "cublas_us": before * 1e6, "ours_us": after * 1e6,
                   "ratio": before / after, "bytes": size / sum(2 * weight.numel() for weight in weights),
                   "gb_per_s": size / after / 1e9}  # fmt: skip


def peer(
    name: str, shapes: Sequence[tuple[int, int]], device: torch.device, run: Callable[..., float]
) -> list[dict[str, Any]]:
    """One of torch's layers at each number of tokens, or why it is absent."""
    try:
        with kernels_for(name, device):
            _, make = LAYERS[name]
            copies = [[make(pruned(shape, PEERS_SPARSITY, device), None) for shape in shapes] for _ in range(COPIES)]
            return [{"name": name, "tokens": tokens, "us": run(copies, tokens=tokens) * 1e6} for tokens in TOKENS]
    except AbsentError as error:
        return [{"name": name, "absent": str(error)}]


def pruned(shape: tuple[int, int], sparsity: float, device: torch.device) -> Tensor:
    """Random bfloat16 weights, pruned at random."""
    weight = torch.randn(shape, dtype=torch.bfloat16, device=device)
    return weight.masked_fill_(torch.rand(shape, device=device) < sparsity, 0)


def clone(layer: GroupedLinear) -> GroupedLinear:
    """The same layer over memory of its own."""
    other = layer.__deepcopy__({})
    for name, buffer in layer._buffers.items():
        other._buffers[name] = None if buffer is None else buffer.clone()
    return other


def linear(weight: Tensor) -> Layer:
    """The dense layer."""
    return lambda x: F.linear(x, weight)


def measured(
    copies: Sequence[Sequence[Layer]],
    *,
    shapes: Sequence[tuple[int, int]],
    tokens: int,
    device: torch.device,
    rounds: int,
) -> float:
    """Median seconds of a layer; the copies take turns."""
    inputs = [torch.randn(tokens, in_, dtype=torch.bfloat16, device=device) for _, in_ in shapes]

    def call(copy: Sequence[Layer]) -> None:
        for layer, x in zip(copy, inputs, strict=True):
            layer(x)

    calls = [captured(partial(call, copy), device) for copy in copies]
    return statistics.median([timed(calls[i % len(calls)], device) for i in range(rounds)])


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


if __name__ == "__main__":
    raise SystemExit(main())
