"""stream_: the benchmarks' floor moves what it says, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATS, tensor
from torch import Tensor

from pins_ext import ops


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("n", [0, 1, 77, 16384, 33333])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_changes(dtype: torch.dtype, n: int) -> None:
    written = [tensor(n, dtype, "special", 1), tensor(n, torch.float32, "special", 2, misaligned=True)]
    read = [tensor(n, dtype, "special", 3)]
    before = [x.clone() for x in (*written, *read)]
    ops.stream_(written, read)
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip((*written, *read), before, strict=True))
