"""One tensor of a sparse checkpoint as plain arrays, and back, exactly.

A sparse tensor of shape [..., columns] is stored by rows (all leading dimensions flattened):

    mask      uint8 [rows, ceil(columns / 8)]   bit j % 8 of byte j // 8: is weight j there; padding bits are zero
    offsets   int64 [rows + 1]                  values of row i are values[offsets[i] : offsets[i + 1]]
    values    [nonzero]                         in the tensor's dtype, or int8 codes: weight = code * scales[row]
    scales    float32 [rows]                    with int8 codes only

A weight is there when its bits differ from those of +0, so that -0.0 and NaN come back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

SPARSE_DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("rows", "dense")

_BITS = {4: torch.int32, 2: torch.int16}
_CODES = 127


class EncodingError(ValueError):
    """Arrays that are no tensor, or a tensor that can't be stored as asked."""


@dataclass(frozen=True)
class Entry:
    """What the index says of one tensor.

    Attributes:
        shape: sizes of the tensor.
        dtype: of the tensor, a key of `DTYPES`.
        layout: "rows" (see above) or "dense" (one array, as it is).
        values: stored dtype of the values: that of the tensor, or "int8" for codes with scales.
        nonzero: weights stored; all of them for a dense layout.
    """

    shape: tuple[int, ...]
    dtype: str
    layout: str
    values: str
    nonzero: int

    def __post_init__(self) -> None:
        ok = (
            all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 40 for n in self.shape)
            and self.dtype in DTYPES
            and self.layout in LAYOUTS
            and isinstance(self.nonzero, int)
            and 0 <= self.nonzero <= prod(self.shape) < 1 << 48
        )
        if ok and self.layout == "rows":
            # An array of no bytes could claim any number of columns.
            ok = len(self.shape) >= 2 and prod(self.shape) > 0
            ok = ok and self.dtype in SPARSE_DTYPES and self.values in (self.dtype, "int8")
        elif ok:
            ok = self.values == self.dtype and self.nonzero == prod(self.shape)
        if not ok:
            raise EncodingError(f"{self} describes no tensor of this format")

    @property
    def rows(self) -> int:
        """All leading dimensions in one."""
        return prod(self.shape[:-1])

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Kind -> (dtype, shape) of the arrays that hold this tensor."""
        if self.layout == "dense":
            return {"dense": (self.dtype, self.shape)}
        held: dict[str, tuple[str, tuple[int, ...]]] = {
            "offsets": ("int64", (self.rows + 1,)),
            "values": (self.values, (self.nonzero,)),
            "mask": ("uint8", (self.rows, -(-self.shape[-1] // 8))),
        }
        return held | ({"scales": ("float32", (self.rows,))} if self.values == "int8" else {})

    @property
    def bytes(self) -> int:
        """Size of the arrays, uncompressed."""
        return sum(DTYPES[dtype].itemsize * prod(shape) for dtype, shape in self.arrays().values())

    @property
    def dense_bytes(self) -> int:
        """Size of the tensor as a dense file would hold it."""
        return DTYPES[self.dtype].itemsize * prod(self.shape)


def plan(tensor: Tensor, codes: bool = False) -> Entry:
    """How a tensor is stored: by rows where that is smaller, otherwise dense.

    Args:
        tensor: any dtype of `DTYPES`, contiguous, on the CPU.
        codes: store the values of a sparse tensor as int8 codes with a scale per row.

    Raises:
        EncodingError: a dtype that the format doesn't hold.
    """
    if tensor.dtype not in NAMES:
        raise EncodingError(f"a sparse checkpoint holds {', '.join(DTYPES)}; this tensor is {tensor.dtype}")
    name, shape = NAMES[tensor.dtype], tuple(tensor.shape)
    dense = Entry(shape, name, "dense", name, tensor.numel())
    if name not in SPARSE_DTYPES or tensor.dim() < 2 or tensor.numel() == 0:
        return dense
    rows = Entry(shape, name, "rows", "int8" if codes else name, int(np.count_nonzero(_present(tensor, codes).numpy())))
    # Compared at full precision: whether a tensor counts as pruned must not depend on how its values are written.
    return rows if Entry(shape, name, "rows", name, rows.nonzero).bytes < dense.bytes else dense


def encode(tensor: Tensor, entry: Entry) -> dict[str, Tensor]:
    """The arrays of a tensor, by kind.

    Args:
        tensor: contiguous, on the CPU.
        entry: its `plan`.

    Raises:
        EncodingError: weights that are infinite or NaN where int8 codes were asked for.
    """
    if entry.layout == "dense":
        return {"dense": tensor}
    matrix = tensor.reshape(entry.rows, entry.shape[-1])
    present = _present(matrix, entry.values == "int8")
    offsets = torch.zeros(entry.rows + 1, dtype=torch.int64)
    torch.cumsum(_counts(present), 0, out=offsets[1:])
    mask = torch.from_numpy(np.packbits(present.numpy(), axis=1, bitorder="little"))
    # NumPy selects by a mask without an index per weight.
    bits = matrix.view(_BITS[matrix.element_size()]).numpy()
    values = torch.from_numpy(bits[present.numpy()]).view(matrix.dtype)
    if entry.values != "int8":
        return {"offsets": offsets, "values": values, "mask": mask}
    scales = row_scales(matrix)
    steps = values.float() / scales.repeat_interleave(offsets.diff())
    codes = steps.round().clamp(-_CODES, _CODES).to(torch.int8)
    return {"offsets": offsets, "values": codes, "mask": mask, "scales": scales}


def refuse_overflow(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse a cast that would make finite numbers infinite.

    Raises:
        ValueError: it would.
    """
    if tensor.numel() and bool((tensor.to(dtype).isinf() & tensor.isfinite()).any()):
        largest = float(tensor[tensor.isfinite()].abs().max())
        wide = largest <= torch.finfo(torch.bfloat16).max
        advice = "use bfloat16" if wide else "keep their own dtype, the default"
        raise ValueError(f"{name} has weights up to {largest:.3g}, which are infinite in {dtype}: {advice}")


