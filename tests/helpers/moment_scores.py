"""The scores that are taken from an optimizer's moments, fisher and moments, against reference.py on any device."""

from __future__ import annotations

import numpy as np
import torch
from cases import assert_all_same, clones, index_of, masks_of, random_of, rng_of, tensors
from torch import Tensor
from triton_lists import SHARD_SIZES, SHARDS, counted, cpu, layout_of, on, tables

from pins_ext import ops
from pins_ext import reference as ref

pins = torch.ops.pins_ext


def fisher_keys(a: list[Tensor], b: list[Tensor], factors: Tensor) -> list[Tensor]:
    """Order keys of each tensor, int64."""
    return [ref.order_key(ref.score("fisher", x, y, f)).flatten() for x, y, f in zip(a, b, factors, strict=True)]


def check_fisher(device: str, weight: torch.dtype, moment: torch.dtype, sizes: list[int], values: str) -> None:
    """Every operator that reads scores, on weights and second moments with a factor for each tensor."""
    a, b = tensors(sizes, weight, values, seed=1), [x.abs() for x in tensors(sizes, moment, values, seed=2)]
    factors = torch.linspace(1.0, 20.0, len(sizes))
    layout = layout_of(a)
    keys = torch.cat(per_tensor := fisher_keys(a, b, factors))
    index = torch.cat(index_of(layout))
    a_, b_ = on(device, a, b)
    call = (a_, b_, *tables(layout, device), "fisher")
    kwargs = {"factors": factors.to(device)}
    every = pins.sample(*call, keys.numel(), **kwargs).cpu()
    assert torch.equal(every, keys)
    lo, hi = (int(keys.sort().values[keys.numel() * k // 4]) for k in (1, 3))
    bracket = [lo, hi, max(0, (hi - lo).bit_length() - 16), 0, 0]
    counts = torch.full((1 + ops.BINS,), -1, device=device)
    pins.count_(counts, *call, torch.tensor(bracket, device=device), **kwargs)
    assert torch.equal(counts.cpu(), counted(keys, bracket))
    found, candidates = (
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.full((2, keys.numel()), -1, device=device),
    )
    pins.collect_(found, candidates, *call, torch.tensor([lo, lo, 0, 0, 0], device=device), **kwargs)
    assert sorted(candidates[1, : int(found)].tolist()) == index[keys == lo].tolist()
    tie = pins.tie_index(*call, torch.tensor([lo, lo, 0, int(found) - 1, 1], device=device), **kwargs)
    assert int(tie) == (int(index[keys == lo][-1]) if int(found) > 1 else 0)
    for n_prune in (keys.numel() // 3, keys.numel() - 1):
        threshold = pins.select(*call, torch.tensor(n_prune, device=device), **kwargs)
        _, masks = masks_of(a)
        (masks_,) = on(device, masks)
        stats = torch.zeros(len(a), 3, dtype=torch.int64, device=device)
        pins.pack_(masks_, stats, *call, threshold.reshape(1, 2), **kwargs)
        kept = torch.cat([ref.unpack_bits(m.cpu(), k.shape) for m, k in zip(masks_, per_tensor, strict=True)])
        pruned = np.argsort(keys.numpy(), kind="stable")[:n_prune]
        assert torch.equal(torch.arange(keys.numel())[~kept], torch.from_numpy(np.sort(pruned)))
        assert int(stats[:, 0].sum()) == keys.numel() - n_prune


def check_fold_moments(
    device: str, state: torch.dtype, weight: torch.dtype, moment: torch.dtype, values: str = "normal",
    sizes: list[int] | None = None, with_unc: bool = True, accepted: float = 1.0, counting: bool = True,
) -> None:  # fmt: skip
    """fold_moments_ on these sizes, or on shards."""
    shards = None if sizes is not None else SHARDS

    def draw(dtype: torch.dtype, seed: int) -> list[Tensor]:
        if sizes is not None:
            return tensors(sizes, dtype, values, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(size, generator=generator).to(dtype) for size in SHARD_SIZES]

    mean, unc, p = draw(state, 1), draw(state, 2) if with_unc else [], draw(weight, 3)
    exp_avg, exp_avg_sq = draw(moment, 4), [x.abs() for x in draw(moment, 5)]
    factors = torch.linspace(1e-3, 9.0, 3 * len(mean)).view(-1, 3)
    layout, rng = layout_of(mean, shards), rng_of(1)
    expected_mean, expected_unc = clones(mean), clones(unc)
    for i, random in enumerate(random_of(layout, rng) if accepted else []):
        flat = [x[i].flatten() for x in (p, exp_avg, exp_avg_sq, mean)]
        c = ref.moments(*flat[:3], factors[i])
        new_mean, new_unc = ref.fold(flat[3], unc[i].flatten() if unc else None, c, 0.85, 0.99)
        expected_mean[i] = ref.store(new_mean, state, random).view(mean[i].shape)
        if new_unc is not None:
            expected_unc[i] = ref.store(new_unc, state, random >> 16).view(mean[i].shape)
    mean_, unc_, *operands = on(device, mean, unc, p, exp_avg, exp_avg_sq)
    bracket, counts = [0x7F000000, 0xC0800000, 15, 0, 0], torch.full((1 + ops.BINS,), 7, device=device)
    kwargs = {"bracket": torch.tensor(bracket, device=device), "counts": counts} if counting else {}
    rest = [x.to(device) for x in (factors, torch.tensor([accepted]), rng)]
    pins.fold_moments_(mean_, unc_, *operands, *tables(layout, device), *rest, 0.85, 0.99, **kwargs)
    assert_all_same(cpu(mean_), expected_mean)
    assert_all_same(cpu(unc_), expected_unc)
    if counting:
        scores = [
            ref.score("product" if unc else "identity", x, unc and expected_unc[i]) for i, x in enumerate(expected_mean)
        ]
        keys = torch.cat([torch.zeros(0, dtype=torch.int64), *(ref.order_key(s).flatten() for s in scores)])
        assert torch.equal(counts.cpu(), counted(keys, bracket))
