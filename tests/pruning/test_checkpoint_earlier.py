"""A checkpoint that an earlier version wrote resumes to the bits that version reached."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pins_ext import PruneConfig, Pruner
from pins_ext.optim import PinsAdamW

DATA = Path(__file__).parent / "data"
# Written at step 33 by the version before the package moved into folders; the digest is of its own weights at step 60.
END = "e1a33c531f9a6b48e9d97ce0343608a81d3207153c84a878237363c914e895e5"


def resumed() -> str:
    """Digest of the weights at the end."""
    torch.set_num_threads(1)
    saved = load_file(DATA / "step33_model.safetensors")
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 9, bias=False))
    model.load_state_dict({name[6:]: t for name, t in saved.items() if name.startswith("model/")})
    optimizer = PinsAdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    state = optimizer.state_dict()
    for name, tensor in saved.items():
        kind, place, key = (*name.split("/"), "")[:3]
        if kind == "optimizer":
            state["state"].setdefault(int(place), {})[key] = tensor
    optimizer.load_state_dict(state)
    pruner = Pruner(model, optimizer, PruneConfig(sparsity=0.7, delta_t=5, warmup=5, cooldown=20), 60)
    pruner.load(DATA / "step33_pruner.safetensors")
    for t in range(33, 60):
        generator = torch.Generator().manual_seed(t)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    assert pruner.finalize()["zeros"] == 235
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


@pytest.mark.parametrize("capability", ["default", ""])
def test_it_resumes_to_the_same_bits(capability: str) -> None:
    """In a process of its own: the instruction set is chosen when the extension loads."""
    environment = os.environ | ({"PINS_EXT_CPU_CAPABILITY": capability} if capability else {})
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == END


if __name__ == "__main__":
    print(resumed())
