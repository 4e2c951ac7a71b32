"""`pins-ext inspect`: what it finds in checkpoints that others made, against counts made by hand."""

from __future__ import annotations

import json
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
    "b.two_of_four": two_of_four(130, 96),
    "c.down": two_of_four(96, 128).T.contiguous(),
    "d.blocks": blocks(128, 96, 16),
    "e.scattered": scattered(300, 200),
    "f.dead": dead(40, 30),
    "g.empty": torch.zeros(8, 8),
    "h.half": scattered(64, 64).bfloat16(),
    "i.experts": torch.stack([two_of_four(12, 16), two_of_four(12, 16)]),
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


def test_the_command_prints_draws_and_counts(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = checkpoint / "zeros.svg"
    assert main(["inspect", str(checkpoint), "--picture", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "50.00%  130 x 96           float32   b.two_of_four  (2:4 in rows, whole rows and columns)" in said
    assert "WRONG     2 weights are NaN or infinite" in said
    assert "pins-ext export packs it into" in said
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")
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
