"""Pruned models, what they become for inference, and whether two are the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.sparse.inference import sparsify_for_inference


def pruned(model: nn.Module, sparsity: float = 0.9, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.data[torch.rand(weight.shape, generator=generator) < sparsity] = 0
    return model.eval()


def sparse(model: nn.Module, **options: Any) -> Any:
    """A copy, every pruned layer sparse."""
    return sparsify_for_inference(copy.deepcopy(model), calibrate=False, say=None, **options)


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert torch.equal(bits(a[name]), bits(b[name])), name
