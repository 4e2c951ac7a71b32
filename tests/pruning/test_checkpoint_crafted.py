"""Pruner files that are not what a pruner wrote: refused in words, and nothing has changed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pins_ext import PruneConfig, Pruner
from pins_ext.files import tensor_file
from pins_ext.optim import PinsAdamW
from pins_ext.pruning.checkpoint import FORMAT

CONFIG = PruneConfig(sparsity=0.75, delta_t=3, warmup=3, cooldown=6)


def make(steps: int, seed: int = 0) -> Pruner:
    """A small pruner that has seen some steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    optimizer = PinsAdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, CONFIG, 20)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return pruner


def contents(pruner: Pruner) -> tuple[str, dict[str, Tensor]]:
    """All of a pruner's state, copied."""
    state = pruner.state_dict()
    plain = {name: value for name, value in state.items() if name != "tensors"}
    return json.dumps(plain), {name: t.clone() for name, t in state["tensors"].items()}


def equal(one: tuple[str, dict[str, Tensor]], other: tuple[str, dict[str, Tensor]]) -> bool:
    """Whether two states are the same to the last bit."""
    same = one[0] == other[0] and one[1].keys() == other[1].keys()
    return same and all(torch.equal(t, other[1][name]) for name, t in one[1].items())


def data(**changed: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces some plain data, or takes it out."""

    def change(state: dict[str, Any]) -> None:
        for name, value in changed.items():
            state[name] = value
            if value == "absent":
                del state[name]

    return change


def bit(name: str, place: int) -> Callable[[dict[str, Any]], None]:
    """Sets a bit of a packed mask."""

    def change(state: dict[str, Any]) -> None:
        mask = state["tensors"][name].clone()
        mask[place // 8] |= 1 << place % 8
        state["tensors"][name] = mask

    return change


def tensor(name: str, value: Tensor) -> Callable[[dict[str, Any]], None]:
    """Replaces a tensor."""

    def change(state: dict[str, Any]) -> None:
        state["tensors"][name] = value

    return change


CRAFTED = {
    "no step": (data(step="absent"), "step: None"),
    "step -5": (data(step=-5), "step: -5"),
    "step 1.5": (data(step=1.5), r"step: 1\.5"),
    "step true": (data(step=True), "step: True"),
    "no frozen": (data(frozen="absent"), "frozen: None"),
    "frozen 1": (data(frozen=1), "frozen: 1"),
    "no masked": (data(masked="absent"), "masked: None"),
    "no selected_for": (data(selected_for="absent"), "selected_for: 'missing'"),
    "selected_for text": (data(selected_for="7"), "selected_for: '7'"),
    "selected_for negative": (data(selected_for=[1, -2]), r"selected_for: \[1, -2\]"),
    "no config": (data(config="absent"), r"sparsity: None there, 0\.75 here"),
    "config a list": (data(config=[1]), r"sparsity: None there, 0\.75 here"),
    "no total_steps": (data(total_steps="absent"), "total_steps: None there, 20 here"),
    "version 99": (data(version=99), "version 99"),
    "NaN counts": (tensor("accepted/0", torch.tensor([float("nan")])), r"accepted/0: \[nan\]"),
    "counts -1": (tensor("accepted/0", torch.tensor([-1.0])), r"accepted/0: \[-1\.0\]"),
    "counts without end": (tensor("accepted/0", torch.tensor([float("inf")])), r"accepted/0: \[inf\]"),
    "counts of integers": (tensor("accepted/0", torch.tensor([1])), r"accepted/0: torch\.int64"),
    "threshold of one number": (tensor("threshold", torch.tensor(3)), r"threshold: shape \(\)"),
    "threshold of three rows": (
        tensor("threshold", torch.zeros(3, 2, dtype=torch.int64)),
        r"threshold: shape \(3, 2\)",
    ),
    "threshold of floats": (tensor("threshold", torch.zeros(1, 2)), r"threshold: torch\.float32"),
    "threshold negative": (tensor("threshold", torch.tensor([[-1, 0]])), r"threshold: \[\[-1, 0\]\]"),
    "threshold too high": (tensor("threshold", torch.tensor([[2**33, 0]])), r"threshold: \[\[8589934592, 0\]\]"),
    "padding just behind the weights": (bit("mask/0.weight", 20), r"mask/0\.weight: bits behind the last of its 20"),
    "padding at a mask's end": (bit("mask/0.weight", 63), r"mask/0\.weight: bits behind the last of its 20"),
    "padding of whole bytes": (bit("mask/2.weight", 16), r"mask/2\.weight: bits behind the last of its 12"),
    "one state more": (tensor("ipt/other", torch.zeros(2)), "1 states exist on one side only, ipt/other"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_file_is_refused_and_nothing_changes(case: str, tmp_path: Path) -> None:
    change, reason = CRAFTED[case]
    state = make(7).state_dict()
    change(state)
    tensors = state.pop("tensors")
    tensor_file.write(tmp_path / "pruner.safetensors", FORMAT, state, tensors)
    pruner = make(4, seed=1)
    before = contents(pruner)
    with pytest.raises(ValueError, match=reason):
        pruner.load(tmp_path / "pruner.safetensors")
    assert equal(contents(pruner), before)


@pytest.mark.parametrize("text", ["null", "[1]", "7", '"x"', "{", "[" * 200_000, "{}", "absent"])
def test_plain_data_that_is_no_state_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "pruner.safetensors"
    tensors = make(7).state_dict()["tensors"]
    digest = tensor_file._digest("" if text == "absent" else text, tensors)
    metadata = {"format": FORMAT, "sha256": digest} | ({} if text == "absent" else {"data": text})
    save_file(tensors, path, metadata)
    pruner = make(4, seed=1)
    before = contents(pruner)
    with pytest.raises(ValueError, match=r"not a pruner state of this version|cannot be read"):
        pruner.load(path)
    assert equal(contents(pruner), before)


@pytest.mark.parametrize("change", [lambda t: t.view(torch.int32), lambda t: t.reshape(-1)], ids=["dtype", "shape"])
def test_the_hash_covers_how_contents_are_read(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "pruner.safetensors"
    make(7).save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({name: change(t) if name == "ipt/0.weight" else t for name, t in tensors.items()}, path, metadata)
    with pytest.raises(ValueError, match="is damaged"):
        make(4).load(path)


def test_a_file_says_what_it_belongs_to(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path, origin = tmp_path / "pruner.safetensors", {"run": "a", "step": 7}
    make(7).save(path, origin)
    pruner = make(4)
    for other in ({"run": "a", "step": 8}, {"run": "b", "step": 7}):
        before = contents(pruner)
        with pytest.raises(ValueError, match=r"belongs to {'run': 'a', 'step': 7}, not to"):
            pruner.load(path, other)
        assert equal(contents(pruner), before)
    pruner.load(path)
    pruner.load(path, origin)
    assert not recwarn
    make(7).save(path)
    with pytest.warns(UserWarning, match="doesn't say what it belongs to"):
        pruner.load(path, origin)
    assert pruner.step == 7


def fuzzed(path: Path, versions: list[bytes]) -> int:
    """Load every version into a pruner that is at another step: refused, or what was written. How many were refused."""
    written, pruner = contents(make(7)), make(4, seed=1)
    before, refused = contents(pruner), 0
    for version in versions:
        path.write_bytes(version)
        try:
            pruner.load(path, {"run": "a", "step": 7})
        except ValueError:
            refused += 1
            assert equal(contents(pruner), before)
        else:
            assert equal(contents(pruner), written)
            pruner = make(4, seed=1)
    return refused


@pytest.mark.slow
def test_flipped_bits_and_cuts_are_refused(tmp_path: Path) -> None:
    path, seed = tmp_path / "pruner.safetensors", random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    make(7).save(path, {"run": "a", "step": 7})
    whole, drawn = path.read_bytes(), random.Random(seed)
    header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    bits = sorted({*range(64), *drawn.sample(range(header), 4500), *drawn.sample(range(8 * len(whole)), 1500)})
    flips = []
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        flips.append(bytes(flipped))
    assert len(flips) > 5000
    refused = fuzzed(path, flips)
    print(f"{refused} of {len(flips)} flips refused, the others changed nothing")
    assert refused > 0.95 * len(flips)
    cuts = [whole[:n] for n in range(len(whole))]
    assert fuzzed(path, cuts) == len(cuts)
    print(f"{len(cuts)} cuts refused")
