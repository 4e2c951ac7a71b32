"""Patterns that hardware knows, N:M and blocks: their names, what they fit, and whether a mask has them.

Nothing here imports torch: the flags of the command are made from it before torch could be loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from pins_ext.chance import EXPLAINED, Zeros, asks_for

if TYPE_CHECKING:
    from torch import Tensor

NONE = "none"

MOST = 32
"""Largest M of a pattern N:M: within a group every weight is compared with every other."""

ACCEPTED = f"none, N:M (2:4; N below M, M up to {MOST}) or ROWSxCOLUMNS (4x1, 16x16)"

_KNOWN = (
    "1:4", "2:4", "3:4", "1:8", "2:8", "4:8", "1:16", "2:16", "4:16", "8:16",
    "64x64", "32x32", "16x16", "8x8", "4x4", "32x1", "16x1", "8x1", "4x1", "1x32", "1x16", "1x8", "1x4",
)  # fmt: skip
"""Patterns that are looked for, of those of one kind the tightest first."""

_HEAD = 256
"""Rows that are looked at before a whole matrix is."""

_SLAB = 1 << 18
"""Elements of a mask that are counted at once."""


@dataclass(frozen=True)
class Pattern:
    """N:M (of every M consecutive weights along the inputs at most N are kept), or blocks (kept or pruned whole).

    Attributes:
        name: as it is written.
        keep: N; 0 for blocks.
        of: M; 0 for blocks.
        block: outputs x inputs of a block; (1, 1) for N:M.
    """

    name: str
    keep: int = 0
    of: int = 0
    block: tuple[int, int] = (1, 1)

    @staticmethod
    def parse(text: str) -> Pattern | None:
        """The pattern of a name; None for "none".

        Args:
            text: such as "2:4" or "4x1" (rows x columns).

        Raises:
            ValueError: no such pattern.
        """
        if text == NONE:
            return None
        if found := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text):
            keep, of = int(found[1]), int(found[2])
            if keep < of <= MOST:
                return Pattern(text, keep, of)
        if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
            block = int(found[1]), int(found[2])
            if 1 < prod(block) <= 1 << 16:
                return Pattern(text, block=block)
        raise ValueError(f"{text!r} is no pattern; there are {ACCEPTED}")

    @property
    def grouped(self) -> bool:
        """Whether it is N:M."""
        return self.of > 0


@dataclass(frozen=True)
class Fit:
    """A pattern on a tensor of a given orientation.

    Attributes:
        pattern: which.
        axis: dimension of the inputs: -1 for a Linear's [out, in], -2 for a Conv1D's [in, out].
    """

    pattern: Pattern
    axis: int

    @property
    def cells(self) -> tuple[int, int]:
        """Sizes, in the tensor's last two dimensions, of what is chosen together: a group of M, or a block."""
        if self.pattern.grouped:
            return (1, self.pattern.of) if self.axis == -1 else (self.pattern.of, 1)
        rows, columns = self.pattern.block
        return (rows, columns) if self.axis == -1 else (columns, rows)

    def misfit(self, shape: Sequence[int]) -> str | None:
        """Why the pattern does not fit a tensor; None where it does.

        Args:
            shape: of the tensor.
        """
        if len(shape) < 2:
            return f"it has {len(shape)} dimension"
        if any(size % cell for size, cell in zip(shape[-2:], self.cells, strict=True)):
            cut = f"groups of {self.pattern.of} inputs" if self.pattern.grouped else f"blocks of {self.pattern.name}"
            return f"its shape {tuple(shape)} is not made of whole {cut}"
        return None

    def divided(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How many groups or blocks there are in each dimension of a tensor, or where one begins."""
        *lead, a, b = shape
        return (*lead, a // self.cells[0], b // self.cells[1])

    def split(self, tensor: Tensor) -> Tensor:
        """The tensor's last two dimensions as four: groups or blocks and, inside of them, weights."""
        a, b = self.cells
        return tensor.unflatten(-1, (tensor.shape[-1] // b, b)).unflatten(-3, (tensor.shape[-2] // a, a))

    def counted(self, mask: Tensor) -> Tensor:
        """How many weights of each group or block a boolean mask keeps, int64."""
        return self.split(mask).sum((-3, -1))

    def violations(self, mask: Tensor) -> int:
        """Number of groups of which a mask keeps more than N, or of blocks of which it keeps a part.

        Args:
            mask: bool, of a shape that the pattern fits; True = keep.
        """
        kept = self.counted(mask)
        broken = kept > self.pattern.keep if self.pattern.grouped else (kept > 0) & (kept < prod(self.cells))
        return int(broken.sum())


def pattern_text(pattern: str | Mapping[str, str]) -> str:
    """A configuration's pattern in words."""
    return pattern if isinstance(pattern, str) else ", ".join(f"{of} for {name}" for name, of in pattern.items())


def recognised(mask: Tensor, axis: int) -> Pattern | None:
    """The tightest pattern that explains the zeros of a matrix, and that as many zeros anywhere would not make.

    Args:
        mask: boolean, at least two dimensions, True where a weight is not zero.
        axis: dimension of the inputs, see Fit.
    """
    zeros = mask.numel() - int(mask.count_nonzero())
    if mask.dim() < 2 or not 0 < zeros < mask.numel():
        return None
    head = mask[..., :_HEAD, :]
    missing = head.numel() - int(head.count_nonzero())
    fits = [fit for fit in _fits(mask.shape, axis) if missing == 0 or _may_explain(fit, head, missing)]
    if not fits:
        return None
    found_zeros = _zeros(mask, zeros)
    found = [fit.pattern for fit in fits if _explains(fit, mask, found_zeros)]
    groups = [pattern for pattern in found if pattern.grouped]
    # Small N / M first, and of equal ones the short group, which is the stricter.
    groups.sort(key=lambda pattern: (pattern.keep / pattern.of, pattern.of))
    return next(iter([pattern for pattern in found if not pattern.grouped] + groups), None)


def _zeros(mask: Tensor, total: int) -> Zeros:
    flat = mask.reshape(-1, mask.shape[-1])
    rows, columns = flat.shape
    return Zeros(rows, columns, total, rows - int(flat.any(1).sum()), columns - int(flat.any(0).sum()))


def _fits(shape: Sequence[int], axis: int) -> Iterator[Fit]:
    for name in _KNOWN:
        pattern = Pattern.parse(name)
        assert pattern is not None
        fit = Fit(pattern, axis)
        if fit.misfit(shape) is None:
            yield fit


def _may_explain(fit: Fit, head: Tensor, zeros: int) -> bool:
    """Whether the first rows leave room for the pattern: they may have fewer zeros than the others."""
    if fit.misfit(head.shape) is not None:
        return True  # a few rows that end within a block
    if fit.pattern.grouped:
        return asks_for(fit.pattern.keep, fit.pattern.of, zeros / head.numel(), 0.9) and fit.violations(head) == 0
    return _outside(fit, head, zeros) <= (1 - 0.9 * EXPLAINED) * zeros


def _explains(fit: Fit, mask: Tensor, zeros: Zeros) -> bool:
    """Whether the pattern holds, explains enough of the zeros, and would not hold by chance."""
    if fit.pattern.grouped:
        return zeros.may_be_groups(fit.pattern.keep, fit.pattern.of, fit.axis == -1) and all(
            fit.violations(slab) == 0 for slab in _slabs(fit, mask)
        )
    return zeros.are_blocks(prod(fit.cells), _outside(fit, mask, zeros.total))


def _outside(fit: Fit, mask: Tensor, zeros: int) -> int:
    """Zeros that lie in no empty block."""
    return zeros - prod(fit.cells) * sum(int((fit.counted(slab) == 0).sum()) for slab in _slabs(fit, mask))


def _slabs(fit: Fit, mask: Tensor) -> Iterator[Tensor]:
    """The mask in parts of whole groups or blocks: torch counts in eight bytes for each element."""
    rows, unit = mask.shape[-2], fit.cells[0]
    step = max(1, _SLAB * rows // (mask.numel() * unit)) * unit
    for begin in range(0, rows, step):
        yield mask[..., begin : begin + step, :]
