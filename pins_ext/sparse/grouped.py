"""The sparse linear layer of a GPU: its weights stay packed in memory, for one token as for many."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pins_ext.ops.grouped import GroupedWeight, grouped_expand, grouped_linear, grouped_pack
from pins_ext.sparse.linear import SparseLinear

MOST_TOKENS = 4
"""Up to here the kernel multiplies packed weights; above, the matrix is expanded for cuBLAS, layer by layer."""

VALUES = ("float32", "bfloat16", "float16")


_SHARED_MEMORY = {(8, 0): 163, (9, 0): 227, (10, 0): 227}
_LEAST_SHARED_MEMORY = 99
"""KiB that a block may have, by compute capability (CUDA C++ Programming Guide, table of technical specifications)."""


class GroupedLinear(SparseLinear):
    """`SparseLinear` for a GPU, in groups of eight weights: 26 bytes for eight of 16 bits.

    One to four tokens are multiplied by the packed weights as they are, where their activations fit in a block's shared
    memory: 58,000 columns on an H100, 25,000 on the smallest. Otherwise the matrix is expanded into memory
    that torch's allocator hands from layer to layer, and multiplied by torch.

    Args:
        weight: float32, bfloat16 or float16 [out, in] with zeros, on the device to run on, in at most 65536.
        bias: [out], or None.
        values: how the weights are kept: "float32", "bfloat16", "float16"; None as they are.
    """

    columns: Tensor
    bases: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None, values: str | None = None) -> None:
        super().__init__(weight, bias, values or str(weight.dtype).removeprefix("torch."))

    def _check(self, values: str) -> None:
        if values not in VALUES:
            raise ValueError(f"on a GPU values must be one of {', '.join(VALUES)}; got {values!r}")

    def _fits(self, device: torch.device) -> bool:
        """Whether the activations of a token, in float32, fit in a GPU's shared memory."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        return 4 * (self.in_features + 1) <= 1024 * _SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY)

    def _pack(self, weight: Tensor) -> None:
        matrix = weight.to("cpu", getattr(torch, self.kind))
        for name, tensor in grouped_pack(matrix.contiguous())._asdict().items():
            self.register_buffer(name, tensor.to(weight.device), persistent=False)
        self._most_tokens = MOST_TOKENS if self._fits(weight.device) else 0

    def multiplied(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], see SparseLinear."""
        packed = GroupedWeight(self.values, self.columns, self.bases, self.starts)
        if x.numel() <= self._most_tokens * self.in_features:
            return grouped_linear(x, packed, self.bias)
        weight = grouped_expand(packed, self.in_features).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
