"""The bracket of a selection: the keys between which the cutoff lies, and how counts and candidates narrow it.

A bracket is int64 [5]: lowest and highest key, width of a bin as a shift, rank of the weight looked for among those
from the lowest key on, and 1 once it is a single key. Here are the operators of CPU tensors, where the host may look at
numbers; those of a GPU are triton_kernels/bracket.py, a launch each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pins_ext.triton_kernels.table import check_shape

BINS = 65536
"""Bins of a counting pass: two passes resolve any bracket of 32-bit keys to one key."""

MAX_KEY = 0xFFFFFFFF
MAX_INDEX = torch.iinfo(torch.int64).max


def _shift(width: int) -> int:
    """Bins so wide that `width` + 1 keys fit BINS of them."""
    return max(0, width.bit_length() - 16)


def _bracket(lo: int, hi: int, rank: int, resolved: bool) -> Tensor:
    return torch.tensor([lo, hi, _shift(hi - lo), rank, int(resolved)], device="cpu")


def bracket_of(keys: Tensor, position: Tensor, total: int) -> Tensor:
    """`pins_ext::bracket_of`: the keys within four standard deviations of a sample's rank.

    A target outside, six times in 100,000 selections, costs passes more and changes nothing. Bins are so wide that each
    has some 600 weights: few for the next pass, while the counts stay in a cache. On an AMD EPYC counting 42 M weights
    takes a tenth less time into 2,048 bins than into 65,536.

    Args:
        keys: int64 [m], a sample of the order keys.
        position: int64 [], rank of the weight looked for.
        total: how many weights compete.
    """
    check_shape("keys", keys, torch.int64, (keys.numel(),), keys)
    check_shape("position", position, torch.int64, (), keys)
    m, share = keys.numel(), int(position) / total
    spread = 4 * math.sqrt(max(1.0, share * (1 - share) * m)) + 2
    first, last = (min(max(i, 0), m - 1) for i in (math.floor(share * m - spread), math.ceil(share * m + spread)))
    # A sort of so many takes all threads, whose barriers cost up to .5 s where another process wants a core.
    lo, hi = (int(keys.kthvalue(rank + 1).values) for rank in (first, last))
    bits = min(16, max(10, (total >> 15).bit_length()))
    return torch.tensor([lo, hi, max(0, (hi - lo).bit_length() - bits), 0, 0], device="cpu")


def bracket_around(threshold: Tensor, octaves: float = 0.125) -> Tensor:
    """Bracket the keys within this many octaves of an earlier threshold, for a score that moves slowly.

    Args:
        threshold: int64 [..., 2], one (order key, tie index).
        octaves: how far it may have moved, as a power of two.

    Returns:
        int64 [5], on its device.
    """
    reach = int(octaves * (1 << 23))
    key = threshold.reshape(2)[:1]
    # As wide as it can be; at the ends of the keys it is narrower, and some bins stay empty.
    shift, rest = key.new_full((1,), _shift(2 * reach)), key.new_zeros(2)
    return torch.cat([(key - reach).clamp_(min=0), (key + reach).clamp_(max=MAX_KEY), shift, rest])


def narrow(bracket: Tensor, counts: Tensor, position: Tensor) -> Tensor:
    """`pins_ext::narrow`: the bin that holds a position, or, on a miss, all keys on the missed side.

    Args:
        bracket: a bracket; a single key is left as it is.
        counts: int64 [1 + BINS], keys below the bracket and in its bins.
        position: int64 [], rank of the weight looked for.
    """
    check_shape("bracket", bracket, torch.int64, (5,), bracket)
    check_shape("counts", counts, torch.int64, (1 + BINS,), bracket)
    check_shape("position", position, torch.int64, (), bracket)
    lo, hi, shift, _, resolved = bracket.tolist()
    if resolved:
        return bracket.clone()
    ends, rank = counts.cumsum(0), int(position)
    chosen = int(torch.searchsorted(ends, rank, right=True))
    if chosen == 0:
        return _bracket(0, lo - 1, rank, False)
    rank -= int(ends[chosen - 1])
    if chosen > BINS:
        return _bracket(hi + 1, MAX_KEY, rank, False)
    lo += (chosen - 1) << shift
    hi = min(lo + (1 << shift) - 1, hi)
    return _bracket(lo, hi, rank, lo == hi)


def settle(bracket: Tensor, candidates: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """`pins_ext::settle`: the single key of the weight looked for, and its tie index, from the weights of a bracket.

    Args:
        bracket: a bracket.
        candidates: int64 [2, m], keys and global indices of the weights inside, anywhere among MAX_INDEX.
        found: int64 [1], how many they are; where more than m, or none, the bracket is left as it is.

    Returns:
        The bracket, and the tie index, int64 [1]: 0 where no weight with the key is pruned, or nothing is settled.
    """
    check_shape("bracket", bracket, torch.int64, (5,), bracket)
    check_shape("candidates", candidates, torch.int64, (2, candidates.shape[-1]), bracket)
    check_shape("found", found, torch.int64, (1,), bracket)
    n = int(found)
    if not 0 < n <= candidates.shape[1]:
        return bracket.clone(), torch.zeros_like(found)
    keys, index = candidates[:, candidates[1] != MAX_INDEX]
    index, by_index = index.sort()
    keys, order = keys[by_index].sort(stable=True)
    rank = min(max(int(bracket[3]), 0), n - 1)
    key = int(keys[rank])
    tied = rank > 0 and int(keys[rank - 1]) == key
    return _bracket(key, key, 0, True), torch.full_like(found, int(index[order[rank]]) if tied else 0)


def cutoff(bracket: Tensor, tie: Tensor, n_prune: Tensor, total: int, exact: bool) -> Tensor:
    """`pins_ext::cutoff`: (order key, tie index), int64 [2], of a bracket that is a single key.

    Args:
        bracket: a bracket.
        tie: int64 [1], its tie index.
        n_prune: int64, one element: how many weights are pruned.
        total: how many weights compete.
        exact: whether ties are broken by index; otherwise weights strictly below the key are pruned.
    """
    check_shape("bracket", bracket, torch.int64, (5,), bracket)
    check_shape("tie", tie, torch.int64, (1,), bracket)
    check_shape("n_prune", n_prune.reshape(1), torch.int64, (1,), bracket)
    key, wanted = int(bracket[0]), int(n_prune)
    if wanted <= 0 or (not exact and key == MAX_KEY):
        return torch.zeros(2, dtype=torch.int64, device="cpu")
    if not exact:
        return torch.tensor([key, 0], device="cpu")
    return torch.tensor([MAX_KEY, MAX_INDEX] if wanted >= total else [key, int(tie)], device="cpu")