def row_scales(matrix: Tensor) -> Tensor:
    """The step of each row's int8 codes: its largest magnitude / 127, and 1 for a row of zeros. float32 [rows].

    Args:
        matrix: floating point [rows, columns].

    Raises:
        EncodingError: infinite or NaN weights.
    """
    if matrix.shape[1] == 0:
        return torch.ones(matrix.shape[0])
    largest = torch.maximum(matrix.amax(dim=1), -matrix.amin(dim=1)).float()
    if not torch.isfinite(largest).all():
        raise EncodingError("infinite or NaN weights have no int8 codes")
    scales = (largest / _CODES).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest == 0, 1.0, scales)


def decode(arrays: Mapping[str, Tensor], entry: Entry) -> Tensor:
    """The tensor that these arrays hold, dense.

    Args:
        arrays: by kind, with the dtypes and shapes of `entry.arrays()`.
        entry: what the index says of it.

    Raises:
        EncodingError: arrays that contradict each other or the entry.
    """
    if entry.layout == "dense":
        return arrays["dense"]
    present = check(arrays, entry)
    dtype = DTYPES[entry.dtype]
    values = arrays["values"]
    if entry.values == "int8":
        values = (values.float() * arrays["scales"].repeat_interleave(arrays["offsets"].diff())).to(dtype)
    bits = _BITS[dtype.itemsize]
    tensor = torch.zeros(entry.rows, entry.shape[-1], dtype=dtype)
    tensor.view(bits).numpy()[present.numpy()] = values.view(bits).numpy()
    return tensor.reshape(entry.shape)


def check(arrays: Mapping[str, Tensor], entry: Entry) -> Tensor:
    """bool [rows, columns] of a tensor stored by rows: which weights are there.

    Args:
        arrays: as for `decode`.
        entry: the same.

    Raises:
        EncodingError: arrays that contradict each other or the entry.
    """
    present = _unpacked(arrays["mask"], entry)
    offsets = arrays["offsets"]
    if offsets[0] != 0 or not torch.equal(offsets.diff(), _counts(present)) or int(offsets[-1]) != entry.nonzero:
        raise EncodingError("its row offsets contradict its mask")
    if entry.values == "int8" and not (torch.isfinite(arrays["scales"]) & (arrays["scales"] > 0)).all():
        raise EncodingError("its scales are not all positive numbers")
    return present


def _present(tensor: Tensor, codes: bool) -> Tensor:
    """bool, the tensor's shape: the weights that are stored. A code has one zero, so -0.0 is none there."""
    return tensor != 0 if codes else tensor.view(_BITS[tensor.element_size()]) != 0


def _counts(present: Tensor) -> Tensor:
    """int64 [rows]: true elements of each row. torch would first make eight bytes of every element."""
    return torch.from_numpy(present.numpy().sum(axis=1, dtype=np.int64))


def _unpacked(mask: Tensor, entry: Entry) -> Tensor:
    """bool [rows, columns] of a packed mask."""
    columns = entry.shape[-1]
    used = torch.full((mask.shape[1],), 255, dtype=torch.uint8)
    if columns % 8:
        used[-1] = (1 << columns % 8) - 1
    if (mask & ~used).any():
        raise EncodingError("its mask has bits beyond the last column")
    bits = np.unpackbits(mask.numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))
