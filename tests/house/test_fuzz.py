"""Hostile rounds in numbers: selections against numpy, flipped bits and cuts of files, kills while writing.

Each takes a new seed, which it prints; --fuzz-seed N repeats one. --fuzz-share 0.01 makes a hundredth of the rounds.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pins_ext import PruneConfig, Pruner, ops
from pins_ext import reference as ref
from pins_ext.files import atomic

pytestmark = pytest.mark.slow

pins = torch.ops.pins_ext
SELECTIONS, FLIPS, MANIFEST_FLIPS, KILLS = 100_000, 5_000, 3_000, 100


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    given = request.config.option.fuzz_seed
    found = int.from_bytes(os.urandom(4)) if given is None else given
    print(f"--fuzz-seed {found}")
    return found


@pytest.fixture
def share(request: pytest.FixtureRequest) -> float:
    return request.config.option.fuzz_share


def scores(rng: np.random.Generator, n: int) -> torch.Tensor:
    """[n] scores: of few values, of all magnitudes, denormal, or what a float can be."""
    x = rng.standard_normal(n).astype(np.float32)
    kind = rng.integers(5)
    if kind == 0:
        x = np.round(x * rng.integers(1, 4))
    elif kind == 1:
        x = x * np.float32(10) ** rng.uniform(-38, 38, n).astype(np.float32)
    elif kind == 2:
        x = x * np.float32(1e-41)
    elif kind == 3:
        odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.0], np.float32)
        x = np.where(rng.random(n) < 0.5, odd[rng.integers(len(odd), size=n)], x)
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_selections_against_numpy(seed: int, share: float) -> None:
    """Exactly the first of numpy's stable sort by (score, index) are pruned, from scratch and from a bracket."""
    torch.set_num_threads(1)
    for i in range(int(SELECTIONS * share)):
        rng = np.random.default_rng((seed, i))
        x = [scores(rng, int(n)) for n in rng.integers(0, 300, rng.integers(1, 5))]
        layout = ops.Layout.of(x, base=int(rng.integers(0, 1 << 40)))
        work, total = (layout.places, layout.chunks), sum(map(len, x))
        n_prune = int(rng.integers(-1, total + 2))
        given = {}
        if rng.random() < 0.5:
            key = int(rng.integers(0, 1 << 32)) if rng.random() < 0.5 or not total else _some_key(rng, x)
            given = {"bracket": ops.bracket_around(torch.tensor([key, 0]), float(rng.choice([0.125, 1, 8])))}
            given["counts"] = torch.zeros(1 + ops.BINS, dtype=torch.int64)
            pins.count_(given["counts"], x, [], *work, "identity", given["bracket"])
        threshold = pins.select(x, [], *work, "identity", torch.tensor(n_prune), **given)
        masks, stats = [ops.new_mask(v) for v in x], torch.zeros(len(x), 3, dtype=torch.int64)
        pins.pack_(masks, stats, x, [], *work, "identity", threshold[None])
        kept = torch.cat([ops.unpack_bits(m, v.shape) for m, v in zip(masks, x, strict=True)]).numpy()
        order = np.argsort(ref.order_key(torch.cat(x)).numpy(), kind="stable")
        expected = np.ones(total, bool)
        expected[order[: max(0, n_prune)]] = False
        assert (kept == expected).all(), f"--fuzz-seed {seed}, round {i}: {threshold.tolist()} for {n_prune}"


def _some_key(rng: np.random.Generator, x: list[torch.Tensor]) -> int:
    keys = ref.order_key(torch.cat(x))
    return int(keys[int(rng.integers(len(keys)))])


def pruner_of(steps: int) -> Pruner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = PruneConfig(sparsity=0.5, warmup=1, cooldown=2, delta_t=2, include=["*.weight"])
    pruner = Pruner(model, optimizer, config, total_steps=10)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    return pruner


def contents(pruner: Pruner) -> tuple[dict[str, object], dict[str, bytes]]:
    state = pruner.state_dict()
    return state, {name: x.numpy().tobytes() for name, x in state.pop("tensors").items()}


def test_pruner_files_with_a_flipped_bit_and_every_cut(seed: int, share: float, tmp_path: Path) -> None:
    """Refused, and nothing changed; or, where the bit says nothing, the very state that was saved."""
    saved, other, path = pruner_of(7), pruner_of(3), tmp_path / "pruner.safetensors"
    saved.save(path)
    whole, before, after = path.read_bytes(), contents(other), contents(saved)
    random_ = random.Random(seed)
    flips = [random_.randrange(8 * len(whole)) for _ in range(int(FLIPS * share))]
    damaged = [whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :] for bit in flips]
    damaged += [whole[:n] for n in range(0, len(whole), max(1, round(1 / share)))]
    for i, data in enumerate(damaged):
        path.write_bytes(data)
        try:
            other.load(path)
        except ValueError:
            assert contents(other) == before, f"--fuzz-seed {seed}, file {i} was refused and changed something"
        else:
            assert contents(other) == after, f"--fuzz-seed {seed}, file {i} was taken"
            other = pruner_of(3)


def test_manifests_with_a_flipped_bit(seed: int, share: float, tmp_path: Path) -> None:
    """The newest whole checkpoint is found whatever a newer one's manifest says."""
    for step in (1, 2):
        with atomic.written_aside(tmp_path / f"checkpoint-{step}", {"step": step, "resumable": True}) as aside:
            (aside / "weights").write_bytes(b"weights" * step)
            (aside / "optimizer").write_bytes(b"optimizer" * step)
    manifest = tmp_path / "checkpoint-2" / atomic.MANIFEST
    whole, random_ = manifest.read_bytes(), random.Random(seed)
    for i in range(int(MANIFEST_FLIPS * share)):
        data = bytearray(whole)
        for _ in range(random_.choice((1, 1, 1, 2, 8))):
            data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        manifest.write_bytes(data)
        found, passed = atomic.newest_complete(tmp_path)
        assert found is not None, f"--fuzz-seed {seed}, round {i}"
        assert (found.name == "checkpoint-2") != bool(passed), f"--fuzz-seed {seed}, round {i}"


def test_kills_lose_no_finished_checkpoint(seed: int, share: float, tmp_path: Path) -> None:
    """A process that writes and rotates checkpoints is killed at any moment, the next one goes on."""
    random_, finished = random.Random(seed), 0
    script = Path(__file__).parents[1] / "helpers" / "checkpoint_writer.py"
    for i in range(max(1, int(KILLS * share))):
        with subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(random_.uniform(0, 0.05))
            writer.kill()
            said = [first, *writer.stdout.read().splitlines()]
        # The last line may be cut.
        finished = max([finished, *(int(line) for line in said[:-1] or said if line.strip())])
        atomic.clear_leftovers(tmp_path)
        newest, passed = atomic.newest_complete(tmp_path)
        assert newest is not None, f"--fuzz-seed {seed}, kill {i}"
        assert int(newest.name.removeprefix("checkpoint-")) >= finished, f"--fuzz-seed {seed}, kill {i}"
        assert not passed, f"--fuzz-seed {seed}, kill {i}: {passed}"
