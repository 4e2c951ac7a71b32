"""Results depend neither on sharding, nor on the number of threads, nor on the instruction set."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import assert_all_same, assert_same, clones, masks_of, rng_of, tensors
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext

# How a mesh cuts a full tensor: name -> (full shape, number of parts per dimension).
MESHES = {
    "Shard(0), uneven, one rank empty": ((5, 300), (6, 1)),
    "Shard(1)": ((40, 301), (1, 3)),
    "2-D mesh": ((37, 501), (2, 3)),
    "experts": ((4, 30, 200), (4, 1, 1)),
    "experts, rows and columns": ((3, 50, 211), (3, 2, 2)),
    "short runs across blocks": ((9000, 7), (2, 2)),
}


def shards_of(full: tuple[int, ...], parts: tuple[int, ...]) -> Iterator[tuple[ops.Shard, tuple[slice, ...]]]:
    """Every rank's part, cut as torch.chunk cuts."""
    cuts = []
    for size, count in zip(full, parts, strict=True):
        step = -(-size // count)
        cuts.append([(min(i * step, size), min((i + 1) * step, size)) for i in range(count)])
    for corner in itertools.product(*cuts):
        yield ops.Shard(full, tuple(a for a, _ in corner)), tuple(slice(a, b) for a, b in corner)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_shard_gets_what_the_whole_gets(mesh: str) -> None:
    """Between two whole tensors: rounding, masks under ties, and the tie index itself."""
    shape, parts = MESHES[mesh]
    numel = torch.Size(shape).numel()
    first, last = tensors([77, 100], torch.bfloat16, "ties", seed=5)
    ipt, mean, unc = (t.view(shape) for t in tensors([numel] * 3, torch.bfloat16, "ties", seed=6))
    whole_mean, whole_unc = mean.clone(), unc.clone()
    layout, rng = ops.Layout.of([first, whole_mean, last]), rng_of(0)
    extra = torch.zeros_like(first), torch.zeros_like(last)
    tables = (layout.places, layout.chunks, torch.ones(1), rng, 0.85, 0.95)
    whole = [[first.clone(), whole_mean, last.clone()], [extra[0].clone(), whole_unc, extra[1].clone()]]
    pins.fold_(*whole, [first, ipt, last], *tables)
    keys = ref.order_key(ref.score("product", *(w[1] for w in whole)))
    key, tie = int(keys.flatten().mode().values), 77 + numel // 2
    keep = ref.keep_mask(keys, torch.arange(77, 77 + numel).view(shape), (key, tie))
    assert keep[keys == key].any()
    assert not keep[keys == key].all()
    for shard, cut in shards_of(shape, parts):
        local = [t[cut].contiguous() for t in (ipt, mean, unc)]
        shards = ops.Layout.of([first, local[0], last], [None, shard, None])
        assert shards.total == layout.total
        lists = [[first.clone(), local[1], last.clone()], [extra[0].clone(), local[2], extra[1].clone()]]
        tables = (shards.places, shards.chunks, torch.ones(1), rng, 0.85, 0.95)
        pins.fold_(*lists, [first, local[0], last], *tables)
        for ours, theirs in zip(lists, whole, strict=True):
            assert_all_same(ours, [theirs[0], theirs[1][cut], theirs[2]])
        masks, stats = [ops.new_mask(t) for t in lists[0]], torch.zeros(3, 3, dtype=torch.int64)
        pins.pack_(masks, stats, *lists, shards.places, shards.chunks, "product", torch.tensor([[key, tie]]))
        assert torch.equal(masks[1], ref.pack_bits(keep[cut]))
        index = ref.global_index(shards.places[1])
        assert torch.equal(index, torch.arange(77, 77 + numel).view(shape)[cut].flatten())
        own = index[keys[cut].flatten() == key]
        if own.numel() > 1:
            bracket, one = torch.tensor([key, key, 0, own.numel() - 1, 1]), ops.Layout.of([local[0]], [shard], base=77)
            found = pins.tie_index([local[1]], [local[2]], one.places, one.chunks, "product", bracket)
            assert int(found) == int(own[-1])


def test_a_shard_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not fit a full tensor of shape \(4, 4\)"):
        ops.Layout.of([torch.zeros(3, 4)], [ops.Shard((4, 4), (2, 0))])
    with pytest.raises(ValueError, match="at most 4 are supported"):
        ops.Layout.of([torch.zeros(1, 1, 1, 1, 1)], [ops.Shard((2, 2, 2, 2, 2), (0, 0, 0, 0, 0))])


def everything(sizes: list[int]) -> list[Tensor]:
    """Every operator once, in both kinds of states; what they wrote and returned."""
    out: list[Tensor] = []
    for dtype, state in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ):
        params, grads, shadow = (tensors(sizes, dtype, "special" if s == 2 else "normal", seed=s) for s in (1, 2, 3))
        first, second = tensors(sizes, state, seed=4), [m.abs() for m in tensors(sizes, state, seed=5)]
        buffer = tensors(sizes, dtype, seed=9)
        ipt, mean, unc = (tensors(sizes, state, seed=s) for s in (6, 7, 8))
        layout, one, rng = ops.Layout.of(params), torch.ones(1), rng_of(1)
        tables = (layout.places, layout.chunks)
        for criterion in ops.CRITERIA:
            pins.accumulate_(ipt, params, grads, *tables, torch.full((len(sizes),), 1e-3), one, rng, criterion)
        bracket, counts = torch.tensor([0x70000000, 0xC0000000, 15, 0, 0]), torch.zeros(1 + ops.BINS, dtype=torch.int64)
        pins.fold_(mean, unc, ipt, *tables, one, rng, 0.85, 0.95, bracket=bracket, counts=counts)
        bias = torch.linspace(1e-3, 2, 3 * len(sizes)).view(-1, 3)
        pins.fold_moments_(mean, unc, params, first, second, *tables, bias, one, rng, 0.85, 0.95)
        _, masks = masks_of(params)
        stats = torch.zeros(len(sizes), 3, dtype=torch.int64)
        for score in ops.SCORES:
            b = unc if score in ("product", "deviation", "fisher") else []
            factors = {"factors": torch.linspace(1, 2, len(sizes))} if score == "fisher" else {}
            out.append(pins.sample(mean, b, *tables, score, 1000, **factors))
            shares = layout.total // torch.tensor([5, 2])
            out += [pins.select(mean, b, *tables, score, n_prune, **factors) for n_prune in shares]
            pins.pack_(masks, stats, mean, b, *tables, score, out[-1].view(1, 2), **factors)
            out.append(stats.clone())
        adamw = torch.tensor([[1e-3, 0.999, 0.1, 0.999, 1e-3, -3e-3, 0.05, 1e-8]] * len(sizes))
        sgd = torch.tensor([[0.05, 0.01, 0.9, 1.0, 0.0, 1.0, -0.05, 0.0]] * len(sizes))
        scalars = {"grad_scale": torch.tensor([3.0]), "clip": torch.tensor([0.3])}
        for criterion in ops.CRITERIA:
            rest = (*tables, adamw, one, rng, criterion, True)
            pins.masked_adamw_(params, first, second, ipt, shadow, grads, masks, *rest, **scalars)
            pins.masked_sgd_(params, buffer, ipt, [], grads, masks, *tables, sgd, one, rng, criterion, **scalars)
        pins.apply_mask_(shadow, masks, *tables)
        for written in (params, shadow, first, second, buffer, ipt, mean, unc, masks):
            out += clones(written)
        out += [counts, pins.sum_of_squares(grads, *tables).float()]
    return out


