"""2:4 layers handed to torch's kernels: refused in words where there are none, measured where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pins_ext
from pins_ext import reference
from pins_ext.sparse import semi_structured
from pins_ext.sparse.calibration import Trial
from pins_ext.sparse.inference import NothingSparseError
from pins_ext.sparse.semi_structured import two_of_four, verdict


def model() -> nn.Module:
    """Linear layers of 2:4, of other zeros, of none, and a Conv1D of 2:4."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128), nn.Linear(128, 128), Conv1D(64, 128))
    with torch.no_grad():
        made[0].weight *= reference.group_mask(made[0].weight.abs(), 2, 4, -1)
        made[1].weight *= reference.group_mask(made[1].weight.abs(), 4, 8, -1)
        made[3].weight *= reference.group_mask(made[3].weight.abs(), 2, 4, -2)
    return made


def test_on_the_cpu_it_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"2:4 kernels for CUDA alone, and this model is on cpu: move it"):
        pins_ext.to_semi_structured(model())
    with pytest.raises(ValueError, match="tokens must be positive"):
        pins_ext.to_semi_structured(model(), tokens=())


def test_layers_are_2_of_4_along_their_inputs_or_stay_dense_with_a_reason() -> None:
    places, dense = two_of_four(model())
    assert places == ["0", "3"]
    assert dense["1"] == "its zeros are not 2:4 along the inputs"
    assert "zeros" in dense["2"]
    with pytest.raises(NothingSparseError, match='prune with pattern="2:4" first'):
        two_of_four(nn.Sequential(nn.Linear(8, 8)))


def test_the_verdict_says_so_when_it_gains_nothing() -> None:
    trials = [Trial((8, 8), 0.5, (1, 128), (10.0, 100.0), (20.0, 50.0), ("a", "b"))]
    said = verdict(trials, 2)
    assert "2:4 at 1 token: 0.020 ms dense, 0.040 ms 2:4 (0.50 x), no faster than dense: 2:4 gains nothing here" in said
    assert "2:4 at 128 tokens: 0.200 ms dense, 0.100 ms 2:4 (2.00 x), faster than dense" in said
    assert said.endswith("2 layers are 2:4 now")


def test_torchs_format_holds_every_weight_that_is_left() -> None:
    """What torch's conversion keeps of a 2:4 matrix, there and back, is all of it."""
    from torch.sparse import _semi_structured_conversions as torchs

    weight = torch.randn(64, 128).bfloat16()
    weight *= reference.group_mask(weight.float().abs(), 2, 4, -1)
    packed, meta = torchs.sparse_semi_structured_from_dense_cutlass(weight)
    assert packed.shape == (64, 64)
    assert torch.equal(torchs.sparse_semi_structured_to_dense_cutlass(packed, meta), weight)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], tuple[float, float] | RuntimeError]:
    """A device that has 2:4 kernels, by the shapes that it takes: dense and 2:4 times in microseconds, or an error."""
    times: dict[tuple[int, int], tuple[float, float] | RuntimeError] = {}

    def convert(weight: torch.Tensor) -> torch.Tensor:
        if tuple(weight.shape) not in times:
            raise RuntimeError(f"Error original_tensor.shape {tuple(weight.shape)} is not supported!")
        return weight.clone()

    def measured(dense: nn.Module, sparse: nn.Module, inputs: list[torch.Tensor]) -> tuple[tuple[float, ...], ...]:
        torch.testing.assert_close(sparse(inputs[0]), dense(inputs[0]))
        found = times[tuple(sparse.weight.shape)]
        if isinstance(found, RuntimeError):
            raise found
        before, after = found
        return (before,) * len(inputs), (after,) * len(inputs)

    monkeypatch.setattr(semi_structured, "_device", lambda model: torch.device("cpu"))
    monkeypatch.setattr(semi_structured, "measure", measured)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    return times


