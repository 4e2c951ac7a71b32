"""Which patterns of zeros would be there anyway, if the same number of zeros lay anywhere?

In a small matrix, or in one with hardly a weight left, groups, rows, columns and blocks are empty without any plan.
"""

from __future__ import annotations

from math import comb, inf, log, log1p

_PROBABILITY = 1e-4
"""Below this, groups that are all within their limit are a pattern: a model has hundreds of matrices."""

_CLEAR_OF = 16
"""Zeros outside of a pattern that chance must leave at least: fewer tell nothing."""


def groups_hold_by_chance(most: int, size: int, groups: float, live: float) -> bool:
    """Would all groups have at most `most` weights that are not zero?

    Args:
        most: N of N:M.
        size: M.
        groups: how many there are.
        live: share of weights (or of whole rows or columns) that are not zero.
    """
    beyond = sum(comb(size, k) * live**k * (1 - live) ** (size - k) for k in range(most + 1, size + 1))
    return groups * (log1p(-beyond) if beyond < 1 else -inf) > log(_PROBABILITY)


def lines_hold_by_chance(rows: int, columns: int, zeros: int, explained: int) -> bool:
    """Would as many zeros lie in rows and columns without a weight?

    Args:
        rows, columns: of the matrix.
        zeros: in it.
        explained: those in rows and columns without a weight.
    """
    share = zeros / (rows * columns)
    # Those in a row and in a column that each hold a weight.
    outside = rows * columns * (1 - share**columns) * (1 - share**rows) - (rows * columns - zeros)
    return _explains_no_more(zeros - explained, outside)


def blocks_hold_by_chance(size: int, zeros: int, weights: int, outside: int) -> bool:
    """Would as few zeros lie outside of blocks without a weight?

    Args:
        size: weights of a block.
        zeros: in the rows and columns that hold a weight.
        weights: elements there.
        outside: zeros that lie in no block without a weight.
    """
    return _explains_no_more(outside, zeros * (1 - (zeros / weights) ** (size - 1)))


def _explains_no_more(outside: int, by_chance: float) -> bool:
    return 2 * outside + _CLEAR_OF > by_chance
