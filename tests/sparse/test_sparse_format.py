"""Sparse checkpoints: what is saved comes back to the last bit, small, whole or not at all."""

from __future__ import annotations

import copy
import json
import re
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import Network
from helpers.small_models import bert, decoder_config, encoder_folder
from helpers.sparse_models import assert_same, bits, pruned
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, GPT2LMHeadModel, pipeline

from pins_ext import Pruner, reference
from pins_ext.sparse.checkpoint import SparseCheckpoint
from pins_ext.sparse.encoding import Entry, decode, encode, plan, row_scales
from pins_ext.sparse.format import load_sparse, save_sparse
from pins_ext.sparse.index import FILE, Index, SparseFormatError, digest_of, sizes

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(decoder_config()).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 17), (64, 300), (2, 3, 9), (7, 1), (0, 5), (5, 0)])
def test_a_tensor_comes_back_to_the_last_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype) * (torch.rand(shape) < 0.1)
    if tensor.numel() > 8:
        tensor.view(-1)[:5] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-40, -5e-8]).to(dtype)
    entry = plan(tensor)
    arrays = encode(tensor, entry)
    assert {kind: (str(a.dtype)[6:], tuple(a.shape)) for kind, a in arrays.items()} == entry.arrays()
    assert torch.equal(bits(decode(arrays, entry)), bits(tensor))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_come_back_and_weights_within_half_a_step(dtype: torch.dtype) -> None:
    tensor = torch.randn(50, 200).to(dtype) * (torch.rand(50, 200) < 0.1)
    tensor[3] = 0
    tensor[4] = -0.0
    tensor[5] = 1e-41
    entry = plan(tensor, codes=True)
    arrays = encode(tensor, entry)
    assert arrays["values"].dtype == torch.int8
    back = decode(arrays, entry)
    step = row_scales(tensor)[:, None]
    rounding = torch.finfo(dtype).eps * tensor.float().abs() + (5e-8 if dtype == torch.float16 else 0)
    assert ((back.float() - tensor.float()).abs() <= step * (0.5 + 1e-5) + rounding).all()
    assert (back[tensor == 0] == 0).all()
    again = encode(back, plan(back, codes=True))
    if dtype == torch.float32:
        kept = decode({**again}, plan(back, codes=True))
        assert torch.allclose(kept, back, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_model_comes_back_to_the_last_bit(make: Any, dtype: torch.dtype, compression: str, tmp_path: Path) -> None:
    if compression == "zstd":
        pytest.importorskip("zstandard")
    model = pruned(make()).to(dtype)
    report = save_sparse(model, tmp_path / "sparse", compression=compression)
    again = load_sparse(tmp_path / "sparse")
    assert type(again) is type(model)
    assert not again.training
    assert_same(model.state_dict(), again.state_dict())
    ids = torch.randint(3, 40, (2, 7))
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert report["floor"] < report["stored"] < report["dense"]


def test_a_plain_module_is_loaded_into_one_of_its_kind(tmp_path: Path) -> None:
    model = pruned(Network())
    save_sparse(model, tmp_path / "sparse")
    with pytest.raises(SparseFormatError, match="pass it as model="):
        load_sparse(tmp_path / "sparse")
    other = Network()
    assert load_sparse(tmp_path / "sparse", model=other) is other
    assert_same(model.state_dict(), other.state_dict())
    with pytest.raises(SparseFormatError, match=r"doesn't fit Linear: the \w+ lacks"):
        load_sparse(tmp_path / "sparse", model=nn.Linear(3, 3))


def test_patterns_are_recorded_and_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Embedding(64, 64))
    with torch.no_grad():
        model[0].weight *= reference.group_mask(model[0].weight.abs(), 2, 4, -1)
        model[1].weight *= (torch.rand(16, 64) < 0.5).repeat_interleave(4, 0)
        model[2].weight *= torch.rand(64, 64) < 0.5
        model[3].weight *= reference.group_mask(model[3].weight.abs(), 2, 4, -1)
    save_sparse(model, tmp_path / "a")
    patterns = {"0.weight": "2:4", "1.weight": "4x1"}
    assert SparseCheckpoint(tmp_path / "a").index.patterns == patterns
    again = load_sparse(tmp_path / "a", model=copy.deepcopy(model))
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    assert Pruner.from_sparse(again, optimizer).verify()["patterns"] == {"2:4": 1, "4x1": 1}
    body = json.loads((tmp_path / "a" / "pins_sparse.json").read_text())
    assert body["patterns"] == patterns
    for wrong in ({"nobody": "2:4"}, {"0.weight": "4:2"}, {"0.weight": 4}, [1]):
        body["patterns"] = wrong
        body.pop("sha256", None)
        body["sha256"] = digest_of(body)
        (tmp_path / "a" / "pins_sparse.json").write_text(json.dumps(body))
        with pytest.raises(SparseFormatError, match=FILE):
            load_sparse(tmp_path / "a", model=copy.deepcopy(model))


