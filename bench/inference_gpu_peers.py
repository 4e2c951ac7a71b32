"""Linear layers that torch runs on a GPU beside cuBLAS: weights of 4 bits, of 8 bits, and 2:4."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pins_ext.sparse.inference import bias_of, candidates, weight_matrix
from pins_ext.sparse.semi_structured import layer_over, packed, refusal

from .inference_peers import LEAST_SPARSITY, AbsentError, Call

_GROUPS, _TILES = (128, 64, 32), (8, 4, 2)
_FP8 = torch.float8_e4m3fn


class _Quantized(nn.Module, ABC):
    """A linear layer of fewer bits, for bfloat16 activations; models ask it for the dtype of its weight.

    Args:
        shape: of the weight.
        bias: [out], or None.
    """

    def __init__(self, shape: torch.Size, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x: bfloat16 [..., in] -> [..., out]."""
        y = self.product(x.reshape(-1, x.shape[-1]).contiguous())
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out], without the bias."""


class Int4Linear(_Quantized):
    """Weights of 4 bits in groups of inputs: torch's `_weight_int4pack_mm`.

    A weight is (code - 8) * step + middle of its group, rounded to nearest; a group's range has 15 steps.

    Args:
        weight: [out, in], out a multiple of 8 (on the CPU of 16), in of 32.
        bias: [out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        rows, columns = weight.shape
        unit = 16 if weight.device.type == "cpu" else 8
        groups = [size for size in _GROUPS if columns % size == 0]
        if rows % unit or not groups:
            raise AbsentError(f"torch's 4-bit product takes outputs of {unit} and inputs of 32, not {rows} x {columns}")
        self.group = groups[0]
        codes, self.scales = int4_codes(weight, self.group)
        self.packed = packed_int4(codes)

    def product(self, x: Tensor) -> Tensor:
        aten = torch.ops.aten
        multiply = aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else aten._weight_int4pack_mm
        found: Tensor = multiply(x, self.packed, self.group, self.scales)
        return found


def int4_codes(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes 0 to 15, int32 [out, in], and bfloat16 [in / group, out, 2]: step and middle of each group.

    Args:
        weight: [out, in].
        group: inputs that share a step.
    """
    grouped = weight.float().unflatten(1, (-1, group))
    least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    # Rounded as the kernel reads them, before codes are made with them.
    step = ((most - least) / 15).clamp(min=1e-6).bfloat16().float()
    middle = (least + 8 * step).bfloat16().float()
    codes = ((grouped - middle) / step + 8).round().clamp(0, 15).to(torch.int32)
    return codes.flatten(1), torch.cat([step, middle], dim=-1).transpose(0, 1).bfloat16().contiguous()


def packed_int4(codes: Tensor) -> Tensor:
    """Codes [out, in] as the product of their device takes them."""
    if codes.device.type == "cpu":
        on_cpu: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        return on_cpu
    # Two codes a byte, the first one in its upper half; tiles of 16 inputs, as many together as divide them.
    pairs = ((codes[:, ::2] << 4) | codes[:, 1::2]).to(torch.uint8).contiguous()
    tiles = next(n for n in _TILES if codes.shape[1] % (16 * n) == 0)
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    return packed


class Fp8Linear(_Quantized):
    """8-bit floats with a step for each output, and activations with one for each token: torch's `_scaled_mm`.

    Args:
        weight: [out, in], both multiples of 16.
        bias: [out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        rows, columns = weight.shape
        if rows % 16 or columns % 16:
            raise AbsentError(f"torch's product of 8-bit floats takes multiples of 16, not {rows} x {columns}")
        self.codes, steps = fp8_codes(weight)
        self.steps = steps.t().contiguous()

    def product(self, x: Tensor) -> Tensor:
        codes, steps = fp8_codes(x)
        return torch._scaled_mm(codes, self.codes.t(), scale_a=steps, scale_b=self.steps, out_dtype=torch.bfloat16)


def fp8_codes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [rows, columns], and float32 [rows, 1]: the step of each row."""
    steps = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(_FP8).max
    return (matrix.float() / steps).to(_FP8), steps


def two_of_four_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The two larger of every four weights, in torch's 2:4 kernels; of a matrix with other zeros some weights go."""
    if weight.shape[1] % 4:
        raise AbsentError(f"2:4 takes inputs of 4, not {weight.shape[0]} x {weight.shape[1]}")
    return layer_over(packed(two_of_four(weight)), bias)


def two_of_four(weight: Tensor) -> Tensor:
    """[out, in] without the two smaller of every four inputs."""
    fours = weight.unflatten(1, (-1, 4))
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.abs().topk(2, dim=-1).indices, True)
    return fours.masked_fill(~kept, 0).flatten(1)


LAYERS: dict[str, tuple[tuple[int, int], Callable[[Tensor, Tensor | None], nn.Module]]] = {
    "torch int4": ((8, 0), Int4Linear),
    "torch fp8": ((8, 9), Fp8Linear),
    "torch 2:4": ((8, 0), two_of_four_linear),
}
"""Name -> the least compute capability that has kernels for it, and the layer of a bfloat16 weight and bias."""


@contextmanager
def kernels_for(name: str, device: torch.device) -> Iterator[None]:
    """One of `LAYERS` is built and tried inside; what this GPU or this torch refuses is absent, in torch's words.

    Args:
        name: a key of `LAYERS`.
        device: where it is to run.

    Raises:
        AbsentError: it can't.
    """
    least, _ = LAYERS[name]
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < least:
        has, needed = (".".join(map(str, each)) for each in (found, least))
        raise AbsentError(f"{torch.cuda.get_device_name(device)} has compute capability {has}, {needed} is needed")
    try:
        yield
    except AbsentError:
        raise
    # The operators are private to torch: another version may lack them.
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise AbsentError(f"torch {torch.__version__}: {refusal(error)}") from error


def with_layers(model: nn.Module, inputs: dict[str, Tensor], name: str) -> Call:
    """The model in bfloat16, with one of `LAYERS` for each layer that has zeros.

    Raises:
        AbsentError: see `kernels_for`; or the layer does not take the model's shapes.
    """
    own = copy.deepcopy(model).to(torch.bfloat16)
    with kernels_for(name, inputs["input_ids"].device):
        places, _ = candidates(own, LEAST_SPARSITY)
        modules = {place: own.get_submodule(place) for place in places}
        made = {m: LAYERS[name][1](weight_matrix(m).contiguous(), bias_of(m)) for m in dict.fromkeys(modules.values())}
        for place, module in modules.items():
            path, _, leaf = place.rpartition(".")
            own.get_submodule(path)._modules[leaf] = made[module]
        # That there is no kernel may only show now.
        own(**inputs)
    return lambda: own(**inputs)
