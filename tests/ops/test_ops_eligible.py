"""eligible_ on the CPU against reference.py, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import VALUES
from eligible_scores import KINDS, SMALL, check_eligible

from pins_ext import ops
from pins_ext import reference as ref

PATTERNS = [(2, 4), (1, 4), (4, 8), (1, 2), (2, 3), (3, 7), (8, 16), (31, 32)]


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(("score", "dtype"), KINDS)
def test_every_score(score: str, dtype: torch.dtype, axis: int) -> None:
    for values in VALUES:
        check_eligible("cpu", score, dtype, values, SMALL, (2, 4), axis)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern(pattern: tuple[int, int], axis: int) -> None:
    """Also groups that a block and a chunk of 16384 weights cut."""
    of = pattern[1]
    shapes = [(3, of), (of, 5 * of), (2, of, 3 * of), (7 * of, 77 * of)]
    for values in ("ties", "special"):
        check_eligible("cpu", "identity", torch.float32, values, shapes, pattern, axis)


@pytest.mark.parametrize("axis", [-1, -2])
def test_shards(axis: int) -> None:
    shards = [ops.Shard((32, 40), (8, 8)), ops.Shard((4, 16, 24), (1, 8, 8))]
    check_eligible("cpu", "product", torch.float32, "ties", [(16, 24), (2, 8, 16)], (2, 4), axis, shards)


def test_the_best_are_beyond_every_cutoff() -> None:
    """Of scores that are all infinite or NaN, too: selected and packed, each group keeps its N best."""
    x = torch.tensor([[torch.nan, torch.inf, torch.nan, torch.nan], [torch.inf, torch.inf, 1.0, torch.inf]])
    layout, scores, nans = ops.Layout.of([x]), [torch.empty(2, 4)], torch.zeros(1, dtype=torch.int64)
    ops.eligible_(scores, nans, [x], [], layout.places, layout.chunks, "identity", torch.tensor([[2, 4, 1]]))
    operands = (scores, [], layout.places, layout.chunks, "identity")
    assert nans.tolist() == [3]
    order = [(1, 2), (0, 1), (1, 0), (0, 0)]
    for n_prune in range(1, 5):
        kept = torch.ones(2, 4, dtype=torch.bool)
        kept[tuple(zip(*order[:n_prune], strict=True))] = False
        cutoff = ops.select(*operands, torch.tensor(n_prune)).reshape(1, 2)
        bits = ops.new_mask(x)
        ops.pack_([bits], torch.zeros(1, 3, dtype=torch.int64), *operands, cutoff)
        assert torch.equal(ops.unpack_bits(bits, x.shape), kept)
    assert torch.equal(ref.group_mask(x, 2, 4, -1), kept)


@pytest.mark.parametrize("axis", [-1, -2])
def test_states_in_8_bits(axis: int) -> None:
    """Their rows are of any length, and groups N:M begin anywhere in theirs of 32."""
    shapes = [(8, 20), (16, 36), (4, 700)]
    generator = torch.Generator().manual_seed(0)
    stored = [[ops.encode(torch.rand(s, generator=generator), torch.uint8) for s in shapes] for _ in range(2)]
    scores = [torch.empty(s) for s in shapes]
    layout, nans = ops.Layout.of(scores), torch.zeros(3, dtype=torch.int64)
    groups = torch.tensor([[2, 4, 1 if axis == -1 else s[-1]] for s in shapes])
    ops.eligible_(scores, nans, *stored, layout.places, layout.chunks, "product", groups)
    for found, a, b, shape in zip(scores, *stored, shapes, strict=True):
        expected = ref.eligible(ops.decode(a, shape) * ops.decode(b, shape), 2, 4, axis)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
