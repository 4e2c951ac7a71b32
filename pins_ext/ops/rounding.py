"""Keys of the stochastic rounding of 16-bit states, and of averages in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_SEED, _STEP, _STREAM = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7
_FIRST = 0x2545F4914F6CDD1D
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


_MEAN, _UNCERTAINTY = 49471, 37345
"""In 2^-16: multiples of these fill [0, 1) evenly, also as pairs (Roberts 2018, R2)."""


def rounding_key(seed: int, step: int, stream: int) -> tuple[int, int]:
    """The `rng` argument of the operators for one (seed, step, stream), by splitmix64's finaliser.

    Args:
        seed: PruneConfig.seed.
        step: pruner step.
        stream: what is rounded in this step, so that two states don't share their random bits.

    Returns:
        Two 32-bit keys of the counter-based generator.
    """
    z = (seed * _SEED + step * _STEP + stream * _STREAM + _FIRST) & _MASK64
    z = ((z ^ (z >> 30)) * _FACTORS[0]) & _MASK64
    z = ((z ^ (z >> 27)) * _FACTORS[1]) & _MASK64
    z ^= z >> 31
    return z & 0xFFFFFFFF, z >> 32


def rounding_keys(seed: int, step: Tensor, stream: int) -> Tensor:
    """`rounding_key` of a step that is counted on a device, without waiting for it.

    Args:
        seed: PruneConfig.seed.
        step: int64 [], the count.
        stream: see `rounding_key`.

    Returns:
        int64 [2], the same two keys.
    """
    z = step * _signed(_STEP) + _signed(seed * _SEED + stream * _STREAM + _FIRST)
    z = (z ^ _shifted(z, 30)) * _signed(_FACTORS[0])
    z = (z ^ _shifted(z, 27)) * _signed(_FACTORS[1])
    z = z ^ _shifted(z, 31)
    return torch.stack([z & 0xFFFFFFFF, _shifted(z, 32)])


def fold_key(window: int) -> tuple[int, int]:
    """The `rng` argument of `fold_` for averages in 8 bits: the part of 1, in 2^-16, that rounds each for all weights.

    What one window rounds up the next ones round down: independent parts would let the threshold drift twice as far.

    Args:
        window: how many have ended.

    Returns:
        A 32-bit key, the mean's part in its low half and the uncertainty's in its high half; and 0.
    """
    return (window * _MEAN & 0xFFFF) | ((window * _UNCERTAINTY & 0xFFFF) << 16), 0


def fold_keys(window: Tensor) -> Tensor:
    """`fold_key` of a window that is counted on a device, int64 []; int64 [2]."""
    key = (window * _MEAN & 0xFFFF) | ((window * _UNCERTAINTY & 0xFFFF) << 16)
    return torch.stack([key, torch.zeros_like(key)])


def _signed(value: int) -> int:
    """The int64 of the same 64 bits; products and sums of such wrap around as those of unsigned numbers do."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shifted right as an unsigned number."""
    return (z >> bits) & (_MASK64 >> bits)
