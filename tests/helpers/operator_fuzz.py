"""Calls every operator with random arguments, right and spoilt: `python operator_fuzz.py LIBRARY SEED CALLS`.

LIBRARY is a build of pins_ext._C with sanitizers: whatever the arguments, a call returns or raises RuntimeError, and no
byte beside the tensors is touched. Prints every seed; the last line counts the calls.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATES = (torch.float32, torch.bfloat16)
CRITERIA = ("pins", "pins-signed", "pins-update", "platon", "movement", "precomputed")
SCORES = ("product", "identity", "deviation", "magnitude", "fisher")
UGLY = (-(2**63), 2**63 - 1, 2**62, 2**32, 2**32 - 1, 2**31, 16384, 64, 5, 2, 1, 0, -1)

Call = dict[str, Any]


class Problem:
    """Tensors of random sizes in memory of exactly their size, and their tables."""

    def __init__(self, dice: random.Random) -> None:
        from pins_ext import ops

        self.dice, self.torch = dice, torch.Generator().manual_seed(dice.getrandbits(40))
        self.dtype, self.state = dice.choice(FLOATS), dice.choice(STATES)
        sizes = [dice.choice((0, 1, 2, 63, 64, 65, 255, 257, 700, 16384, 16500)) for _ in range(dice.randrange(5))]
        self.shapes: list[tuple[int, ...]] = [(n,) for n in sizes]
        shards: list[Any] = [None] * len(sizes)
        if sizes and dice.random() < 0.3:
            full = tuple(dice.randrange(1, 12) for _ in range(dice.randrange(1, 5)))
            local = tuple(dice.randint(0, n) for n in full)
            start = tuple(dice.randint(0, n - k) for n, k in zip(full, local, strict=True))
            self.shapes[0], shards[0] = local, ops.Shard(full, start)
        base = dice.choice((0, 5, 2**32 - 700, 2**41))
        self.layout = ops.Layout.of([torch.empty(s) for s in self.shapes], shards, base)
        self.numel = [torch.Size(s).numel() for s in self.shapes]

    @property
    def tables(self) -> dict[str, Tensor]:
        return {"places": self.layout.places.clone(), "chunks": self.layout.chunks.clone()}

    def floats(self, dtype: torch.dtype, positive: bool = False) -> list[Tensor]:
        """One tensor for each place, some of them misaligned, ending where their memory ends."""
        skip = self.dice.choice((0, 0, 1, 3))
        tensors = []
        for n in self.numel:
            x = torch.randn(n, generator=self.torch) * 10 ** self.dice.uniform(-3, 1)
            if self.dice.random() < 0.2:
                x[torch.rand(n, generator=self.torch) < 0.2] = self.dice.choice(
                    (0.0, -0.0, 1e-40, float("inf"), float("nan"))
                )
            tensors.append(torch.empty(n + skip, dtype=dtype)[skip:].copy_(x.abs() if positive else x))
        return tensors

    def masks(self) -> list[Tensor]:
        bits = (torch.randint(0, 256, (-(-n // 64) * 8,), generator=self.torch) for n in self.numel)
        return [b.to(torch.uint8) for b in bits]

    def rng(self) -> Tensor:
        return torch.tensor([self.dice.getrandbits(32), self.dice.getrandbits(32)])

    def bracket(self) -> Tensor:
        lo = self.dice.choice((0, 0x80000000, self.dice.getrandbits(32)))
        hi = min(lo + self.dice.choice((0, 1, 65535, 2**26, 2**32)), 2**32 - 1)
        shift = next(s for s in range(32) if (hi - lo) >> s < 65536)
        return torch.tensor([lo, hi, shift, self.dice.randrange(-1, 50), self.dice.random() < 0.2])

    def scalars(self, *names: str) -> dict[str, Tensor]:
        values = (0.0, 1.0, 0.5, 1024.0, float("nan"))
        return {name: torch.tensor([self.dice.choice(values)]) for name in names if self.dice.random() < 0.4}

    def some(self, tensors: list[Tensor]) -> list[Tensor]:
        """An optional list."""
        return tensors if self.dice.random() < 0.7 else []


def _accumulate(p: Problem) -> Call:
    lists = {"ipt": p.floats(p.state), "params": p.floats(p.dtype), "grads": p.floats(p.dtype)}
    lr, accepted = torch.rand(len(p.numel)), torch.tensor([float(p.dice.randrange(4))])
    rest = {"lr": lr, "accepted": accepted, "rng": p.rng(), "criterion": p.dice.choice(CRITERIA)}
    return lists | p.tables | rest | p.scalars("grad_scale", "clip", "found_inf")


def _fold(p: Problem) -> Call:
    lists = {"exp_avg_ipt": p.floats(p.state), "exp_avg_unc": p.some(p.floats(p.state)), "ipt": p.floats(p.state)}
    rest = {"accepted": torch.tensor([float(p.dice.randrange(2))]), "rng": p.rng(), "beta1": 0.85, "beta2": 0.95}
    if p.dice.random() < 0.7:
        rest |= {"bracket": p.bracket(), "counts": _counts()}
    return lists | p.tables | rest


def _fold_moments(p: Problem) -> Call:
    call = _fold(p)
    del call["ipt"]
    moment = p.dice.choice(FLOATS)
    moments = {"exp_avg": p.floats(moment), "exp_avg_sq": p.floats(moment, positive=True)}
    return call | {"params": p.floats(p.dtype), **moments, "factors": torch.rand(len(p.numel), 3)}


def _counts() -> Tensor:
    return torch.full((65537,), -1)


def _scored(p: Problem) -> Call:
    score = p.dice.choice(SCORES)
    if score == "fisher":
        lists = {"a": p.floats(p.dtype), "b": p.floats(p.dice.choice(FLOATS), positive=True)}
        return lists | p.tables | {"score": score, "factors": torch.rand(len(p.numel))}
    two = score in ("product", "deviation")
    dtype = p.state if two else p.dtype
    return {"a": p.floats(dtype), "b": p.floats(dtype) if two else [], **p.tables, "score": score}


def _sample(p: Problem) -> Call:
    return _scored(p) | {"size": p.dice.choice((1, 2, 63, 64, 1000))}


def _count(p: Problem) -> Call:
    return _scored(p) | {"counts": _counts(), "bracket": p.bracket()}


def _count_regions(p: Problem) -> Call:
    size, columns = p.dice.randrange(1, 5), p.dice.choice((3, 17, 4097))
    brackets = []
    for _ in range(size):
        stage = p.dice.randrange(3)
        lo = p.dice.choice((0, p.dice.getrandbits(32)))
        hi = (
            min(lo + p.dice.choice((0, 1, 700, 2**26, 2**32)), 2**32 - 1) if stage == 0 else lo + p.dice.getrandbits(42)
        )
        shift = next(s for s in range(64) if (hi - lo) >> s < columns - 1)
        brackets.append([lo, hi, shift, p.dice.choice((0x80000000, p.dice.getrandbits(32))), stage])
    regions = torch.tensor([p.dice.randrange(size) for _ in p.numel], dtype=torch.int64)
    counts = torch.full((size, columns), -1)
    return _scored(p) | {"counts": counts, "regions": regions, "brackets": torch.tensor(brackets)}


def _collect(p: Problem) -> Call:
    candidates = torch.full((2, p.dice.choice((0, 1, 10, 2000))), -1)
    return _scored(p) | {"found": torch.zeros(1, dtype=torch.int64), "candidates": candidates, "bracket": p.bracket()}


def _settle_around(p: Problem) -> Call:
    return _scored(p) | {"bracket": p.bracket(), "position": torch.tensor(p.dice.randrange(max(1, sum(p.numel))))}


def _tie_index(p: Problem) -> Call:
    return _scored(p) | {"bracket": p.bracket()}


def _select(p: Problem) -> Call:
    return _scored(p) | {
        "n_prune": torch.tensor(p.dice.randrange(-1, 1 + sum(p.numel))),
        "exact": p.dice.random() < 0.7,
    }


def _pack(p: Problem) -> Call:
    rows = p.dice.choice((1, len(p.numel)))
    pairs = [[p.dice.getrandbits(32), p.dice.getrandbits(42)] for _ in range(rows)]
    keys = torch.tensor(pairs, dtype=torch.int64).view(rows, 2)
    return _scored(p) | {"masks": p.masks(), "stats": torch.ones(len(p.numel), 3, dtype=torch.int64), "threshold": keys}


def _eligible(p: Problem) -> Call:
    from pins_ext import ops

    groups = [[p.dice.randrange(2, 33), p.dice.choice((1, 1, 2, 7, 64))] for _ in p.numel]
    # Whole groups, whose weights lie `stride` apart.
    p.numel = [-(-n // (of * stride)) * of * stride for n, (of, stride) in zip(p.numel, groups, strict=True)]
    p.layout = ops.Layout.of([torch.empty(n) for n in p.numel])
    rows = [[p.dice.randrange(1, of), of, stride] for of, stride in groups]
    outputs = {"scores": p.floats(torch.float32), "nans": torch.ones(len(p.numel), dtype=torch.int64)}
    return _scored(p) | outputs | {"groups": torch.tensor(rows, dtype=torch.int64).view(-1, 3)}


def _pack_around(p: Problem) -> Call:
    # Every weight is inside: any rank is one of theirs.
    bracket = torch.tensor([0, 2**32 - 1, 16, p.dice.randrange(max(1, sum(p.numel))), 0])
    outputs = {"stats": torch.ones(len(p.numel), 3, dtype=torch.int64), "threshold": torch.full((1, 2), -1)}
    return _scored(p) | {"masks": p.masks(), **outputs, "bracket": bracket}


def _update(p: Problem) -> Call:
    lists = {
        "params": p.floats(p.dtype),
        "ipt": p.some(p.floats(p.state)),
        "shadow": p.some(p.floats(p.dtype)),
        "grads": p.floats(p.dtype),
        "masks": p.some(p.masks()),
    }
    rest = {
        "hyper": torch.rand(len(p.numel), 8),
        "accepted": torch.tensor([float(p.dice.randrange(3))]),
        "rng": p.rng(),
        "criterion": p.dice.choice(CRITERIA),
        "clear_state": p.dice.random() < 0.5,
    }
    return lists | p.tables | rest | p.scalars("grad_scale", "clip", "found_inf")


def _adamw(p: Problem) -> Call:
    moment = p.dice.choice(STATES)
    return _update(p) | {"exp_avg": p.floats(moment), "exp_avg_sq": p.floats(moment, positive=True)}


def _sgd(p: Problem) -> Call:
    call = _update(p) | {"momentum_buffer": p.some(p.floats(p.dtype))}
    if not call["momentum_buffer"]:
        call["hyper"][:, 2] = 0
    return call


def _boundary(call: Call, p: Problem) -> Call:
    """Of an update: what chooses, what folds, or both."""
    for name in ("grad_scale", "found_inf"):
        call.pop(name, None)
    averages = {"exp_avg_ipt": p.floats(p.state), "exp_avg_unc": p.some(p.floats(p.state, positive=True))}
    chooses, folds = p.dice.choice(((True, False), (False, True), (True, True)))
    call |= averages
    if chooses:
        outputs = {"stats": torch.ones(len(p.numel), 3, dtype=torch.int64), "threshold": torch.full((1, 2), -1)}
        rank = p.dice.randrange(max(1, sum(p.numel)))
        call |= {"masks": p.masks(), "around": torch.tensor([0, 2**32 - 1, 16, rank, 0]), **outputs}
    if folds:
        call |= {"ipt": p.floats(p.state), "fold_rng": p.rng(), "beta1": p.dice.random(), "beta2": p.dice.random()}
        call |= {"bracket": p.bracket(), "counts": _counts()} if p.dice.random() < 0.5 else {}
    return call


def _boundary_adamw(p: Problem) -> Call:
    return _boundary(_adamw(p), p)


def _boundary_sgd(p: Problem) -> Call:
    return _boundary(_sgd(p), p)


def _apply_mask(p: Problem) -> Call:
    return {"params": p.floats(p.dtype), "masks": p.masks(), **p.tables}


def _sum_of_squares(p: Problem) -> Call:
    return {"tensors": p.floats(p.dtype), **p.tables}


def _stream(p: Problem) -> Call:
    n = p.dice.choice((0, 1, 63, 255, 257, 16384, 40001))
    both = [torch.randn(n, generator=p.torch).to(p.dice.choice(FLOATS)) for _ in range(p.dice.randrange(1, 5))]
    cut = p.dice.randrange(1 + len(both))
    return {"written": both[:cut], "read": both[cut:]}


def _pruned_weight(p: Problem) -> Tensor:
    shape = (p.dice.choice((1, 15, 16, 33)), p.dice.choice((1, 63, 64, 300)))
    weight = torch.randn(shape, generator=p.torch)
    return weight * (torch.rand(shape, generator=p.torch) < p.dice.choice((0.0, 0.1, 0.5, 1.0)))


def _sparse_pack(p: Problem) -> Call:
    dtype = p.dice.choice((torch.float32, torch.bfloat16, torch.int8))
    return {"weight": (_pruned_weight(p) * 10).to(dtype)}


def _sparse_linear(p: Problem) -> Call:
    weight = _pruned_weight(p)
    names = ("values", "columns", "rows", "counts", "starts")
    packed = dict(zip(names, torch.ops.pins_ext.sparse_pack(weight), strict=True))
    x = torch.randn(p.dice.choice((0, 1, 7, 40)), weight.shape[1], generator=p.torch).to(p.dtype)
    bias = torch.ones(weight.shape[0]) if p.dice.random() < 0.5 else None
    return {"x": x, **packed, "bias": bias, "out_features": weight.shape[0]}


def _sparse_linear_int8(p: Problem) -> Call:
    codes = (_pruned_weight(p) * 20).to(torch.int8)
    names = ("values", "columns", "rows", "counts", "starts")
    packed = dict(zip(names, torch.ops.pins_ext.sparse_pack(codes), strict=True))
    x = torch.randn(p.dice.choice((0, 1, 7, 40)), codes.shape[1], generator=p.torch)
    bias = torch.ones(codes.shape[0]) if p.dice.random() < 0.5 else None
    scales, sums = torch.ones(codes.shape[0]), codes.sum(1, dtype=torch.int32)
    return {"x": x, **packed, "scales": scales, "sums": sums, "bias": bias, "vnni": p.dice.random() < 0.5}


def _grouped_pack(p: Problem) -> Call:
    return {"weight": _pruned_weight(p).to(p.dtype)}


GENERATORS: dict[str, Callable[[Problem], Call]] = {
    "accumulate_": _accumulate,
    "fold_": _fold,
    "fold_moments_": _fold_moments,
    "sample": _sample,
    "count_": _count,
    "count_regions_": _count_regions,
    "collect_": _collect,
    "settle_around": _settle_around,
    "tie_index": _tie_index,
    "select": _select,
    "eligible_": _eligible,
    "pack_": _pack,
    "pack_around_": _pack_around,
    "masked_adamw_": _adamw,
    "masked_sgd_": _sgd,
    "boundary_adamw_": _boundary_adamw,
    "boundary_sgd_": _boundary_sgd,
    "apply_mask_": _apply_mask,
    "sum_of_squares": _sum_of_squares,
    "stream_": _stream,
    "sparse_pack": _sparse_pack,
    "sparse_linear": _sparse_linear,
    "sparse_linear_int8": _sparse_linear_int8,
    "grouped_pack": _grouped_pack,
}


# ---- what can be wrong with an argument ---------------------------------------------------------


def spoil(call: Call, dice: random.Random) -> None:
    """Change one argument, perhaps to something that is still right."""
    name = dice.choice(list(call))
    value = call[name]
    if isinstance(value, Tensor):
        call[name] = dice.choice((_cell, _shape, _dtype, _strided))(value, dice)
    elif isinstance(value, list) and value:
        dice.choice((_one, _fewer, _twice, _borrowed))(value, dice, call)
    elif isinstance(value, list):
        call[name] = [torch.ones(3)] * dice.randrange(3)
    elif isinstance(value, str):
        call[name] = dice.choice((*CRITERIA, *SCORES, "", "no such"))
    elif isinstance(value, bool):
        call[name] = not value
    elif isinstance(value, int):
        call[name] = dice.choice(UGLY[6:])
    elif value is None:
        call[name] = torch.ones(dice.randrange(3))
    else:
        call[name] = dice.choice((0.0, 1.0, -1.0, float("nan"), 1e308))


def _cell(x: Tensor, dice: random.Random) -> Tensor:
    if x.numel():
        flat = x.clone().view(-1)
        if x.is_floating_point():
            flat[dice.randrange(x.numel())] = dice.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
        else:
            limits = torch.iinfo(x.dtype) if x.dtype != torch.bool else torch.iinfo(torch.uint8)
            flat[dice.randrange(x.numel())] = min(max(dice.choice(UGLY), limits.min), limits.max)
        return flat.view(x.shape)
    return x


def _shape(x: Tensor, dice: random.Random) -> Tensor:
    return dice.choice(
        (lambda: x[:-1].clone() if x.dim() else x, lambda: x[None].clone(), lambda: x.flatten()[:0].clone())
    )()


def _dtype(x: Tensor, dice: random.Random) -> Tensor:
    return x.to(dice.choice((torch.float64, torch.int32, torch.float32, torch.int64)))


def _strided(x: Tensor, dice: random.Random) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _one(xs: list[Tensor], dice: random.Random, call: Call) -> None:
    i = dice.randrange(len(xs))
    xs[i] = dice.choice((_shape, _dtype, _strided))(xs[i], dice)


def _fewer(xs: list[Tensor], dice: random.Random, call: Call) -> None:
    xs.pop(dice.randrange(len(xs)))


def _twice(xs: list[Tensor], dice: random.Random, call: Call) -> None:
    xs[dice.randrange(len(xs))] = dice.choice(xs)


def _borrowed(xs: list[Tensor], dice: random.Random, call: Call) -> None:
    """A tensor of the list in the memory of another argument."""
    i, others = dice.randrange(len(xs)), [x for x in call.values() if isinstance(x, Tensor) and x.nbytes]
    if others:
        memory = dice.choice(others).view(-1).view(torch.uint8)
        size = memory.numel() // xs[i].element_size() * xs[i].element_size()
        xs[i] = memory[:size].view(xs[i].dtype)[: xs[i].numel()]


# ---- the run ------------------------------------------------------------------------------------


def _load(library: str) -> None:
    """Make this build of `pins_ext._C` the one that the package finds."""
    spec = importlib.util.spec_from_file_location("pins_ext._C", library)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["pins_ext._C"] = importlib.util.module_from_spec(spec)


def _keep(call: Call) -> list[Tensor]:
    """Let one tensor stand for each list, see ops.KeptLists; returns those tensors."""
    lists = {name: value for name, value in call.items() if isinstance(value, list) and value}
    kept = {name: torch.ops.pins_ext.keep_list(value) for name, value in lists.items()}
    call.update((name, [stands]) for name, stands in kept.items())
    return list(kept.values())


def main(arguments: Sequence[str]) -> None:
    library, seed, calls = arguments[0], int(arguments[1]), int(arguments[2])
    _load(library)
    from pins_ext import _C

    assert _C.__file__ == library
    torch.set_num_threads(2)
    outcomes: Counter[str] = Counter()
    for n in range(calls):
        dice = random.Random(seed * 1_000_003 + n)
        op = dice.choice(list(GENERATORS))
        problem = Problem(dice)
        call = GENERATORS[op](problem)
        spoilt = dice.random() < 0.5
        if spoilt:
            spoil(call, dice)
        if n % 100 == 0:
            print(f"seed {seed} call {n}: {op}", file=sys.stderr, flush=True)
        kept = _keep(call) if dice.random() < 0.2 else []
        try:
            getattr(torch.ops.pins_ext, op)(**call)
        except RuntimeError as error:
            if not spoilt:
                raise AssertionError(f"seed {seed} call {n}: {op} refuses right arguments") from error
            outcomes["refused"] += 1
        else:
            outcomes["spoilt, accepted" if spoilt else "done"] += 1
        for stands in kept:
            torch.ops.pins_ext.forget_list(stands)
    print(f"{torch.ops.pins_ext.cpu_capability()} seed {seed}: {calls} calls, {dict(outcomes)}")


if __name__ == "__main__":
    main(sys.argv[1:])
