"""`pins-ext inspect`: what it finds in checkpoints that others made, against counts made by hand."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from without import run_without

from pins_ext.cli.main import main
from pins_ext.extras import EXTRA_OF
from pins_ext.sparse import survey as surveys
from pins_ext.sparse.survey import SurveyError, TensorSurvey, survey, together


def dense(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.5


def two_of_four(rows: int, columns: int) -> Tensor:
    return dense(rows, columns) * torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(columns // 4)


def blocks(rows: int, columns: int, edge: int) -> Tensor:
    keep = torch.rand(rows // edge, columns // edge, generator=torch.Generator().manual_seed(1)) < 0.5
    return dense(rows, columns) * keep.repeat_interleave(edge, 0).repeat_interleave(edge, 1)


def scattered(rows: int, columns: int) -> Tensor:
    return dense(rows, columns) * (torch.rand(rows, columns, generator=torch.Generator().manual_seed(2)) < 0.25)


def dead(rows: int, columns: int) -> Tensor:
    tensor = dense(rows, columns)
    tensor[3:9], tensor[:, 5] = 0, 0
    return tensor


TENSORS = {
    "a.dense": dense(130, 96),
    "b.two_of_four": two_of_four(130, 128),
    "c.down": two_of_four(96, 192).T.contiguous(),
    "d.blocks": blocks(128, 96, 16),
    "e.scattered": scattered(300, 200),
    "f.dead": dead(40, 30),
    "g.empty": torch.zeros(8, 8),
    "h.half": scattered(64, 64).bfloat16(),
    "i.experts": torch.stack([two_of_four(12, 128), two_of_four(12, 128)]),
    "j.bias": torch.tensor([0.0, 1.0, -0.0]),
    "k.positions": torch.arange(12),
    "l.odd": torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]]),
    "m.scalar": torch.tensor(2.0),
    "n.nothing": torch.zeros(0, 4),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_what_is_found_is_what_is_there(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """In parts of a few rows, and whole."""
    monkeypatch.setattr(surveys, "_CHUNK_WEIGHTS", chunk)
    found = {each.name: each for each in survey(checkpoint)}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        each = found[name]
        assert each.shape == tuple(tensor.shape)
        assert each.dense_bytes == tensor.numel() * tensor.element_size()
        floating = tensor.is_floating_point()
        assert each.weights == (tensor.numel() if floating else 0)
        assert each.zeros == (int((tensor == 0).sum()) if floating else 0)
        assert each.not_finite == (int((~tensor.isfinite()).sum()) if floating else 0)
        if tensor.dim() >= 2 and tensor.numel():
            matrix = tensor.reshape(-1, tensor.shape[-1])
            assert each.dead_rows == int((matrix == 0).all(1).sum())
            assert each.dead_columns == int((matrix == 0).all(0).sum())
    patterns = {name[0]: each.patterns for name, each in found.items() if each.patterns}
    assert patterns["b"] == ("2:4 in rows", "whole rows and columns")
    assert patterns["c"] == ("2:4 in columns", "whole rows and columns")
    assert patterns["d"][-1] == "blocks of 16 x 16"
    assert patterns["f"] == ("whole rows and columns",)
    assert patterns["g"] == ("all zero",)
    assert "2:4 in rows" in patterns["i"]
    assert not {"a", "e", "h"} & patterns.keys()
    total = together(list(found.values()))
    assert total["zeros"] == sum(each.zeros for each in found.values())
    assert total["not_finite"] == 2
    assert total["packed_bytes"] < total["dense_bytes"]


@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (1, 4), (16, 1), (16, 16), (64, 64)])
def test_blocks_of_any_known_shape_are_named_the_largest_first(tmp_path: Path, rows: int, columns: int) -> None:
    kept = torch.rand(256 // rows, 256 // columns, generator=torch.Generator().manual_seed(3)) < 0.5
    mask = kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    save_file(
        {"w": dense(256, 256) * mask, "x": dense(256, 256) * (torch.rand(256, 256) < 0.5)}, tmp_path / "a.safetensors"
    )
    found = {each.name: each.patterns for each in survey(tmp_path / "a.safetensors")}
    assert found == {"w": (f"blocks of {rows} x {columns}",), "x": ()}


def test_two_of_four_need_not_be_whole_columns(tmp_path: Path) -> None:
    kept = torch.rand(64, 16, 4, generator=torch.Generator().manual_seed(3)).argsort(-1) < 2
    save_file(
        {"w": dense(64, 64) * kept.reshape(64, 64), "x": dense(64, 64) * ~kept.reshape(64, 64)},
        tmp_path / "a.safetensors",
    )
    assert [each.patterns for each in survey(tmp_path / "a.safetensors")] == [("2:4 in rows",)] * 2
    spoiled = dense(64, 64) * kept.reshape(64, 64)
    spoiled[7, 8:12] = 1
    save_file({"w": spoiled}, tmp_path / "a.safetensors")
    assert [each.patterns for each in survey(tmp_path / "a.safetensors")] == [()]


def nearly_empty(rows: int, columns: int, left: int) -> Tensor:
    kept = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(5))[:left]
    tensor = torch.zeros(rows * columns)
    tensor[kept] = 1.0
    return tensor.view(rows, columns)


def few_columns(rows: int, columns: int, left: int) -> Tensor:
    """Columns without any order among them."""
    kept = torch.randperm(columns, generator=torch.Generator().manual_seed(6))[:left]
    tensor = torch.zeros(rows, columns)
    tensor[:, kept] = 1.0
    return tensor


def padding_row(rows: int, columns: int) -> Tensor:
    tensor = dense(rows, columns)
    tensor[0] = 0
    return tensor


@pytest.mark.parametrize(
    ("tensor", "patterns"),
    [
        *[(nearly_empty(384, 384, left), ()) for left in (1, 2, 10, 100, 1000, 3000)],
        *[(nearly_empty(2, columns, 2), ()) for columns in (2, 3, 8, 16, 64)],
        *[(nearly_empty(8, 8, left), ()) for left in (1, 4, 16, 32, 63)],
        (padding_row(300, 64), ()),
        (few_columns(384, 384, 10), ("whole rows and columns",)),
        (few_columns(384, 384, 10) * (nearly_empty(384, 384, 110_000) > 0), ("whole rows and columns",)),
        # Many columns without a weight, few weights in the others: no blocks, though nearly all tall ones are empty.
        (few_columns(384, 384, 100) * (nearly_empty(384, 384, 12_000) > 0), ()),
        # Structure that is there stays, however many zeros come on top.
        (two_of_four(384, 384) * (nearly_empty(384, 384, 30_000) > 0), ("2:4 in rows",)),
        (blocks(384, 384, 16) * (blocks(384, 384, 32) > 0), ("blocks of 16 x 16",)),
    ],
)
def test_what_chance_makes_is_no_pattern(tmp_path: Path, tensor: Tensor, patterns: tuple[str, ...]) -> None:
    save_file({"w": tensor.contiguous()}, tmp_path / "a.safetensors")
    assert [each.patterns for each in survey(tmp_path / "a.safetensors")] == [patterns]


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999])
def test_zeros_anywhere_have_no_pattern(tmp_path: Path, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(7)
    shapes = [(3, 384), (64, 64), (384, 384), (384, 1536), (16, 16), (5, 7)]
    tensors = {f"{i}": dense(*s) * (torch.rand(s, generator=generator) >= sparsity) for i, s in enumerate(shapes)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = {each.patterns for each in survey(tmp_path / "a.safetensors")}
    assert found <= {(), ("all zero",)}


def test_the_packed_size_is_the_one_that_export_writes(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 8))
    with torch.no_grad():
        model[0].weight.copy_(scattered(96, 64))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    from pins_ext.sparse.format import save_sparse

    written = save_sparse(model, tmp_path / "sparse")
    before, after = list(survey(tmp_path)), list(survey(tmp_path / "sparse"))
    key = lambda each: each.name  # noqa: E731
    assert sorted(before, key=key) == sorted(after, key=key)
    files = [file for file in (tmp_path / "sparse").iterdir() if file.suffix == ".safetensors"]
    assert 0 <= sum(file.stat().st_size for file in files) - together(before)["packed_bytes"] < 2048, written


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    save_file({"a": dense(4, 4)}, tmp_path / "one.safetensors")
    save_file({"b": dense(4, 4)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "two.safetensors"}}))
    assert [each.name for each in survey(tmp_path)] == ["b"]
    for wrong in ({"weight_map": {"b": "../two.safetensors"}}, {"weight_map": {"b": "three.safetensors"}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(SurveyError, match="lacks"):
            list(survey(tmp_path))
    index.write_text("[]")
    with pytest.raises(SurveyError, match="is no index"):
        list(survey(tmp_path))
    index.unlink()
    assert [each.name for each in survey(tmp_path)] == ["a", "b"]


def test_the_command_prints_draws_and_counts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = checkpoint / "zeros.svg"
    assert main(["inspect", str(checkpoint), "--picture", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "50.00%  130 x 128          float32   b.two_of_four  (2:4 in rows, whole rows and columns)" in said
    assert "WRONG     2 weights are NaN or infinite" in said
    assert "pins-ext export packs it into" in said
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")
    for wrong, reason in (
        (tmp_path, "is a folder: name a file"),
        (tmp_path / "no" / "x.svg", "there is no folder"),
        (tmp_path / "x.png", "must end in .svg"),
    ):
        assert main(["inspect", str(checkpoint), "--picture", str(wrong)]) == 2
        said = capsys.readouterr()
        assert reason in said.err
        assert not said.out
    assert main(["inspect", str(checkpoint / "model.safetensors"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["weights"] == sum(t.numel() for t in TENSORS.values() if t.is_floating_point())
    assert {each["name"]: each["zeros"] for each in told["tensors"]}["e.scattered"] == int(
        (TENSORS["e.scattered"] == 0).sum()
    )


def test_what_can_t_be_read_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.bin").write_bytes(b"pickle")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    for path, reason in (
        ("absent", "there is no"),
        ("model.bin", "is no .safetensors file"),
        ("empty", "holds no .safetensors file"),
        ("broken.safetensors", "can't be read"),
    ):
        assert main(["inspect", str(tmp_path / path)]) == 2
        said = capsys.readouterr().err
        assert reason in said
        assert said.count("\n") == 1


def test_it_needs_no_extra(checkpoint: Path) -> None:
    code = "from pins_ext.cli.main import main; sys.exit(main(sys.argv[1:]))"
    found = run_without(EXTRA_OF, code, "inspect", str(checkpoint))
    assert found.returncode == 0, found.stderr
    assert "sparsity" in found.stdout


def test_an_empty_survey_adds_up() -> None:
    assert together([])["sparsity"] == 0
    assert TensorSurvey("x", (0,), "float32").sparsity == 0


def test_dead_heads(tmp_path: Path) -> None:
    """Rows of the projections into the heads, columns of the one out of them; the other way round in GPT-2."""
    into, out_of, other = dense(16, 16), dense(16, 16), dense(16, 16)
    into[4:12], out_of[:, 12:], other[4:12] = 0, 0, 0
    into[0:3] = 0  # a part of a head
    names = {"attention.self.query": into, "attention.output.dense": out_of, "intermediate.dense": other}
    save_file({f"layer.0.{name}.weight": x.contiguous() for name, x in names.items()}, tmp_path / "model.safetensors")
    found = {each.name: each.dead_heads for each in survey(tmp_path)}
    assert set(found.values()) == {0}  # nobody said how many heads there are
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 16, "num_attention_heads": 4}))
    found = {each.name: each.dead_heads for each in survey(tmp_path)}
    assert found == {
        "layer.0.attention.self.query.weight": 2,
        "layer.0.attention.output.dense.weight": 1,
        "layer.0.intermediate.dense.weight": 0,
    }
    save_file({"h.0.attn.c_attn.weight": into.T.contiguous()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 16, "n_head": 4, "model_type": "gpt2"}))
    assert [each.dead_heads for each in survey(tmp_path)] == [2]


@pytest.mark.parametrize("config", ["", "[1]", '{"hidden_size": "x"}', '{"hidden_size": 8}', "[" * 100_000])
def test_a_config_that_tells_no_heads(tmp_path: Path, config: str) -> None:
    save_file({"attn.q.weight": dense(8, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    assert [each.dead_heads for each in survey(tmp_path)] == [0]


def test_the_expected_speed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--speed", "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    # Matrices with 30 % of their weights gone; no experts, no dense ones.
    measured = {name for trial in speed["trials"] for name in trial["layers"]}
    halves = {name for name, x in TENSORS.items() if x.dim() == 2 and x.numel() and (x == 0).float().mean() >= 0.3}
    assert measured == halves > {"b.two_of_four", "e.scattered"}
    assert all(time > 0 for trial in speed["trials"] for time in (*trial["dense"], *trial["sparse"]))
    # A stall of one measurement does not count for the others of its shape.
    dense = {(tuple(trial["shape"]), tuple(trial["dense"])) for trial in speed["trials"]}
    assert len(dense) == len({shape for shape, _ in dense})
    assert main(["inspect", str(checkpoint), "--speed"]) == 0
    assert "128 tokens:" in capsys.readouterr().out


WATCHED = """
import sys, threading, time
from pathlib import Path
from pins_ext.cli.main import main

most = 0
def watch():
    global most
    while True:
        most = max(most, int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]))
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
code = main(["inspect", sys.argv[1]])
print(most)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_file_larger_than_memory_allows(tmp_path: Path) -> None:
    """4 GB are read in parts: at most 1 GB of memory of the process's own."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 20, 1 << 10], "data_offsets": [0, 1 << 32]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 32))  # zeros that take no room on the disk
    out = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout
    assert "sparsity 100.00%" in out
    assert int(out.split()[-1]) < 1 << 20
