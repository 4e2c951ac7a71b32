"""Keys of the stochastic rounding of 16-bit states."""

from __future__ import annotations

_MASK64 = (1 << 64) - 1


def rounding_key(seed: int, step: int, stream: int) -> tuple[int, int]:
    """The `rng` argument of the operators for one (seed, step, stream), by splitmix64's finaliser.

    Args:
        seed: PruneConfig.seed.
        step: pruner step.
        stream: what is rounded in this step, so that two states don't share their random bits.

    Returns:
        Two 32-bit keys of the counter-based generator.
    """
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7) & _MASK64
    z = (z + 0x2545F4914F6CDD1D) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return z & 0xFFFFFFFF, z >> 32
