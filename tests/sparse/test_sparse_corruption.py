"""Damaged sparse checkpoints: an error that names the file each time, never a crash, never other weights.

Cases: every file with one byte flipped in each of its regions, cut short at each boundary, and 400 indexes with random
changes whose hash was set right again, so that the contradiction itself must be noticed. The slow rounds flip every
byte, cut everywhere, and change headers of the arrays too, with a new seed each time. All print how many there were.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pins_ext.files.atomic import sha256
from pins_ext.sparse.checkpoint import SparseCheckpoint
from pins_ext.sparse.format import load_sparse, save_sparse
from pins_ext.sparse.index import FILE, SparseFormatError, digest_of

RANDOM_CHANGES = 400
HOSTILE_CHANGES = 2000


class Small(nn.Module):
    """A pruned matrix, a stack of three, and what stays dense."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(37, 24)
        self.experts = nn.Parameter(torch.randn(3, 20, 18))
        self.norm = nn.LayerNorm(24)
        for p in (self.linear.weight, self.experts):
            p.data[torch.rand(p.shape) < 0.8] = 0
        self.tied = self.linear.weight


class Other(Small):
    """The same with other weights, so that whatever is loaded shows."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.parameters():
            p.data += 1


@pytest.fixture(params=["plain", "int8", "zstd"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of several shards."""
    if request.param == "zstd":
        pytest.importorskip("zstandard")
    folder = tmp_path / "sparse"
    compression = "zstd" if request.param == "zstd" else "none"
    save_sparse(Small(), folder, int8=request.param == "int8", compression=compression, shard_bytes=1500)
    return folder


def regions(file: Path) -> list[tuple[int, int]]:
    """(begin, end) of each part of a file: the length, the header and its pieces, each array; lines of the index."""
    data = file.read_bytes()
    if file.name == FILE:
        ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
        return list(zip([0, *ends[:-1]], ends, strict=True))
    (length,) = struct.unpack("<Q", data[:8])
    start = 8 + length
    header = json.loads(data[8:start])
    text_end = 8 + len(data[8:start].rstrip())
    parts = [(i, i + 1) for i in range(8)] + [(at, min(at + 16, text_end)) for at in range(8, text_end, 16)]
    parts += [(text_end, start)] if text_end < start else []
    arrays = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return parts + [(start + a, start + b) for a, b in sorted(arrays) if b > a]


def each_damage(folder: Path) -> Iterator[tuple[str, Path, bytes]]:
    """(what, file, its damaged content)."""
    chance = random.Random(0)
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        for begin, end in regions(file):
            for at in {begin, chance.randrange(begin, end), end - 1}:
                bit = chance.randrange(8)
                flipped = bytearray(data)
                flipped[at] ^= 1 << bit
                yield f"bit {bit} of byte {at}", file, bytes(flipped)
            yield f"cut to {begin}", file, data[:begin]
            yield f"cut to {end - 1}", file, data[: end - 1]
        yield "one byte more", file, data + b"\0"
        yield "empty", file, b""


def test_every_region_flipped_and_every_boundary_cut_is_an_error(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = Other().state_dict()
    cases = 0
    for what, file, damaged in each_damage(saved):
        whole = file.read_bytes()
        file.write_bytes(damaged)
        other = Other()
        try:
            load_sparse(saved, model=other)
        except SparseFormatError as error:
            assert "pins_sparse" in str(error)  # noqa: PT017 (the case is named below)
        else:
            pytest.fail(f"{what} of {file.name} went unnoticed")
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, expected[name]), f"{what} of {file.name} changed {name}"
        file.write_bytes(whole)
        cases += 1
    print(f"{cases} damaged files refused")
    # 2,362 cases over the three kinds of checkpoint.
    assert cases > 600
    load_sparse(saved, model=Small())


def test_a_missing_file_is_named(saved: Path) -> None:
    for file in sorted(saved.iterdir()):
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(SparseFormatError, match=file.name.replace(".", r"\.")):
            SparseCheckpoint(saved)
        file.write_bytes(whole)