SIZES = [1, 0, 63, 65, 1000, 16384 * 2 + 11, 511, 40001]


def test_the_number_of_threads_cannot_be_seen() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(SIZES)
        torch.set_num_threads(3)
        three = everything(SIZES)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, three, strict=True):
        assert_same(a, b) if a.is_floating_point() else None
        assert a.is_floating_point() or torch.equal(a, b)


def digest() -> str:
    """A hash of every result; any NaN counts as the same NaN, since its sign and payload are no result."""
    torch.set_num_threads(2)
    sha = hashlib.sha256()
    for t in everything(SIZES):
        canonical = torch.where(t.isnan(), torch.tensor(float("nan"), dtype=t.dtype), t) if t.is_floating_point() else t
        sha.update(canonical.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


CAPABILITIES = ("default", "avx2", "avx512", "sse9")


@pytest.fixture(scope="module")
def processes() -> dict[str, subprocess.Popen[str]]:
    """This file as a script, once per instruction set, all at the same time."""
    command = [sys.executable, str(Path(__file__).resolve())]

    def start(capability: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PINS_EXT_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return {capability: start(capability) for capability in CAPABILITIES}


@pytest.mark.parametrize("capability", CAPABILITIES[:3])
def test_every_instruction_set_gives_the_same_bits(
    capability: str, processes: dict[str, subprocess.Popen[str]]
) -> None:
    out, err = processes[capability].communicate()
    if "this CPU and build have" in err:
        pytest.skip(f"this CPU or build lacks {capability}")
    assert processes[capability].returncode == 0, err
    assert out.split() == [capability, digest()]


def test_an_instruction_set_that_is_not_there_is_refused_at_import(processes: dict[str, subprocess.Popen[str]]) -> None:
    _, err = processes["sse9"].communicate()
    assert processes["sse9"].returncode != 0
    assert "ImportError: PINS_EXT_CPU_CAPABILITY is 'sse9', but this CPU and build have default" in err


if __name__ == "__main__":
    print(pins.cpu_capability(), digest())
