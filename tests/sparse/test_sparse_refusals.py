"""What sparse checkpoints don't hold, and models that they don't fit: refused in words, and nothing changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import bert
from helpers.sparse_models import assert_same, pruned
from torch import Tensor, nn

from pins_ext.files.atomic import sha256
from pins_ext.sparse.checkpoint import SparseCheckpoint
from pins_ext.sparse.format import load_sparse, save_sparse
from pins_ext.sparse.index import FILE, SparseFormatError, digest_of


def test_weights_that_a_smaller_dtype_makes_infinite_are_refused(tmp_path: Path) -> None:
    model = pruned(bert())
    model.classifier.weight.data[0, 0] = -1e6
    with pytest.raises(
        ValueError, match=r"classifier.weight has weights up to 1e\+06, which are infinite in torch.float16"
    ):
        save_sparse(model, tmp_path / "a", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    model.classifier.weight.data[0, 0] = torch.inf
    save_sparse(model, tmp_path / "a", dtype=torch.float16)
    save_sparse(model, tmp_path / "b", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("own", "dtype", "advice"),
    [
        (torch.float32, torch.bfloat16, "keep their own dtype"),
        (torch.float64, torch.float32, "keep their own dtype"),
        (torch.float64, torch.float16, "keep their own dtype"),
        (torch.float16, torch.float16, None),
    ],
)
def test_what_a_cast_makes_infinite_is_kept_by_a_dtype_that_holds_it(
    own: torch.dtype, dtype: torch.dtype, advice: str | None, tmp_path: Path
) -> None:
    layer = nn.Linear(3, 3, dtype=own)
    layer.weight.data[0, 0] = torch.finfo(own).max
    if advice is None:
        save_sparse(layer, tmp_path / "a", dtype=dtype)
        return
    with pytest.raises(ValueError, match=f"infinite in {dtype}: {advice}"):
        save_sparse(layer, tmp_path / "a", dtype=dtype)
    save_sparse(layer, tmp_path / "a")


@pytest.mark.parametrize("shard_bytes", [0, -1, "2GB", 1.5])
def test_shards_without_room_are_refused(shard_bytes: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard_bytes must be a number of bytes, at least 1; got"):
        save_sparse(nn.Linear(3, 3), tmp_path / "a", shard_bytes=shard_bytes)


def test_a_configuration_that_transformers_refuses(tmp_path: Path) -> None:
    """Its code is never run."""
    save_sparse(pruned(bert()), tmp_path / "sparse")
    file = tmp_path / "sparse" / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "sparse" / "mine.py").write_text("raise SystemExit('was run')")
    for text in (json.dumps(config), json.dumps({"model_type": "no such"}), "{"):
        file.write_text(text)
        body = json.loads((tmp_path / "sparse" / FILE).read_text())
        body.pop("sha256")
        body["files"]["config.json"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        (tmp_path / "sparse" / FILE).write_text(json.dumps(body | {"sha256": digest_of(body)}))
        with pytest.raises(SparseFormatError, match=r"config.json can't be read: "):
            load_sparse(tmp_path / "sparse")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"architectures": [3]}, r"names \[3\] as its class"),
        ({"architectures": ["GPT2Model"]}, "makes no GPT2Model"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "nope"}, "makes no Bert"),
        ({"hidden_size": -4}, "makes no Bert"),
        ({"dtype": "nope"}, "config.json"),
        ({"num_hidden_layers": "x"}, "can't be read"),
        ({"vocab_size": 10**12}, "makes no Bert"),
    ],
)
def test_a_configuration_that_makes_no_model(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_sparse(pruned(bert()), tmp_path / "sparse")
    file, index = tmp_path / "sparse" / "config.json", tmp_path / "sparse" / FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    body = json.loads(index.read_text())
    body.pop("sha256")
    body["files"]["config.json"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    index.write_text(json.dumps(body | {"sha256": digest_of(body)}))
    with pytest.raises(SparseFormatError, match=message):
        load_sparse(tmp_path / "sparse")


def test_a_stored_shape_that_does_not_fit_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    save_sparse(pruned(nn.Linear(40, 30)), tmp_path / "sparse")
    other = nn.Linear(30, 40)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(SparseFormatError, match=r"is \(30,\), the model has \(40,\)"):
        load_sparse(tmp_path / "sparse", model=other)
    assert_same(before, other.state_dict())


def test_options_that_the_format_does_not_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compression must be one of none, zstd; got 'gzip'"):
        save_sparse(nn.Linear(3, 3), tmp_path / "a", compression="gzip")
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32"):
        save_sparse(nn.Linear(3, 3), tmp_path / "a", dtype=torch.float64)
    held = nn.Linear(3, 3)
    held.weight = nn.Parameter(held.weight.data.to_sparse_csr(), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"weight is a torch\.sparse_csr tensor on cpu, which this format doesn't hold"
    ):
        save_sparse(held, tmp_path / "a")
    with pytest.raises(ValueError, match=r"weight: a sparse checkpoint holds .*complex64"):
        save_sparse(nn.Linear(3, 3, dtype=torch.complex64), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_unknown_version_names_what_is_known(tmp_path: Path) -> None:
    save_sparse(nn.Linear(3, 3), tmp_path / "sparse")
    index = tmp_path / "sparse" / FILE
    index.write_text(json.dumps(json.loads(index.read_text()) | {"version": 2}))
    with pytest.raises(SparseFormatError, match="version 2; this software reads pins_sparse version 1"):
        SparseCheckpoint(tmp_path / "sparse")


class Extra(nn.Linear):
    """A layer with a tensor that is neither parameter nor buffer."""

    def get_extra_state(self) -> Tensor:
        return torch.ones(3)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError("nothing was saved")


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        (
            "an extra state",
            nn.Sequential(Extra(3, 3)),
            r"0\._extra_state is what .* get_extra_state\(\) returns",
        ),
        ("a name", nn.ParameterDict({"__metadata__": torch.ones(3)}), "__metadata__: such names belong to the format"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(name: str, model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_sparse(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_nothing_is_loaded_into_a_model_without_memory(tmp_path: Path) -> None:
    layer = pruned(nn.Linear(40, 30))
    save_sparse(layer, tmp_path / "sparse")
    empty = nn.Linear(40, 30, device="meta")
    with pytest.raises(SparseFormatError, match=r"'bias' of the model is on the meta device.*\(2 tensors\).*to_empty"):
        load_sparse(tmp_path / "sparse", model=empty)
    load_sparse(tmp_path / "sparse", model=empty.to_empty(device="cpu"))
    assert_same(layer.state_dict(), empty.state_dict())
