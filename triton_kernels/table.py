"""The host's side of a launch: checked arguments, table of addresses, grid. Nothing here waits for the device."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATES = (torch.float32, torch.bfloat16, torch.uint8)
FIRST_MOMENTS = (*FLOATS, torch.int8)
SECOND_MOMENTS = (*FLOATS, torch.uint8)
CODED = (torch.uint8, torch.int8)
"""8-bit storage: of every 32 weights of a row their bytes and a bfloat16 scale, [.., groups of a row, 34]."""

MAX_REGISTERS = 80
"""A bound, not a wish: free to choose, ptxas spills a few bytes of some kernels to fit 64, and takes 120 for others."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "maxnreg": MAX_REGISTERS}
"""Of every launch: the threads that count.py reckons with, and one rounding per operation."""

PROGRAMS_PER_MULTIPROCESSOR = 6
"""As many programs of 128 threads as are resident at 80 registers. A program takes every grid-th chunk, so a counting
pass commits once per program, and a pass that is not needed is one wave of empty programs."""

READS_CODED = 168, 3
WRITES_CODED = 255, 2
"""The same two of kernels that read 8-bit storage, and of those that write it: fewer registers would spill."""

CODED_BLOCK_SIZE = 256
"""Their weights at a time: two a thread. Hardly any of their accesses is 16 bytes wide, so more would save nothing."""

INTERPRETED_PROGRAMS = 3


# ---- checks: the words are those of csrc/checks.h ------------------------------------------------


def name_of(dtype: torch.dtype) -> str:
    """How messages and kernels call a dtype: "float32", "bfloat16", "float16"."""
    return str(dtype).removeprefix("torch.")


def check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    """Check that a string argument is one of the allowed ones."""
    if value not in allowed:
        raise RuntimeError(f"{name} must be one of {', '.join(allowed)}; got '{value}'")


def _check(name: str, x: Tensor, dtypes: Sequence[torch.dtype], places: Tensor) -> None:
    if x.device != places.device:
        raise RuntimeError(f"{name} must be on {places.device} like places, got {x.device}")
    if x.dtype not in dtypes:
        raise RuntimeError(f"{name} must be {' or '.join(map(name_of, dtypes))}, got {name_of(x.dtype)}")
    if not x.is_contiguous():
        raise RuntimeError(f"{name} must be contiguous, got strides {x.stride()}")


def check_shape(name: str, x: Tensor | None, dtype: torch.dtype, shape: Sequence[int], places: Tensor) -> None:
    """Check a tensor of known shape, or None."""
    if x is not None:
        _check(name, x, (dtype,), places)
        if x.shape != tuple(shape):
            raise RuntimeError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def check_scalar(name: str, x: Tensor | None, places: Tensor) -> None:
    """Check a float32 scalar, one element of any shape, or None."""
    if x is not None:
        _check(name, x, (torch.float32,), places)
        if x.numel() != 1:
            raise RuntimeError(f"{name} must have one element, got {x.numel()}")


def check_tables(places: Tensor, chunks: Tensor) -> None:
    """Check the shapes of the two tables that every list operator takes."""
    check_shape("places", places, torch.int64, (*places.shape[:1], 14), places)
    check_shape("chunks", chunks, torch.int64, (*chunks.shape[:1], 2), places)


def check_list(name: str, tensors: list[Tensor], dtypes: Sequence[torch.dtype], places: Tensor) -> str:
    """Check a list of one tensor per row of the places, all of one dtype. Its name; "float32" if the list is empty."""
    if len(tensors) != len(places):
        raise RuntimeError(f"{name} must have {len(places)} tensors, one per row of places, got {len(tensors)}")
    device, dtype = places.device, tensors[0].dtype if tensors else torch.float32
    for i, x in enumerate(tensors):
        # One look at the tensors that are right: there may be thousands.
        if x.dtype != dtype or dtype not in dtypes or x.device != device or not x.is_contiguous():
            _check(f"{name}[{i}]", x, dtypes, places)
            raise RuntimeError(f"{name}[{i}] is {name_of(x.dtype)} but {name}[0] is {name_of(dtype)}")
    return name_of(dtype)