def test_what_is_handed_over_what_stays_dense_and_what_is_said(
    kernels: dict[tuple[int, int], tuple[float, float] | RuntimeError],
) -> None:
    kernels[256, 128] = 10.0, 40.0
    kernels[64, 128] = 30.0, 10.0
    dense, said = model().eval(), list[str]()
    x = torch.randn(3, 128)
    expected = dense(x)
    found = pins_ext.to_semi_structured(dense, tokens=(7,), say=said.append)
    assert found is dense
    torch.testing.assert_close(found(x), expected)
    assert isinstance(found[3], nn.Linear)
    assert not found[3].weight.requires_grad
    assert "2:4 at 7 tokens: 0.040 ms dense, 0.050 ms 2:4 (0.80 x), no faster than dense: 2:4 gains nothing" in said[-1]
    assert said[-1].endswith("2 layers are 2:4 now")
    only = model()
    before = only[0]
    pins_ext.to_semi_structured(only, tokens=(7,), only_faster=True, say=None)
    assert only[0] is before
    assert isinstance(only[3], nn.Linear)


def test_a_layer_of_two_names_stays_one(
    kernels: dict[tuple[int, int], tuple[float, float] | RuntimeError],
) -> None:
    kernels[256, 128] = 10.0, 5.0
    kernels[64, 128] = 10.0, 5.0
    dense = model().eval()
    dense.again = dense[0]
    said: list[str] = []
    found = pins_ext.to_semi_structured(dense, tokens=(7,), say=said.append)
    assert said[-1].endswith("2 layers are 2:4 now")
    assert found.again is found[0]
    assert not found[0].weight.requires_grad


def test_layers_over_one_weight_share_its_packed_form(
    kernels: dict[tuple[int, int], tuple[float, float] | RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels[256, 128] = 10.0, 5.0
    dense = nn.Sequential(model()[0], nn.Linear(128, 256)).eval()
    dense[1].weight = dense[0].weight
    biases = [layer.bias for layer in dense]
    convert, made = torch.sparse.to_sparse_semi_structured, list[torch.Tensor]()
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: (made.append(w), convert(w))[1])
    said: list[str] = []
    found = pins_ext.to_semi_structured(dense, tokens=(7,), say=said.append)
    assert len(made) == 1
    assert found[0].weight is found[1].weight
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(found, biases, strict=True))
    assert said[-1].endswith("2 layers are 2:4 now")


def test_what_torch_refuses_stays_dense_in_its_words(
    kernels: dict[tuple[int, int], tuple[float, float] | RuntimeError],
) -> None:
    """At the conversion, or only when the first product is asked for: packing needs no kernel of the device."""
    kernels[64, 128] = 30.0, 10.0
    found = pins_ext.to_semi_structured(model(), tokens=(7,), say=None)
    assert found.pins_calibration.dense["0"] == "torch says: Error original_tensor.shape (256, 128) is not supported!"
    kernels[256, 128] = RuntimeError("Supported only on GPUs with\n compute capability 8.x")
    found = pins_ext.to_semi_structured(model(), tokens=(7,), say=None)
    assert found.pins_calibration.dense["0"] == "torch says: Supported only on GPUs with compute capability 8.x"
    kernels[64, 128] = kernels[256, 128]
    with pytest.raises(NothingSparseError, match="takes none of the 2 layers that are 2:4: torch says"):
        pins_ext.to_semi_structured(model(), tokens=(7,), say=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_the_outputs_are_those_of_the_dense_model(dtype: torch.dtype) -> None:
    dense = model().to("cuda", dtype).eval()
    said: list[str] = []
    sparse = pins_ext.to_semi_structured(copy.deepcopy(dense), tokens=(1, 64), say=said.append)
    assert type(sparse[0].weight.data).__name__.startswith("SparseSemiStructured")
    assert "layers are 2:4 now" in said[-1]
    x = torch.randn(4, 64, 128, device="cuda", dtype=dtype)
    # Sums of 128 products in another order, in 8 bits.
    torch.testing.assert_close(sparse(x), dense(x), rtol=2e-2, atol=2e-2)
