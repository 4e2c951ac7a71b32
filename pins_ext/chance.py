"""Which patterns of zeros would be there anyway, if the same number of zeros lay anywhere?

In a small matrix, or in one with hardly a weight left, groups, rows, columns and blocks are empty without any plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, inf, log, log1p

EXPLAINED = 0.99
"""Share of the zeros that must lie in empty blocks, rows or columns for these to be the pattern: a kept weight may be
zero by chance."""

GROUPS = {4: 0.5, 8: 0.9, 16: 0.9}
"""M -> share of the zeros that N:M must ask for to be the pattern: without structure few long groups are full."""

_PROBABILITY = 1e-4
"""Below this, groups that are all within their limit are a pattern: a model has hundreds of matrices."""

_CLEAR_OF = 16
"""Zeros outside of a pattern that chance must leave at least: fewer tell nothing."""


@dataclass(frozen=True)
class Zeros:
    """Those of a matrix, or of a stack of them as one of all their rows.

    Attributes:
        rows: of the matrix.
        columns: of the matrix.
        total: zeros in it, at least one and not all.
        dead_rows: rows without a weight.
        dead_columns: columns without a weight.
    """

    rows: int
    columns: int
    total: int
    dead_rows: int
    dead_columns: int

    @property
    def share(self) -> float:
        """Of the elements, those that are zero."""
        return self.total / (self.rows * self.columns)

    @property
    def in_lines(self) -> int:
        """Elements of the rows and columns without a weight."""
        return self.dead_rows * self.columns + self.dead_columns * (self.rows - self.dead_rows)

    def are_lines(self) -> bool:
        """Whether nearly all lie in rows and columns without a weight."""
        return self.in_lines >= EXPLAINED * self.total

    def lines_hold_by_chance(self) -> bool:
        """Would as many zeros, lying anywhere, lie in rows and columns without a weight?"""
        rows, columns = self.rows, self.columns
        # Those in a row and in a column that each hold a weight.
        outside = rows * columns * (1 - self.share**columns) * (1 - self.share**rows) - (rows * columns - self.total)
        return _explains_no_more(self.total - self.in_lines, outside)

    def may_be_groups(self, keep: int, of: int, in_rows: bool) -> bool:
        """Whether N:M asks for as many of the zeros as it must, and would not hold by chance.

        Args:
            keep: N.
            of: M.
            in_rows: groups lie within rows; otherwise within columns.
        """
        along, dead = (self.columns, self.dead_columns) if in_rows else (self.rows, self.dead_rows)
        return (
            asks_for(keep, of, self.share)
            and not _groups_hold_by_chance(keep, of, self.rows * self.columns / of, 1 - self.share)
            # Where few columns are left, so are groups.
            and not _groups_hold_by_chance(keep, of, along / of, 1 - dead / along)
        )

    def are_blocks(self, size: int, outside: int) -> bool:
        """Whether blocks without a weight hold nearly all of the other zeros, and would not by chance.

        In an empty row or column every block is empty: blocks answer for the zeros that these leave over.

        Args:
            size: weights of a block.
            outside: zeros that lie in no block without a weight.
        """
        inner, room = self.total - self.in_lines, (self.rows - self.dead_rows) * (self.columns - self.dead_columns)
        return outside <= (1 - EXPLAINED) * inner and not _explains_no_more(
            outside, inner * (1 - (inner / room) ** (size - 1))
        )


def asks_for(keep: int, of: int, sparsity: float, share: float = 1.0) -> bool:
    """Whether N:M asks for as many of the zeros as it must.

    Args:
        keep: N.
        of: M, of `GROUPS`.
        sparsity: share of zeros that there are.
        share: of what it must ask for.
    """
    return 1 - keep / of >= share * GROUPS[of] * sparsity


def _groups_hold_by_chance(most: int, size: int, groups: float, live: float) -> bool:
    """Would all groups have at most `most` weights that are not zero?

    Args:
        most: N of N:M.
        size: M.
        groups: how many there are.
        live: share of weights (or of whole rows or columns) that are not zero.
    """
    beyond = sum(comb(size, k) * live**k * (1 - live) ** (size - k) for k in range(most + 1, size + 1))
    return groups * (log1p(-beyond) if beyond < 1 else -inf) > log(_PROBABILITY)


def _explains_no_more(outside: int, by_chance: float) -> bool:
    return 2 * outside + _CLEAR_OF > by_chance
