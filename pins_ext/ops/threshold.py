"""The operators of a selection: sample keys, count them against a bracket, narrow it to one key, break its ties.

The order key of a score is an integer in [0, 2^32) in the order of float32, with every NaN highest. Weights compete in
the order of (key, global index). All results stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    size: int,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> Tensor:
    """Order keys of weights drawn evenly over all tensors; the same weights at every call.

    Args:
        a: [n tensors], first operand of the score: float32 or bfloat16 for product and deviation, otherwise also
            float16; also a state in 8 bits, see `encode`.
        b: [n tensors], its second operand: in the dtype of a for product and deviation, any of the three for fisher,
            otherwise empty.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        score: one of `SCORES`.
        size: how many keys, at least 1.
        factors: float32 [n], of the score fisher: 1 / (1 - beta2^t) of each tensor; None for the others.
        pointers: int64 [2, n], on a GPU: addresses of a and b; None to look them up, except while a CUDA graph is
            captured.

    Returns:
        int64 [size], unordered; zeros where there are no weights.

    Raises:
        RuntimeError: an unknown score, an argument of another dtype, shape or device, not contiguous, or a size below
            1.
    """
    return torch.ops.pins_ext.sample(a, b, places, chunks, score, size, factors=factors, pointers=pointers)


def count_(
    counts: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    bracket: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """Count the keys below a bracket and in each of its bins.

    A bracket that is a single key leaves counts as they are.

    Args:
        counts: int64 [1 + BINS]; written.
        a: [n tensors], first operand of the score: float32 or bfloat16 for product and deviation, otherwise also
            float16; also a state in 8 bits, see `encode`.
        b: [n tensors], its second operand: in the dtype of a for product and deviation, any of the three for fisher,
            otherwise empty.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        score: one of `SCORES`.
        bracket: int64 [5]: lowest and highest key, width of a bin as a shift, rank of the weight looked for among those
            from the lowest key on, 1 once it is a single key.
        factors: float32 [n], of the score fisher: 1 / (1 - beta2^t) of each tensor; None for the others.
        pointers: int64 [2, n], on a GPU: addresses of a and b; None to look them up, except while a CUDA graph is
            captured.

    Raises:
        RuntimeError: an unknown score, an argument of another dtype, shape or device, not contiguous, on the CPU a
            bracket of more than BINS bins, an output that shares memory with a table.
    """
    torch.ops.pins_ext.count_(counts, a, b, places, chunks, score, bracket, factors=factors, pointers=pointers)


def collect_(
    found: Tensor,
    candidates: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    bracket: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """Collect the weights inside a bracket, in any order.

    Nothing is collected for a bracket that is a single key.

    Args:
        found: int64 [1], how many weights are inside, or, where more than m are, some number above m; written.
        candidates: int64 [2, m], their keys and global indices; written. What it held before stays in places left over.
        a: [n tensors], first operand of the score: float32 or bfloat16 for product and deviation, otherwise also
            float16; also a state in 8 bits, see `encode`.
        b: [n tensors], its second operand: in the dtype of a for product and deviation, any of the three for fisher,
            otherwise empty.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        score: one of `SCORES`.
        bracket: int64 [5]: lowest and highest key, width of a bin as a shift, rank of the weight looked for among those
            from the lowest key on, 1 once it is a single key.
        factors: float32 [n], of the score fisher: 1 / (1 - beta2^t) of each tensor; None for the others.
        pointers: int64 [2, n], on a GPU: addresses of a and b; None to look them up, except while a CUDA graph is
            captured.

    Raises:
        RuntimeError: an unknown score, an argument of another dtype, shape or device, not contiguous, on the CPU a
            bracket of more than BINS bins, an output that shares memory with a table.
    """
    torch.ops.pins_ext.collect_(
        found,
        candidates,
        a,
        b,
        places,
        chunks,
        score,
        bracket,
        factors=factors,
        pointers=pointers,
    )


def tie_index(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    bracket: Tensor,
    *,
    factors: Tensor | None = None,
    pointers: Tensor | None = None,
) -> Tensor:
    """Global index of the weight at the bracket's rank among the weights of its one key.

    Args:
        a: [n tensors], first operand of the score: float32 or bfloat16 for product and deviation, otherwise also
            float16; also a state in 8 bits, see `encode`.
        b: [n tensors], its second operand: in the dtype of a for product and deviation, any of the three for fisher,
            otherwise empty.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        score: one of `SCORES`.
        bracket: int64 [5]: lowest and highest key, width of a bin as a shift, rank of the weight looked for among those
            from the lowest key on, 1 once it is a single key.
        factors: float32 [n], of the score fisher: 1 / (1 - beta2^t) of each tensor; None for the others.
        pointers: int64 [2, n], on a GPU: addresses of a and b; None to look them up, except while a CUDA graph is
            captured.

    Returns:
        int64 [1]; 0 where the rank is 0.

    Raises:
        RuntimeError: an unknown score, an argument of another dtype, shape or device, or not contiguous.
    """
    return torch.ops.pins_ext.tie_index(a, b, places, chunks, score, bracket, factors=factors, pointers=pointers)


def bracket_of(
    keys: Tensor,
    position: Tensor,
    total: int,
) -> Tensor:
    """A bracket that most likely holds the weight of a rank, from a sample of the keys.

    Args:
        keys: int64 [m], what `sample` returns.
        position: int64 [], rank of the weight looked for.
        total: how many weights compete.

    Returns:
        int64 [5], a bracket.

    Raises:
        RuntimeError: an argument of another dtype, shape or device.
    """
    return torch.ops.pins_ext.bracket_of(keys, position, total)


def narrow(
    bracket: Tensor,
    counts: Tensor,
    position: Tensor,
) -> Tensor:
    """The bin of a bracket that holds a position, or, if none does, all keys on that side of the bracket.

    Args:
        bracket: int64 [5]: lowest and highest key, width of a bin as a shift, rank of the weight looked for among those
            from the lowest key on, 1 once it is a single key.
        counts: int64 [1 + BINS], what `count_` has written; of several ranks, the sum.
        position: int64 [], rank of the weight looked for.

    Returns:
        int64 [5], a bracket; a single key stays as it is.

    Raises:
        RuntimeError: an argument of another dtype, shape or device.
    """
    return torch.ops.pins_ext.narrow(bracket, counts, position)


def settle(
    bracket: Tensor,
    candidates: Tensor,
    found: Tensor,
) -> tuple[Tensor, Tensor]:
    """The single key of the weight looked for and its tie index, from the weights of a bracket.

    Args:
        bracket: int64 [5]: lowest and highest key, width of a bin as a shift, rank of the weight looked for among those
            from the lowest key on, 1 once it is a single key.
        candidates: int64 [2, m], keys and global indices that `collect_` has written among places that hold MAX_INDEX.
        found: int64 [1], how many they are; for more than m, or none, the bracket stays as it is.

    Returns:
        The bracket, int64 [5], and the tie index, int64 [1], which is 0 where no weight of the key is pruned or nothing
        is settled.

    Raises:
        RuntimeError: an argument of another dtype, shape or device.
    """
    return torch.ops.pins_ext.settle(bracket, candidates, found)


def settle_around(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    bracket: Tensor,
    position: Tensor,
    *,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The single key of the weight at a rank and its tie index, in one pass over the scores; on the CPU.

    The weights inside the bracket are written down, 6 bytes each, up to four million of them.

    Args:
        a: [n tensors], first operand of the score: float32 or bfloat16 for product and deviation, otherwise also
            float16; also a state in 8 bits, see `encode`.
        b: [n tensors], its second operand: in the dtype of a for product and deviation, any of the three for fisher,
            otherwise empty.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        score: one of `SCORES`.
        bracket: int64 [5], where the weight is likely to be, as from `bracket_of`; its rank is not read.
        position: int64 [], rank of the weight looked for among all.
        factors: float32 [n], of the score fisher: 1 / (1 - beta2^t) of each tensor; None for the others.

    Returns:
        The bracket, int64 [5], and the tie index, int64 [1], as from `settle`. For a weight beside the bracket, all
        keys on that side, as from `narrow`; with too many weights inside, the bracket in the finest bins there are. A
        bracket of one key that holds the weight is resolved, with the rank among that key's weights. The tie index is
        then 0.

    Raises:
        RuntimeError: an unknown score, an argument of another dtype, shape or device, not contiguous, a bracket of more
            than BINS bins, a position outside of what competes.
    """
    return torch.ops.pins_ext.settle_around(a, b, places, chunks, score, bracket, position, factors=factors)


