"""Selection over several processes: against gathering every score and sorting, and as a multiple of one read.

python -m pins_ext.bench.bench_ranks                                  4 gloo ranks, 20 M weights, both ways in turn
python -m pins_ext.bench.bench_ranks --weights 2.2e9 --no-peer        8.8 GB of bfloat16 states; nothing is gathered
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pins_ext import ops
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.select import select
from pins_ext.distributed.shards import layout_of

_KIND = "product"
_ROWS = 1 << 14  # of a tensor, in columns of 4096: 64 M weights
_BLOCK = 1 << 24


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="processes (default 4)")
    parser.add_argument("--weights", type=float, default=20e6, help="weights of all ranks together (default 20e6)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the states")
    parser.add_argument("--sparsity", type=float, default=0.8, help="share that is pruned (default 0.8)")
    parser.add_argument("--repeats", type=int, default=5, help="times each is taken (default 5)")
    parser.add_argument("--no-peer", action="store_true", help="leave out gathering every score and torch.topk")
    asked = parser.parse_args(argv)
    if asked.ranks < 1 or asked.weights < 1 or not 0 < asked.sparsity < 1 or asked.repeats < 1:
        parser.error("--ranks, --weights and --repeats are positive, --sparsity between 0 and 1")
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (asked, str(Path(folder) / "store")), nprocs=asked.ranks)
    return 0


def _rank(rank: int, asked: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, asked.ranks), rank=rank, world_size=asked.ranks)
    begin = time.perf_counter()

    def say(text: str) -> None:
        if rank == 0:
            print(f"{time.perf_counter() - begin:7.1f} s  {text}", flush=True)

    dtype = getattr(torch, asked.dtype)
    first, second = (_states(int(asked.weights), asked.ranks, dtype, seed) for seed in (0, 1))
    ranks, layout = Ranks(first), layout_of({str(i): t for i, t in enumerate(first)})
    a, b = ([t.to_local() for t in states] for states in (first, second))
    n, size = sum(t.numel() for t in first), 2 * dtype.itemsize
    n_prune = round(asked.sparsity * n)
    say(f"{n:,} weights in {len(a)} tensors on {asked.ranks} ranks, {n * size / 1e9:.1f} GB of states")

    wanted = torch.tensor(n_prune)
    cutoff = select(ranks, a, b, layout, _KIND, wanted, n)
    say("the first threshold is known")
    near = ops.bracket_around(cutoff)
    ways: dict[str, Callable[[], object]] = {
        "one read of the states": lambda: [x.view(torch.float32).sum() for x in (*a, *b)],
        "select, no bracket": lambda: select(ranks, a, b, layout, _KIND, wanted, n),
        "select near the last threshold": lambda: select(ranks, a, b, layout, _KIND, wanted, n, bracket=near),
    }
    if not asked.no_peer:
        ways["gather every score, torch.topk"] = lambda: _gathered(ranks, a, b, n - n_prune)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(asked.repeats):
        for name, way in ways.items():
            dist.barrier()
            start = time.perf_counter()
            way()
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
            say(f"{turn + 1} of {asked.repeats}: {name} {seconds[name][-1]:.3f} s")
    read = statistics.median(seconds["one read of the states"])
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        spread = f"{min(taken):.3f} to {max(taken):.3f}"
        say(f"{name:32} median {middle:.3f} s ({spread}), {middle / read:.2f} x one read")
    again = select(ranks, a, b, layout, _KIND, wanted, n, bracket=near)
    say(f"exact: {_pruned(ranks, a, b, layout, again):,} of {n_prune:,} weights lie before the cutoff")
    assert again.tolist() == cutoff.tolist()
    assert _pruned(ranks, a, b, layout, again) == n_prune
    dist.destroy_process_group()


def _states(weights: int, size: int, dtype: torch.dtype, seed: int) -> list[DTensor]:
    """Tensors of many rows, cut by rows; together as many weights as asked for, to a row."""
    mesh, rows, found = init_device_mesh("cpu", (size,)), max(1, weights // 4096), []
    for begin in range(0, rows, _ROWS):
        count = min(_ROWS, rows - begin)
        mine = -(-count // size)
        first = min(dist.get_rank() * mine, count)
        local = _filled(torch.Size((min(mine, count - first), 4096)), dtype, len(found) + 100 * seed)
        shape = torch.Size((count, 4096))
        found.append(DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=(4096, 1)))
    return found


def _filled(shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    """Positive numbers over some octaves, as averages of importance are."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    state = torch.empty(shape, dtype=dtype)
    flat = state.view(-1)
    base = torch.randn(min(_BLOCK, max(1, flat.numel())), generator=generator).mul_(2).exp_().mul_(1e-9)
    for begin in range(0, flat.numel(), len(base)):
        part = flat[begin : begin + len(base)]
        part.copy_(base[: len(part)] * (1 + torch.rand(1, generator=generator)))
    return state


def _gathered(ranks: Ranks, a: list[Tensor], b: list[Tensor], keep: int) -> Tensor:
    """Every score on every rank, and the smallest of the largest."""
    own = torch.cat([(x.float() * y.float()).flatten() for x, y in zip(a, b, strict=True)])
    most = torch.tensor([len(own)])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    padded = torch.nn.functional.pad(own, (0, int(most) - len(own)), value=-1)
    return ranks.gather(padded).flatten().topk(keep, sorted=False).values.min()


def _pruned(ranks: Ranks, a: list[Tensor], b: list[Tensor], layout: ops.Layout, cutoff: Tensor) -> int:
    """How many weights of all ranks a mask of this cutoff prunes."""
    bits, stats = [ops.new_mask(x) for x in a], torch.zeros(len(a), 3, dtype=torch.int64)
    torch.ops.pins_ext.pack_(bits, stats, a, b, layout.places, layout.chunks, _KIND, cutoff.reshape(1, 2))
    kept, sizes = stats[:, 0].sum(), torch.tensor(sum(x.numel() for x in a))
    return int(ranks.sum(sizes - kept))


if __name__ == "__main__":
    raise SystemExit(main())
