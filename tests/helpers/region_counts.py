"""What count_regions_ is to leave in `counts`, from all keys and indices; and brackets to try it with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pins_ext import ops
from pins_ext import reference as ref


def keys_and_indices(score: str, a: list[Tensor], b: list[Tensor], layout: ops.Layout) -> tuple[list[Tensor], ...]:
    """Order key and global index of every weight, int64, by tensor."""
    keys = [ref.order_key(ref.score(score, x, b[i] if b else None)).flatten() for i, x in enumerate(a)]
    return keys, [ref.global_index(place).flatten() for place in layout.places]


def counted(keys: list[Tensor], indices: list[Tensor], regions: Tensor, brackets: Tensor, bins: int) -> Tensor:
    """Counts int64 [r, 1 + bins]."""
    counts = torch.zeros(len(brackets), 1 + bins, dtype=torch.int64)
    for own_keys, own_indices, region in zip(keys, indices, regions.tolist(), strict=True):
        lo, hi, shift, key, stage = brackets[region].tolist()
        if stage > 1:
            continue
        values = own_keys if stage == 0 else own_indices[own_keys == key]
        inside = values[(values >= lo) & (values <= hi)]
        counts[region, 0] += (values < lo).sum()
        counts[region, 1:] += torch.bincount((inside - lo) >> shift, minlength=bins)
    return counts


def mixed_brackets(keys: list[Tensor], indices: list[Tensor], regions: Tensor, bins: int) -> Iterator[Tensor]:
    """Tables, int64 [r, 5], whose rows are in different stages: all keys, few, one; all indices of ties, some, one."""
    bits, size = bins.bit_length() - 1, int(regions.max()) + 1
    for turn in range(6):
        rows = []
        for region in range(size):
            own = [i for i, r in enumerate(regions.tolist()) if r == region and keys[i].numel()]
            if not own:
                rows.append([0, 0, 0, 0, 2])
                continue
            ordered = torch.cat([keys[i] for i in own]).sort().values
            places = torch.cat([indices[i] for i in own])
            first, last = int(places.min()), int(places.max())
            at = int(ordered[len(ordered) // 2])
            width = max(1, (last - first) // 3)
            lo, hi, stage = [
                (0, ref.MASK32, 0),
                (max(at - 5000, 0), min(at + 70_000, ref.MASK32), 0),
                (at, at, 0),
                (first, last, 1),
                (first + width, first + 2 * width, 1),
                (last, last, 1),
            ][(turn + region) % 6]
            tie = int(ordered.mode().values) if turn % 2 else at
            rows.append([lo, hi, max(0, (hi - lo).bit_length() - bits), tie, stage])
        yield torch.tensor(rows)