def test_dtype_and_int8_change_what_is_stored_and_nothing_else(tmp_path: Path) -> None:
    model = pruned(bert())
    weights_of = {name: p.detach().clone() for name, p in model.named_parameters()}
    full = save_sparse(model, tmp_path / "full")
    half = save_sparse(model, tmp_path / "half", dtype=torch.bfloat16)
    codes = save_sparse(model, tmp_path / "codes", int8=True)
    assert codes["stored"] < full["stored"]
    assert half["floor"] * 2 == full["floor"]
    assert {p.dtype for p in load_sparse(tmp_path / "half").parameters()} == {torch.bfloat16}
    assert_same(model.to(torch.bfloat16).state_dict(), load_sparse(tmp_path / "half").state_dict())
    arrays = {
        name: found for name, entry, found in SparseCheckpoint(tmp_path / "codes").arrays() if entry.values == "int8"
    }
    assert arrays
    again = load_sparse(tmp_path / "codes").state_dict()
    for name, found in arrays.items():
        weights = again[name]
        expected = found["values"].float() * found["scales"].repeat_interleave(found["offsets"].diff())
        present = torch.from_numpy(
            np.unpackbits(found["mask"].numpy(), axis=1, count=weights.shape[1], bitorder="little")
        ).bool()
        assert torch.equal(weights[present], expected)
        assert not weights[~present].any()
        # The codes and scales that were made of the weights, each of them.
        made = encode(weights_of[name], plan(weights_of[name], True))
        assert found.keys() == made.keys()
        assert all(torch.equal(found[kind], made[kind]) for kind in made)


