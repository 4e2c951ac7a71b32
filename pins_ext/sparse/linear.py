"""A linear layer that keeps and multiplies only the weights that are not zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pins_ext.ops.sparse import PackedWeight, sparse_linear, sparse_linear_int8, sparse_pack
from pins_ext.sparse.encoding import refuse_overflow, row_scales

VALUES = ("float32", "bfloat16", "int8")

_PACKED = (
    "a model made for inference holds packed weights, which can't be {}: save the model with pins_ext.save_sparse "
    "before pins_ext.sparsify_for_inference, and make it for inference again after loading"
)


class _NoData(Tensor):
    """A weight that tells its shape and dtype, and refuses to be computed with.

    torch 2.13 multiplies a tensor of the meta device by one of the CPU, to whatever lies in memory.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises RuntimeError: for all that is no question of what kind of tensor it is."""
        name = getattr(func, "__name__", "")
        if (getattr(func.__self__, "__name__", "") if name == "__get__" else name) not in _ASKED:
            raise RuntimeError(
                "the weight of a layer made for inference has no data: call the layer instead of reading its weight, "
                "or compute with the model as it was before pins_ext.sparsify_for_inference"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_ASKED = (
    "dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "requires_grad", "is_leaf", "grad_fn", "itemsize", "nbytes", "size", "dim", "numel", "stride", "element_size",
    "is_floating_point", "is_complex", "__len__", "__repr__",
)  # fmt: skip


class _Forward(torch.autograd.Function):
    """A layer's answer where gradients are recorded, and a refusal where they are asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SparseLinear) -> Tensor:
        """What the layer computes of x."""
        return layer.multiplied(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        """Raises RuntimeError: a packed layer has no gradients."""
        raise RuntimeError(
            "a model made for inference has no gradients: compute them with the model as it was before "
            "pins_ext.sparsify_for_inference, or load it again"
        )


class SparseLinear(nn.Module):
    """y = x · weightᵀ + bias over the non-zero weights, on the CPU, for inference only; on a GPU see `GroupedLinear`.

    It can be called from several threads at once. It has no parameters: `weight` tells shape and dtype without data.

    Args:
        weight: floating point [out, in] with zeros.
        bias: [out], or None.
        values: how the weights are kept: "float32", "bfloat16", or "int8" codes with a scale for each row. With codes
            the activations are rounded too, to 255 steps for each token (dynamic quantization).

    Raises:
        ValueError: unknown values, or weights that they would make infinite.

    Attributes:
        in_features: columns of the weight.
        out_features: rows of the weight.
        nonzero: weights that are not zero.
        kind: the `values` above.
        weight: a tensor on the meta device: models ask their layers for its dtype. Computing with it raises
            RuntimeError.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor
    counts: Tensor
    starts: Tensor
    scales: Tensor
    sums: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, values: str = "float32") -> None:
        super().__init__()
        self._check(values)
        weight = weight.detach()
        if values != "int8":
            refuse_overflow("weight", weight, getattr(torch, values))
        self.out_features, self.in_features = weight.shape
        self.nonzero = int(weight.count_nonzero())
        self.kind = values
        self._pack(weight)
        self.register_buffer("bias", _float(bias), persistent=False)
        self._dtype = weight.dtype

    def with_bias(self, bias: Tensor | None) -> SparseLinear:
        """A further layer over the same packed weights, which never change.

        Args:
            bias: its own, [out], or None.
        """
        other = copy.deepcopy(self)
        other.bias = _float(bias)
        return other

    def _check(self, values: str) -> None:
        if values not in VALUES:
            raise ValueError(f"values must be one of {', '.join(VALUES)}; got {values!r}")

    def _pack(self, weight: Tensor) -> None:
        if self.kind == "int8":
            scales = row_scales(weight)
            # A zero has the code 0, whatever the scale.
            matrix = (weight.float() / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
            self.register_buffer("scales", scales, persistent=False)
            self.register_buffer("sums", matrix.sum(dim=1, dtype=torch.int32), persistent=False)
        else:
            matrix = weight.float() if self.kind == "float32" else weight.bfloat16()
        for name, tensor in sparse_pack(matrix.contiguous())._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def bytes(self) -> int:
        """Size of everything that the layer keeps."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight, without data."""
        weight = torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")
        return weight.as_subclass(_NoData)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32, bfloat16 or float16 [..., in] -> [..., out] of the same dtype.

        Raises:
            RuntimeError: x of another width; in backward, always: there are no gradients.
        """
        x = self._accepted(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Forward.apply(x, self)
        return self.multiplied(x)

    def multiplied(self, x: Tensor) -> Tensor:
        """The same of a contiguous x of the right width, without autograd."""
        packed = PackedWeight(self.values, self.columns, self.rows, self.counts, self.starts)
        if self.kind == "int8":
            return sparse_linear_int8(x, packed, self.scales, self.sums, self.bias)
        return sparse_linear(x, packed, self.bias, self.out_features)

    def _accepted(self, x: Tensor) -> Tensor:
        """Contiguous, of the layer's width, and under autocast of the dtype that a dense layer would answer in."""
        if x.shape[-1:] != (self.in_features,):
            # The operators know the packed matrix by its blocks, not by its exact width.
            raise RuntimeError(f"x must be [..., {self.in_features}], as the weight's inputs; got {tuple(x.shape)}")
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        return x.contiguous()

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        sparsity = 1 - self.nonzero / max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={sparsity:.4f}, values={self.kind}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Follow a cast of the model in name: any activations are accepted, and packed weights stay as they are."""
        probe = fn(torch.empty(0, dtype=self._dtype, device=self.starts.device))
        if probe.device.type != self.starts.device.type:
            raise RuntimeError(_PACKED.format(f"moved to {probe.device}"))
        self._dtype = probe.dtype
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse, as where a model ties the weights of its layers."""
        raise RuntimeError(_PACKED.format("replaced or tied"))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise RuntimeError(_PACKED.format("saved"))

    def _load_from_state_dict(self, *args: Any) -> None:
        raise RuntimeError(_PACKED.format("loaded into"))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(_PACKED.format("pickled"))

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLinear:
        """A further layer over the same packed weights, which never change."""
        other = type(self).__new__(type(self))
        nn.Module.__init__(other)
        # Buffers and hooks are added to each layer alone.
        own = {name: copy.copy(value) if isinstance(value, dict | set) else value for name, value in vars(self).items()}
        other.__dict__.update(own)
        memo[id(self)] = other
        return other


def _float(bias: Tensor | None) -> Tensor | None:
    """A copy, float32."""
    return None if bias is None else bias.detach().float().clone()
