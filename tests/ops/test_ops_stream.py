"""stream_: the benchmarks' floor moves what it says, and changes nothing."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

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


def pages_of(path: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor over a file whose pages the kernel copies when they are first stored to, whatever is stored."""
    path.write_bytes(bytes(numel * dtype.itemsize))
    with path.open("r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=dtype)


def stored(path: Path) -> int:
    """Bytes of the file's mapping that were copied, because they were stored to."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.endswith(str(path)) for line in lines)
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells which pages were stored to")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_written_is_stored_and_what_is_read_is_not(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every page: of several chunks, and the last one, which only the tail's last word is on."""
    page = mmap.PAGESIZE // dtype.itemsize
    n = 40 * page + 4 // dtype.itemsize
    paths = [tmp_path / name for name in ("first", "second", "read")]
    first, second, read = (pages_of(path, n, dtype) for path in paths)
    assert [stored(path) for path in paths] == [0, 0, 0]
    ops.stream_([first, second], [read])
    assert [stored(path) for path in paths] == [41 * mmap.PAGESIZE, 41 * mmap.PAGESIZE, 0]
