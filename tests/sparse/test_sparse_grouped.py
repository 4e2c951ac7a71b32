"""The sparse layer of a GPU, on the CPU's version of its operators and on a GPU."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.sparse_cases import assert_product, pruned
from torch import nn

from pins_ext import ops
from pins_ext.bench import bench_grouped
from pins_ext.bench.inference_gpu_peers import LAYERS
from pins_ext.sparse import inference
from pins_ext.sparse.grouped import MOST_TOKENS, GroupedLinear
from pins_ext.sparse.inference import sparsify_for_inference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_packing_keeps_every_weight_once() -> None:
    for shape in [(1, 1), (7, 300), (20, 9), (3, 65536), (0, 5), (4, 0)]:
        for sparsity in (0.0, 0.5, 0.9, 0.995, 1.0):
            weight = pruned(*shape, sparsity)
            packed = ops.grouped_pack(weight)
            assert packed.values.shape == packed.columns.shape == (packed.bases.numel(), 8)
            assert packed.starts[-1] == packed.bases.numel()
            assert torch.equal(packed.values[packed.values != 0], weight[weight != 0])
            # Full but at the end of a row, and where 256 columns hold fewer than eight.
            least = (weight != 0).sum(1).add(7).div(8, rounding_mode="floor")
            assert (packed.starts.diff() >= least).all()
            if sparsity <= 0.9:
                assert packed.bases.numel() <= 1.1 * int(least.sum()) + 1
            assert torch.equal(ops.grouped_expand(packed, shape[1]), weight)


def test_negative_zero_is_zero() -> None:
    weight = pruned(30, 300, 0.9)
    found = ops.grouped_pack(torch.where(weight == 0, -0.0, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, ops.grouped_pack(weight), strict=True))


def test_zeros_that_fill_up_a_group_stand_where_the_row_has_a_zero() -> None:
    weight = pruned(40, 500, 0.9)
    packed = ops.grouped_pack(weight)
    row = torch.arange(40).repeat_interleave(packed.starts.diff())[:, None].expand(-1, 8)
    column = (packed.bases.long() & 0xFFFF)[:, None] + packed.columns.long()
    filler = packed.values == 0
    beside = F.pad(weight, (0, 1))[row[filler], column[filler]]
    assert filler.any()
    assert not beside.any()


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_memory_is_what_the_documentation_says(sparsity: float) -> None:
    weight = torch.randn(256, 4096).bfloat16()
    weight[torch.rand(weight.shape) < sparsity] = 0
    share = GroupedLinear(weight).bytes / (2 * weight.numel())
    assert share == pytest.approx({0.5: 0.816, 0.8: 0.328, 0.9: 0.166}[sparsity], abs=0.004)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layer_is_the_dense_one(dtype: torch.dtype) -> None:
    weight, bias = pruned(33, 300, 0.9).to(dtype), torch.randn(33).to(dtype)
    layer = GroupedLinear(weight, bias)
    assert layer.kind == str(dtype)[6:]
    for shape in [(1,), (1, 1), (4,), (2, 2), (5,), (3, 40)]:
        x = torch.randn(*shape, 300).to(dtype)
        y = layer(x)
        assert y.shape == (*shape, 33)
        assert y.dtype == dtype
        torch.testing.assert_close(y, F.linear(x, weight, bias))
    assert layer(torch.empty(0, 300, dtype=dtype)).shape == (0, 33)


def test_few_tokens_are_multiplied_packed_and_many_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("grouped_linear", "grouped_expand"):
        original = getattr(ops, name)
        module = "pins_ext.sparse.grouped"
        monkeypatch.setattr(f"{module}.{name}", lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    layer = GroupedLinear(pruned(8, 40, 0.9))
    for tokens in (1, MOST_TOKENS, MOST_TOKENS + 1):
        layer(torch.randn(tokens, 40))
    assert calls == ["grouped_linear", "grouped_linear", "grouped_expand"]
    calls.clear()
    # More columns than the shared memory of the smallest GPU holds.
    GroupedLinear(torch.eye(2, 40000))(torch.randn(1, 40000))
    assert calls == ["grouped_expand"]


def test_it_refuses_what_the_other_sparse_layer_refuses() -> None:
    layer = GroupedLinear(pruned(8, 40, 0.9))
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(layer)
    with pytest.raises(RuntimeError, match="can't be saved"):
        layer.state_dict()
    with pytest.raises(RuntimeError, match="can't be moved to meta"):
        layer.to("meta")
    with pytest.raises(ValueError, match=r"weight has weights up to 1e\+05, which are infinite in torch.float16"):
        GroupedLinear(torch.full((8, 40), 1e5), values="float16")
    with pytest.raises(ValueError, match="on a GPU values must be one of float32, bfloat16, float16; got 'int8'"):
        GroupedLinear(pruned(8, 40, 0.9), values="int8")
    assert layer.half().weight.dtype == torch.float16
    x = torch.randn(2, 40)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_activations_of_another_width_are_refused() -> None:
    """A kernel would read beyond the tokens in shared memory."""
    layer = GroupedLinear(pruned(8, 40, 0.9))
    for tokens in (1, 20):
        with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 40\], as the weight's inputs"):
            layer(torch.randn(tokens, 39))


def test_under_autocast_the_answer_has_the_dtype_of_the_dense_one() -> None:
    layer = GroupedLinear(pruned(8, 40, 0.9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [layer(torch.randn(tokens, 40)).dtype for tokens in (1, 20)] == [torch.bfloat16] * 2


def test_a_model_on_several_devices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match="this one is on cpu, meta: move it"):
        sparsify_for_inference(model)


def test_a_model_of_grouped_layers_answers_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model on a GPU becomes, made on the CPU."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 9)).eval()
    for p in model.parameters():
        p.data[torch.rand(p.shape) < 0.9] = 0
    fast = copy.deepcopy(model)
    monkeypatch.setattr(inference, "_sparse", lambda m, v: GroupedLinear(m.weight, m.bias, v))
    sparsify_for_inference(fast, calibrate=False, say=None)
    assert [type(m) for m in fast] == [GroupedLinear, nn.ReLU, GroupedLinear]
    for tokens in (1, 3, 50):
        x = torch.randn(tokens, 40)
        torch.testing.assert_close(fast(x), model(x))


def test_weights_that_16_bits_make_infinite_are_refused_before_anything_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = nn.Sequential(nn.Linear(40, 70), nn.Linear(70, 9)).train()
    for p in model.parameters():
        p.data[torch.rand(p.shape) < 0.9] = 0
    model[1].weight.data[0, 0] = 1e5
    monkeypatch.setattr(inference, "VALUES", inference.GPU_VALUES)
    monkeypatch.setattr(inference, "_sparse", lambda m, v: GroupedLinear(m.weight, m.bias, v))
    with pytest.raises(
        ValueError, match=r"1 has weights up to 1e\+05, which are infinite in torch.float16: use bfloat16"
    ):
        sparsify_for_inference(model, values="float16", calibrate=False, say=None)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert model.training


def test_triton_gives_the_dense_product(device: str) -> None:
    """The fallback of builds without CUDA C++, called by name: a build with it does not register it."""
    from pins_ext import triton_kernels

    assert "grouped_linear" in triton_kernels.FALLBACKS
    for shape in [(1, 1), (3, 9), (5, 300), (2, 9000)]:
        for i, sparsity in enumerate((0.0, 0.5, 0.9, 1.0)):
            weight = pruned(*shape, sparsity).to(DTYPES[(i + shape[0]) % 3])
            packed = [t.to(device) for t in ops.grouped_pack(weight)]
            for tokens in (1, 3, 5):
                x = torch.randn(tokens, shape[1]).to(DTYPES[tokens % 3])
                bias = torch.randn(shape[0]) if tokens != 3 else None
                on_device = None if bias is None else bias.to(device)
                y = triton_kernels.launcher("grouped_linear")(x.to(device), *packed, on_device)
                assert_product(y.cpu(), x, weight, bias)


def test_triton_refuses_what_does_not_fit(device: str) -> None:
    from pins_ext import triton_kernels

    packed = [t.to(device) for t in ops.grouped_pack(pruned(5, 40, 0.5))]
    call = triton_kernels.launcher("grouped_linear")
    with pytest.raises(RuntimeError, match=r"bias must be torch.float32 \(5,\)"):
        call(torch.randn(1, 40, device=device), *packed, torch.ones(6, device=device))
    with pytest.raises(RuntimeError, match="x and values must be float32, bfloat16 or float16"):
        call(torch.ones(1, 40, dtype=torch.float64, device=device), *packed, None)


@pytest.mark.gpu
def test_a_model_on_a_gpu() -> None:
    model = nn.Sequential(nn.Linear(512, 1100), nn.ReLU(), nn.Linear(1100, 512)).to("cuda", torch.bfloat16).eval()
    for p in model.parameters():
        p.data[torch.rand_like(p) < 0.9] = 0
    fast: Any = sparsify_for_inference(copy.deepcopy(model), calibrate=False, say=None)
    assert isinstance(fast[0], GroupedLinear)
    for tokens in (1, 2, 3, 4, 5, 300):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        graph = torch.cuda.CUDAGraph()
        fast(x)
        with torch.cuda.graph(graph):
            y = fast(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, model(x), rtol=2e-2, atol=2e-2)
    measured: Any = sparsify_for_inference(copy.deepcopy(model), say=None)
    assert measured.pins_calibration.machine == torch.cuda.get_device_name()


def test_the_benchmark_runs(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "decode.json"
    assert bench_grouped.main(["--device", "cpu", "--shrink", "64", "--rounds", "2", "--json", str(file)]) == 0
    _head, first, verdict, *others = capsys.readouterr().out.splitlines()
    # What decides about the kernel is known first.
    assert first.split()[:2] == ["80%", "1"]
    assert verdict.startswith("80 %, one token: ")
    peers = [line for line in others if line.lstrip().startswith("torch ")]
    assert "torch's of fewer bits and 2:4, beside cuBLAS, all at 50% zeros" in others
    assert len(others) - len(peers) == 3 * 4
    found = json.loads(file.read_text())
    assert [(row["sparsity"], row["tokens"]) for row in found["rows"][:5]] == [
        (0.8, 1), (0.8, 2), (0.8, 4), (0.8, 128), (0.5, 1)
    ]  # fmt: skip
    # 172 outputs are no multiple of 16, and a CPU has no 2:4 kernels.
    assert {row["name"]: "absent" in row for row in found["peers"]} == dict.fromkeys(LAYERS, True)
    assert "not 172 x 64" in next(line for line in peers if "torch fp8" in line)
    assert "torch says" in next(line for line in peers if "torch 2:4" in line)


def test_peers_are_compared_at_their_own_sparsity(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"sparsity": s, "tokens": 1, "cublas_us": us, "ours_us": 1.0, "ratio": us, "bytes": 1.0, "gb_per_s": 1.0}
        for s, us in ((0.8, 3.0), (0.5, 10.0), (0.9, 7.0))
    ]
    monkeypatch.setattr(bench_grouped, "compared", lambda *_: iter(rows))
    monkeypatch.setattr(bench_grouped, "peer", lambda name, *_: [{"name": name, "tokens": 1, "us": 5.0}])
    assert bench_grouped.main(["--device", "cpu"]) == 0
    found = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("torch ")]
    assert found == ["2.00"] * len(LAYERS)