def paths_of(body: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else []
    for key, value in items:
        yield (*path, key)
        yield from paths_of(value, (*path, key))


def changed(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A copy with one random change somewhere."""
    body = json.loads(json.dumps(body))
    path = chance.choice(list(paths_of(body)))
    at = body
    for key in path[:-1]:
        at = at[key]
    values = list(paths_of(body))
    other = body
    for key in chance.choice(values):
        other = other[key]
    other = json.loads(json.dumps(other))
    kind = chance.randrange(5)
    if kind == 0:
        del at[path[-1]]
    elif kind == 1:
        at[path[-1]] = other
    elif kind == 2 and isinstance(at, dict):
        at[chance.choice(["x", "../x", "/etc/passwd", "linear.weight", "", "é", "a" * 3000])] = at.pop(path[-1])
    elif kind == 3 and isinstance(at[path[-1]], int):
        at[path[-1]] += chance.choice([-1, 1, 8, 1 << 20, 1 << 62, -(1 << 63)])
    else:
        at[path[-1]] = chance.choice([None, True, -1, 0, 1, 1.5, 1e308, "", "int8", "rows", [], {}, [1, 2], 10**30])
    return body


def test_random_changes_of_the_index_are_errors_or_change_no_weight(saved: Path) -> None:
    """Their hash is set right: what is left to notice is the contradiction with the arrays."""
    index = saved / FILE
    body = json.loads(index.read_text())
    del body["sha256"]
    expected = Small().state_dict() if body["compression"] == "zstd" else None
    intact: dict[str, Tensor] = load_sparse(saved, model=Small()).state_dict()
    before = Other().state_dict()
    chance = random.Random(1)
    refused = 0
    for _ in range(RANDOM_CHANGES):
        new = changed(body, chance)
        index.write_text(json.dumps(new | {"sha256": digest_of(new)}))
        model, state = Other(), intact
        try:
            load_sparse(saved, model=model)
        except SparseFormatError:
            refused, state = refused + 1, before
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), (name, new)
    assert expected is None or all(torch.equal(expected[k], intact[k]) for k in intact)
    print(f"{refused} of {RANDOM_CHANGES} changed indexes refused, the others mean the same")
    # What may change unnoticed is the informative name of the producer and the order of things.
    assert refused > 0.9 * RANDOM_CHANGES


def resign(folder: Path) -> None:
    """Set the hashes of files that were changed."""
    body = json.loads((folder / FILE).read_text())
    del body["sha256"]
    for name in body["files"]:
        body["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / FILE).write_text(json.dumps(body | {"sha256": digest_of(body)}))


class Judge:
    """Loads a damaged checkpoint: the weights that were saved, or an error and the model as it was before.

    Attributes:
        refused, same: how often.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = Other().state_dict()
        self.intact = load_sparse(folder, model=Small()).state_dict()
        self.refused = self.same = 0

    def load(self, what: str) -> None:
        model = Other()
        try:
            load_sparse(self.folder, model=model)
        except SparseFormatError:
            self.refused += 1
            allowed = self.before
        else:
            self.same += 1
            allowed = self.intact
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, allowed[name]), f"{what}: {name}"


@pytest.mark.slow
def test_hostile_rounds(saved: Path, request: pytest.FixtureRequest) -> None:
    """--fuzz-seed repeats a seed, --fuzz-share 0.01 makes a hundredth of the rounds."""
    given, share = request.config.option.fuzz_seed, request.config.option.fuzz_share
    seed = int.from_bytes(os.urandom(4), "big") if given is None else given
    print(f"--fuzz-seed {seed}")
    chance, judge = random.Random(seed), Judge(saved)
    whole = {file: file.read_bytes() for file in sorted(saved.iterdir())}
    for file, data in whole.items():
        for at in range(len(data)):
            if chance.random() < share:
                bit = chance.randrange(8)
                file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
                judge.load(f"--fuzz-seed {seed}: bit {bit} of byte {at} of {file.name}")
                file.write_bytes(data[:at])
                judge.load(f"--fuzz-seed {seed}: {file.name} cut to {at}")
        file.write_bytes(data)
    flipped = judge.refused
    assert judge.same == 0
    index = saved / FILE
    body = json.loads(index.read_text())
    del body["sha256"]
    for i in range(int(HOSTILE_CHANGES * share)):
        new = changed(body, chance)
        index.write_text(json.dumps(new | {"sha256": digest_of(new)}))
        judge.load(f"--fuzz-seed {seed}: changed index {i}: {new}")
    index.write_bytes(whole[index])
    for i in range(int(HOSTILE_CHANGES * share)):
        file = chance.choice([f for f in whole if f != index])
        data = whole[file]
        (length,) = struct.unpack("<Q", data[:8])
        new = changed(json.loads(data[8 : 8 + length]), chance)
        text = json.dumps(new).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        resign(saved)
        judge.load(f"--fuzz-seed {seed}: changed header {i}: {new}")
        file.write_bytes(data)
    rounds = 2 * int(HOSTILE_CHANGES * share)
    print(
        f"{flipped} files with a byte flipped or cut: all refused; of {rounds} changed indexes and headers with right"
    )
    print(f"hashes: {judge.refused - flipped} refused, {judge.same} mean the same")


@pytest.mark.parametrize("kind", ["mask", "offsets", "values", "scales"])
def test_arrays_that_contradict_each_other_are_refused_even_with_a_right_hash(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    save_sparse(Small(), folder, int8=True)
    (shard,) = folder.glob("*.safetensors")
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8 : 8 + length])[f"tied.pins_{kind}"]["data_offsets"]
    model = Other()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refused = 0
    for at in range(8 + length + begin, 8 + length + end):
        damaged = bytearray(data)
        # The sign of a scale, any bit of the rest.
        damaged[at] ^= 0x80
        shard.write_bytes(bytes(damaged))
        resign(folder)
        try:
            load_sparse(folder, model=model)
        except SparseFormatError:
            refused += 1
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        else:
            model.load_state_dict(before)
    # Codes may be anything. Of a scale's four bytes only the one with the sign tells.
    assert refused == {"mask": end - begin, "offsets": end - begin, "values": 0, "scales": (end - begin) // 4}[kind]
