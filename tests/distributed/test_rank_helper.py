"""The helper that runs ranks says which of them died, and does not wait for it."""

from __future__ import annotations

import os
import signal

import pytest
import torch.distributed as dist
from ranks import run


def dies(how: str) -> int:
    if dist.get_rank() == 1:
        if how == "raises":
            raise ArithmeticError("of rank 1 alone")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return dist.get_rank()


@pytest.mark.parametrize(
    ("how", "says"), [("killed", "rank 1 ended with exit code -9"), ("raises", "ArithmeticError: of rank 1 alone")]
)
def test_what_a_rank_died_of_is_told_first(how: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        run(3, dies, how)


def test_answers_come_in_the_order_of_ranks() -> None:
    assert run(3, dist.get_rank) == [0, 1, 2]