def cutoff(
    bracket: Tensor,
    tie: Tensor,
    n_prune: Tensor,
    total: int,
    exact: bool,
) -> Tensor:
    """The threshold that a bracket of a single key stands for.

    Args:
        bracket: int64 [5]: lowest and highest key, width of a bin as a shift, rank of the weight looked for among those
            from the lowest key on, 1 once it is a single key.
        tie: int64 [1], its tie index, from `settle` or `tie_index`.
        n_prune: int64, one element, how many weights to prune.
        total: how many weights compete.
        exact: break ties by global index; otherwise only weights strictly below the key are pruned.

    Returns:
        int64 [2], (order key, tie index): a weight is pruned if its (key, global index) lies before.

    Raises:
        RuntimeError: an argument of another dtype, shape or device.
    """
    return torch.ops.pins_ext.cutoff(bracket, tie, n_prune, total, exact)


def select(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    places: Tensor,
    chunks: Tensor,
    score: str,
    n_prune: Tensor,
    exact: bool = True,
    *,
    factors: Tensor | None = None,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    pointers: Tensor | None = None,
    total: int | None = None,
) -> Tensor:
    """The threshold below which exactly `n_prune` weights of all tensors lie.

    On a GPU the host does not wait for the device, unless it has to count weights in 8 bits.

    Args:
        a: [n tensors], first operand of the score: float32 or bfloat16 for product and deviation, otherwise also
            float16; also a state in 8 bits, see `encode`.
        b: [n tensors], its second operand: in the dtype of a for product and deviation, any of the three for fisher,
            otherwise empty.
        places: int64 [n, 14], `Layout.places`.
        chunks: int64 [m, 2], `Layout.chunks`.
        score: one of `SCORES`.
        n_prune: int64, one element, how many weights to prune.
        exact: break ties by global index; otherwise prune what lies strictly below the n_prune-th smallest score, which
            is fewer under ties.
        factors: float32 [n], of the score fisher: 1 / (1 - beta2^t) of each tensor; None for the others.
        bracket: int64 [5], where the threshold is likely to be, see `bracket_around`; None to find out from a sample.
        counts: int64 [1 + BINS], already counted against that bracket, see `fold_`; None to count.
        pointers: int64 [2, n], on a GPU: addresses of a and b; None to look them up, except while a CUDA graph is
            captured.
        total: how many weights the tensors have; None to count them, for which a GPU's places are read where `a` is in
            8 bits.

    Returns:
        int64 [2], (order key, tie index): a weight is pruned if its (key, global index) lies before.

    Raises:
        RuntimeError: an unknown score, an argument of another dtype, shape or device, or not contiguous.
    """
    return torch.ops.pins_ext.select(
        a,
        b,
        places,
        chunks,
        score,
        n_prune,
        exact,
        factors=factors,
        bracket=bracket,
        counts=counts,
        pointers=pointers,
        total=total,
    )