def test_shards_are_cut_where_they_would_grow_too_large(tmp_path: Path) -> None:
    model = pruned(bert())
    save_sparse(model, tmp_path / "sparse", shard_bytes=8000)
    shards = sorted(tmp_path.glob("sparse/*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"pins_sparse-00001-of-{len(shards):05d}.safetensors"
    index = SparseCheckpoint(tmp_path / "sparse").index
    for shard in shards:
        held = [index.entries[name].bytes for name, place in index.shards.items() if place == shard.name]
        assert sum(held) <= 8000 or len(held) == 1
    assert_same(model.state_dict(), load_sparse(tmp_path / "sparse").state_dict())


def test_other_loaders_refuse_the_folder(tmp_path: Path) -> None:
    """A loader that took the names for its own would set random weights with no more than a warning."""
    save_sparse(pruned(bert()), tmp_path / "sparse")
    with pytest.raises(OSError, match="safetensors"):
        BertForSequenceClassification.from_pretrained(tmp_path / "sparse")
    # transformers would look for a quantizer of that name.
    assert "quantization_config" not in json.loads((tmp_path / "sparse" / "config.json").read_text())


def test_a_tokenizer_travels_along_and_a_pipeline_runs(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(tmp_path / "encoder"))
    config = BertConfig.from_pretrained(tmp_path / "encoder")
    model = pruned(BertForSequenceClassification(config)).eval()
    save_sparse(model, tmp_path / "sparse", tokenizer=tokenizer)
    again = pipeline(
        "text-classification",
        model=load_sparse(tmp_path / "sparse"),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "sparse"),
    )
    assert again("a cab") == pipeline("text-classification", model=model, tokenizer=tokenizer)("a cab")


def test_what_is_in_the_way_is_refused_or_replaced_in_one_piece(tmp_path: Path) -> None:
    place = tmp_path / "sparse"
    model = pruned(bert())
    save_sparse(model, place)
    before = sorted((f.name, f.stat().st_size) for f in place.iterdir())
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_sparse(model, place)
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="infinite or NaN"):
        save_sparse(model, place, int8=True, overwrite=True)
    assert sorted((f.name, f.stat().st_size) for f in place.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["sparse"]
    save_sparse(model, place, overwrite=True)
    assert_same(model.state_dict(), load_sparse(place).state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["sparse"]


def test_the_index_comes_last_and_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pruned(bert())
    save_sparse(first, tmp_path / "sparse")
    expected = {name: tensor.clone() for name, tensor in first.state_dict().items()}

    def disk_full(index: Index, folder: Path, _: str) -> None:
        assert {name: size for name, (size, _) in index.files.items()} == {
            file.name: file.stat().st_size for file in folder.iterdir()
        }
        raise OSError("no space left")

    monkeypatch.setattr(Index, "write", disk_full)
    first.classifier.bias.data += 1
    with pytest.raises(OSError, match="no space left"):
        save_sparse(first, tmp_path / "sparse", overwrite=True)
    assert_same(expected, load_sparse(tmp_path / "sparse").state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["sparse"]


def test_two_threads_save_side_by_side(tmp_path: Path) -> None:
    models = [pruned(bert(), s) for s in (0.5, 0.9)]
    jobs = [threading.Thread(target=save_sparse, args=(m, tmp_path / str(i))) for i, m in enumerate(models)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    for i, model in enumerate(models):
        assert_same(model.state_dict(), load_sparse(tmp_path / str(i)).state_dict())


@pytest.mark.parametrize("overwrite", [True, False])
def test_threads_save_into_one_folder(overwrite: bool, tmp_path: Path) -> None:
    """One of them is there, whole. Without overwrite it is the first, and the others are told."""
    models = [pruned(bert(), s) for s in (0.5, 0.6, 0.7, 0.8, 0.9)]
    barrier = threading.Barrier(len(models))

    def save(model: nn.Module) -> str:
        barrier.wait()
        try:
            save_sparse(model, tmp_path / "sparse", overwrite=overwrite)
        except FileExistsError:
            return "refused"
        return "saved"

    with ThreadPoolExecutor(len(models)) as pool:
        for _ in range(4):
            said = Counter(pool.map(save, models))
            assert said == ({"saved": len(models)} if overwrite else {"saved": 1, "refused": len(models) - 1})
            assert [p.name for p in tmp_path.iterdir()] == ["sparse"]
            found = bits(load_sparse(tmp_path / "sparse").bert.encoder.layer[0].output.dense.weight)
            written = [bits(model.bert.encoder.layer[0].output.dense.weight) for model in models]
            assert sum(torch.equal(found, each) for each in written) == 1
            shutil.rmtree(tmp_path / "sparse")


def test_sizes_count_the_floor_that_unpruned_tensors_set(tmp_path: Path) -> None:
    report = save_sparse(pruned(bert()), tmp_path / "sparse")
    checkpoint = SparseCheckpoint(tmp_path / "sparse")
    assert report == sizes(checkpoint.index)
    tensors = dict(checkpoint.tensors())
    assert report["dense"] == sum(t.numel() * t.element_size() for t in tensors.values())
    rows = {name for name, entry in checkpoint.index.entries.items() if entry.layout == "rows"}
    assert report["weights"] == sum(tensors[name].numel() for name in rows)
    assert report["nonzero"] == sum(int((tensors[name] != 0).sum()) for name in rows)
    headers = 350 * sum(len(entry.arrays()) for entry in checkpoint.index.entries.values())
    assert 0 <= report["on_disk"] - report["stored"] < headers


def reader_of_the_documentation() -> Any:
    text = (ROOT / "docs" / "sparse_format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count("\n") <= 40
    scope: dict[str, Any] = {}
    exec(compile(code, "sparse_format.md", "exec"), scope)
    return scope["load"]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_numpy_reader_of_the_documentation_reads_the_real_files(
    dtype: torch.dtype, int8: bool, tmp_path: Path
) -> None:
    model = pruned(gpt2()).to(dtype)
    save_sparse(model, tmp_path / "sparse", int8=int8, shard_bytes=20_000)
    read = reader_of_the_documentation()(tmp_path / "sparse")
    expected = load_sparse(tmp_path / "sparse").state_dict()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].shape == tuple(tensor.shape)
        # The reader widens bfloat16, which NumPy lacks, to float32: products of codes and scales stay unrounded.
        tolerance = 2**-8 if int8 and dtype == torch.bfloat16 else 0
        wide = (tensor.float() if dtype == torch.bfloat16 else tensor).numpy()
        np.testing.assert_allclose(read[name], wide, rtol=tolerance, atol=0)


def test_the_entry_of_a_tensor_refuses_what_it_can_not_mean() -> None:
    for wrong in [
        {"shape": (3, -1)},
        {"shape": (3, True)},
        {"shape": (1 << 41, 1)},
        {"dtype": "float8"},
        {"layout": "columns"},
        {"values": "int4"},
        {"nonzero": 13},
        {"shape": (0, 1 << 39), "nonzero": 0},
        {"nonzero": -1},
    ]:
        fields: dict[str, Any] = {
            "shape": (3, 4),
            "dtype": "float32",
            "layout": "rows",
            "values": "float32",
            "nonzero": 2,
        }
        Entry(**fields)
        with pytest.raises(ValueError, match="describes no tensor"):
            Entry(**(fields | wrong))
