"""Modules that read the weights of their layers: these stay dense, and where that can't be seen nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from pins_ext import sparsify_for_inference
from pins_ext.sparse.direct_reads import weights_read
from pins_ext.sparse.linear import SparseLinear


class Reads(nn.Module):
    """One of its layers is called, one is read, and one is asked for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.asked = (nn.Linear(64, 64) for _ in range(3))
        self.tied = self.called.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.called(x), self.read.weight, self.read.bias)
        if isinstance(self.asked.weight, Tensor):
            x = x.to(self.asked.weight.dtype)
        result: Tensor = self.asked(x)
        return result


class Inherits(Reads):
    """Its forward is that of its base."""


def pruned(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p[torch.rand_like(p) < 0.9] = 0
    return model.eval()


@pytest.mark.parametrize("kind", [Reads, Inherits])
def test_a_weight_that_is_read_stays_dense(kind: type[nn.Module]) -> None:
    assert weights_read(kind) == {"read"}
    model = pruned(nn.Sequential(kind()))
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = model(x)
        sparse = sparsify_for_inference(model, calibrate=False, say=None)
        assert isinstance(sparse, nn.Module)
        torch.testing.assert_close(sparse(x), before)
    left: Any = sparse
    assert left.pins_calibration.dense == {"0.read": f"{kind.__name__} reads its weight directly"}


def test_a_mixer_that_multiplies_by_a_weight_of_its_layer() -> None:
    model = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, state_size=4))
    pruned(model)
    ids = torch.randint(3, 64, (2, 8))
    with torch.no_grad():
        before = model(ids).logits
        made: Any = sparsify_for_inference(model, calibrate=False, say=None)
        torch.testing.assert_close(made(ids).logits, before)
    assert "backbone.layers.0.mixer.dt_proj" in made.pins_calibration.dense
    assert any(isinstance(module, SparseLinear) for module in made.modules())


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w @ torch.ones(4, 4),
        lambda w: torch.ones(4, 4) @ w,
        lambda w: F.linear(torch.ones(2, 4), w),
        lambda w: torch.einsum("ij,jk", torch.ones(4, 4), w),
        lambda w: w.t(),
        lambda w: w.T,
        lambda w: w.data,
        lambda w: w.float(),
        lambda w: w.to("cpu"),
    ],
)
def test_a_weight_without_data_is_not_computed_with(compute: Callable[[Tensor], Tensor]) -> None:
    weight = SparseLinear(torch.eye(4).bfloat16()).weight
    assert (weight.dtype, weight.device.type, weight.shape, weight.size(1)) == (torch.bfloat16, "meta", (4, 4), 4)
    assert weight.is_floating_point()
    with pytest.raises(RuntimeError, match="has no data: call the layer instead of reading its weight"):
        compute(weight)