def check_coded(name: str, x: Tensor, weights: int) -> None:
    """Check that a tensor is 8-bit storage of so many weights in rows of one length."""
    fits = x.dim() >= 2 and x.shape[-1] == 34
    if fits and weights:
        rows = x.shape[:-2].numel()
        fits = rows > 0 and weights % rows == 0 and -(-weights // rows // 32) == x.shape[-2]
    if not fits:
        raise RuntimeError(
            f"{name} must be [.., groups of a row, 34] for {weights} weights in 8 bits, got {tuple(x.shape)}"
        )


def check_like(name: str, tensors: list[Tensor], like_name: str, like: list[Tensor], *, dtype: bool = True) -> None:
    """Check that a list has the sizes, and the dtype unless not asked, of another; either may be empty."""
    if not tensors or not like:
        return
    if dtype and tensors[0].dtype != like[0].dtype:
        want, got = name_of(like[0].dtype), name_of(tensors[0].dtype)
        raise RuntimeError(f"{name} must have the dtype of {like_name} ({want}), got {got}")
    for i, (x, y) in enumerate(zip(tensors, like, strict=True)):
        if x.dtype in CODED and y.dtype not in CODED:
            check_coded(f"{name}[{i}]", x, y.numel())
        elif y.dtype in CODED and x.dtype not in CODED:
            check_coded(f"{like_name}[{i}]", y, x.numel())
        elif x.numel() != y.numel():
            raise RuntimeError(f"{name}[{i}] must have {y.numel()} elements, got {x.numel()}")


def check_outputs(inputs: dict[str, Tensor | None], outputs: dict[str, list[Tensor] | Tensor]) -> None:
    """Check that what is written shares no memory with the tables and scalars, and that autograd records none of it.

    Args:
        inputs: tables and scalars by name, those that are given.
        outputs: checked tensors and lists of them, by name.
    """
    extents = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, name) for name, x in inputs.items() if x is not None)
    starts = [start for start, _, _ in extents]
    grad_mode = torch.is_grad_enabled()
    for name, xs in outputs.items():
        for i, x in enumerate(xs if isinstance(xs, list) else [xs]):
            begin, size = x.data_ptr(), x.nbytes
            # The last one that starts before this tensor's end; they don't overlap one another.
            before = bisect_left(starts, begin + size) - 1
            if size and before >= 0 and extents[before][1] > begin:
                raise RuntimeError(f"{_item(name, i, xs)} is written and shares memory with {extents[before][2]}")
            if grad_mode and not x.is_leaf:
                raise RuntimeError(
                    f"{_item(name, i, xs)} is the result of operations that autograd records: call this operator under "
                    "torch.no_grad(), or on the leaf tensors"
                )


def _item(name: str, i: int, tensors: list[Tensor] | Tensor) -> str:
    return f"{name}[{i}]" if isinstance(tensors, list) else name


# ---- launches ------------------------------------------------------------------------------------


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def pointer_table(pointers: Tensor | None, places: Tensor, *lists: list[Tensor]) -> Tensor:
    """Addresses int64 [lists, n] on the device, as given or uploaded from pinned memory; the row of an empty list is 0.

    Raises:
        RuntimeError: `pointers` has another shape, or is missing while a CUDA graph is being captured.
    """
    shape = len(lists), len(places)
    if pointers is not None:
        check_shape("pointers", pointers, torch.int64, shape, places)
        return pointers
    rows = [[x.data_ptr() for x in tensors] if tensors else [0] * shape[1] for tensors in lists]
    if places.device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(shape)
    with _on(places.device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "pointers must be given while a CUDA graph is captured: a replay would upload the table from memory "
                "that is no longer its own"
            )
        # The allocator of pinned memory waits for the copy before it hands the same memory out again; we need not.
        table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=True).view(shape)
        return table.to(places.device, non_blocking=True)


def is_coded(constants: Mapping[str, object]) -> bool:
    """Whether a kernel with these compile-time arguments reads or writes 8-bit storage."""
    return any(value in ("uint8", "int8") for value in constants.values())


def shares_of(constants: Mapping[str, object]) -> tuple[int, int]:
    """Registers of a thread, and programs of a multiprocessor, for a kernel with these compile-time arguments."""
    if constants.get("STATE") == "uint8":
        return WRITES_CODED
    return READS_CODED if is_coded(constants) else (MAX_REGISTERS, PROGRAMS_PER_MULTIPROCESSOR)


def options_of(constants: Mapping[str, object]) -> dict[str, Any]:
    """Options of a launch with these compile-time arguments."""
    return OPTIONS | {"maxnreg": shares_of(constants)[0]}


def launch(kernel: Any, places: Tensor, grid: int, *args: object, **constants: Any) -> None:
    """Launch on the tables' device and its current stream."""
    if is_coded(constants):
        constants["BLOCK_SIZE"] = min(constants["BLOCK_SIZE"], CODED_BLOCK_SIZE)
    with _on(places.device):
        kernel[(grid,)](*args, **constants, **options_of(constants))


def launch_chunks(kernel: Any, places: Tensor, chunks: Tensor, *args: object, **constants: object) -> None:
    """Launch programs that share the chunks, if there are any; the numbers of tensors and chunks follow `args`."""
    if not len(chunks):
        return
    programs = INTERPRETED_PROGRAMS
    if places.device.type == "cuda":
        programs = shares_of(constants)[1] * torch.cuda.get_device_properties(places.device).multi_processor_count
    launch(kernel, places, min(len(chunks), programs), *args, len(places), len(chunks), **constants)
