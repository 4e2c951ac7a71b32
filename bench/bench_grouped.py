"""Decoding with packed weights on a GPU against cuBLAS: all linear layers of a 7 B model's layer, weights not in L2.

    python -m bench.bench_grouped [--json FILE]

One to four tokens by `grouped_linear`, more by `grouped_expand` and cuBLAS. Each layer is captured as a CUDA graph, so
that launches from Python cost nothing, and copies take turns that together are several times the L2 cache; medians.
Below twice the speed of cuBLAS at 80 % and one token the kernel is not worth shipping: expand instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pins_ext.sparse.grouped import GroupedLinear

from .machine import describe

LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
"""[out, in] of Llama-2-7B: q, k, v, o, gate, up, down."""

SPARSITIES, TOKENS = (0.5, 0.8, 0.9), (1, 2, 4, 128)
COPIES = 4
"""Of the layer: 66 MB packed at 90 %, where an H200 has 50 MB of L2."""

Layer = Callable[[Tensor], Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each sparsity and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu is for trying out")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide the sizes by N")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    device, rows = torch.device(options.device), []
    shapes = [(out // options.shrink, in_ // options.shrink) for out, in_ in LAYER]
    print(f"{'zeros':>6}{'tokens':>8}{'cuBLAS us':>11}{'ours us':>9}{'ratio':>7}{'bytes':>7}{'GB/s':>7}")
    with torch.inference_mode():
        for sparsity in SPARSITIES:
            weights = [pruned(shape, sparsity, device) for shape in shapes]
            packed = [GroupedLinear(weight) for weight in weights]
            share = sum(layer.bytes for layer in packed) / sum(2 * weight.numel() for weight in weights)
            dense = [list(map(torch.clone, weights)) for _ in range(COPIES)]
            ours = [[clone(layer) for layer in packed] for _ in range(COPIES)]
            for tokens in TOKENS:
                rival = [[linear(w) for w in copy] for copy in dense]
                times = [measured(copies, shapes, tokens, device, options.rounds) for copies in (rival, ours)]
                rate = sum(layer.bytes for layer in packed) / times[1] / 1e9
                row = {"sparsity": sparsity, "tokens": tokens, "cublas_us": times[0] * 1e6, "ours_us": times[1] * 1e6,
                       "ratio": times[0] / times[1], "bytes": share, "gb_per_s": rate}  # fmt: skip
                rows.append(row)
                print(f"{sparsity:>6.0%}{tokens:>8}{row['cublas_us']:>11.1f}{row['ours_us']:>9.1f}{row['ratio']:>7.2f}"
                      f"{share:>7.3f}{rate:>7.0f}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(device), "rows": rows}, indent=1) + "\n")
    decisive = next(row["ratio"] for row in rows if (row["sparsity"], row["tokens"]) == (0.8, 1))
    print(
        f"80 %, one token: {decisive:.2f} x cuBLAS ({'keep' if decisive >= 2 else 'below 2: expand for cuBLAS alone'})"
    )
    return 0


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
    copies: Sequence[Sequence[Layer]], shapes: Sequence[tuple[int, int]], tokens: int, device: torch.device, rounds: int
) -> float:
    """Median seconds of a layer; the copies take turns."""
    inputs = [torch.randn(tokens, in_, dtype=torch.bfloat16, device=device) for _, in_ in shapes]

    def call(copy: Sequence[Layer]) -> None:
        for layer, x in zip(copy, inputs, strict=True):
            layer(x)

    calls = [captured(partial(call, copy), device) for copy in copies]
    return statistics.median([timed(calls[i % len(calls)], device) for i in range(rounds)])


def captured(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The call as a CUDA graph; as it is on the CPU."""
    call()
    if device.type != "cuda":
        return call
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def timed(call: Callable[[], None], device: torch.device) -> float:
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
