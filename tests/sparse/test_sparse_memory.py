"""Saving and loading a sparse checkpoint stream: beside the model itself they hold about one tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TENSOR_MB, TENSORS = 16, 12

# A process of its own: its peak is that of this alone.
PROGRAM = f"""
import json, re, sys
from pathlib import Path
import torch
from torch import nn
from pins_ext.sparse.checkpoint import SparseCheckpoint
from pins_ext.sparse.format import load_sparse, save_sparse

def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def begin():
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over at what is resident now
    return peak_mb()

def network():
    return nn.ModuleDict({{f"layer{{i}}": nn.Linear(1024, {TENSOR_MB} * 256, bias=False) for i in range({TENSORS})}})

torch.set_num_threads(1)
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
with torch.no_grad():
    small = nn.Linear(64, 64)
    small.weight[:, ::2] = 0
    save_sparse(nn.ModuleDict({{"a": small}}), folder / "warm", **options)  # what the first call brings with it
    model = network()
    for layer in model.values():
        layer.weight[torch.rand(layer.weight.shape) < 0.9] = 0
    # A pattern is looked for in the whole matrix.
    model["layer0"].weight.fill_(1)[:, 1::4] = 0
    model["layer0"].weight[:, 2::4] = 0
    before = begin()
    save_sparse(model, folder / "saved", **options)
    saved = peak_mb() - before
    target = network()
    before = begin()
    load_sparse(folder / "saved", model=target)
    loaded = peak_mb() - before
    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), target.parameters()))
    del model, target
    before = begin()
    total = 0
    for _, tensor in SparseCheckpoint(folder / "saved").tensors():
        total += tensor.numel()
        del tensor
    read = peak_mb() - before
print(json.dumps({{"saved": saved, "loaded": loaded, "read": read, "same": same, "total": total}}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}], ids=["plain", "zstd"])
def test_peak_memory_is_the_model_and_about_a_tensor(options: dict[str, str], tmp_path: Path) -> None:
    if options:
        pytest.importorskip("zstandard")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(options)]
    # glibc would keep freed memory of this size for later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.pop("same")
    assert found.pop("total") == TENSORS * TENSOR_MB * 1024 * 256
    # One tensor more, a byte for each of its weights, and of a file that is read what lies in the page cache.
    file = sum(f.stat().st_size for f in (tmp_path / "saved").iterdir()) / 2**20
    reading = 1.6 * TENSOR_MB + file
    for what, allowed in (("saved", 1.3 * TENSOR_MB), ("loaded", reading), ("read", reading)):
        assert found[what] < allowed, f"{what}: {found[what]:.0f} MB beside a model of {TENSORS * TENSOR_MB} MB"
