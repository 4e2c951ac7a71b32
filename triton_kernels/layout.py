"""Where a chunk's weights lie: chunk table, pointer table, global indices, and 16-byte access to them.

A program takes chunks in turn and walks each in blocks. The compiler assumes nothing about a pointer read from a table,
so each chunk tests the alignment of all its streams: if all are at 16 bytes, its whole blocks take the VECTOR path,
which promises that alignment. What is left of it, and misaligned chunks, take the masked path in blocks of TAIL.
"""

import triton
import triton.language as tl

from .criterion import float_of_bf16, float_of_fp16

CHUNK = tl.constexpr(16384)
ROW = tl.constexpr(14)

TAIL = tl.constexpr(512)
"""Block of the masked path: four weights a thread, so that it needs no more registers than the VECTOR path."""


# ---- chunks and pointers -------------------------------------------------------------------------


@triton.jit
def chunk_of(chunks_ptr, places_ptr, chunk):
    """Tensor (int64), offset of its first weight (int64) and number of weights (int32) of a chunk."""
    tensor = tl.load(chunks_ptr + 2 * chunk)
    offset = tl.load(chunks_ptr + 2 * chunk + 1)
    local = places_ptr + ROW * tensor + 5
    numel = tl.load(local) * tl.load(local + 1) * tl.load(local + 2) * tl.load(local + 3)
    return tensor, offset, tl.minimum(numel - offset, CHUNK).to(tl.int32)


@triton.jit
def address_of(pointers_ptr, n_tensors, row, tensor):
    """Address of one tensor of the list that is row `row` of the pointer table [k, n]."""
    return tl.load(pointers_ptr + row * n_tensors.to(tl.int64) + tensor)


@triton.jit
def vector_end(addresses, length, BLOCK_SIZE: tl.constexpr):
    """How many of a chunk's weights take the VECTOR path; `addresses` is the bitwise or of its streams' addresses."""
    return tl.where((addresses & 15) == 0, length // BLOCK_SIZE * BLOCK_SIZE, 0)


@triton.jit
def block_ptr(address, first, ELEMENT: tl.constexpr, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to the elements first .. first + BLOCK_SIZE - 1 of a stream; VECTOR: the first is at 16 bytes."""
    start = address.to(tl.pointer_type(ELEMENT)) + first
    if VECTOR:
        start = tl.multiple_of(start, 16)
    return start + tl.arange(0, BLOCK_SIZE)


@triton.jit
def load(address, first, left, ELEMENT: tl.constexpr, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Elements first .. first + BLOCK_SIZE - 1 of a stream; on the masked path 0 from the `left`-th on."""
    pointer = block_ptr(address, first, ELEMENT, BLOCK_SIZE, VECTOR)
    if VECTOR:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=tl.arange(0, BLOCK_SIZE) < left, other=0)


@triton.jit
def store(address, first, left, x, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Write elements first .. first + BLOCK_SIZE - 1 of a stream; on the masked path only `left` of them."""
    pointer = block_ptr(address, first, x.dtype, BLOCK_SIZE, VECTOR)
    if VECTOR:
        tl.store(pointer, x)
    else:
        tl.store(pointer, x, mask=tl.arange(0, BLOCK_SIZE) < left)


@triton.jit
def float_from(x, DTYPE: tl.constexpr):
    """float32 of loaded elements."""
    if DTYPE == "float32":
        return x
    elif DTYPE == "bfloat16":
        return float_of_bf16(x)
    else:
        tl.static_assert(DTYPE == "float16")
        return float_of_fp16(x)


@triton.jit
def load_float(address, first, left, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr):
    ELEMENT: tl.constexpr = tl.float32 if DTYPE == "float32" else tl.uint16
    return float_from(load(address, first, left, ELEMENT, BLOCK_SIZE, VECTOR), DTYPE)


# ---- global indices ------------------------------------------------------------------------------


@triton.jit
def run_of(places_ptr, tensor):
    """Global index of a tensor's first weight if all its full sizes but the last are 1: it is one run; otherwise -1."""
    row = places_ptr + ROW * tensor
    is_run = tl.load(row + 1) * tl.load(row + 2) * tl.load(row + 3) == 1
    return tl.where(is_run, tl.load(row) + tl.load(row + 12), -1)


@triton.jit
def place_of(places_ptr, tensor, origin, local):
    """Place of one local weight: its global index, and its indices in the last three local sizes; all int64.

    Unravel in the local sizes, add the start, ravel in the full sizes. `origin`: what `run_of` says.
    """
    row = places_ptr + ROW * tensor
    if origin >= 0:
        zero = tl.full([], 0, tl.int64)
        place = origin + local, zero, zero, local
    else:
        l1, l2, l3 = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
        i3, rest = local % l3, local // l3
        i2, rest = rest % l2, rest // l2
        i1, i0 = rest % l1, rest // l1
        index = (i0 + tl.load(row + 9)) * tl.load(row + 2) + (i1 + tl.load(row + 10))
        index = (index * tl.load(row + 3) + (i2 + tl.load(row + 11))) * tl.load(row + 4) + (i3 + tl.load(row + 12))
        place = tl.load(row) + index, i1, i2, i3
    return place


@triton.jit
def wraps_of(at, size, steps, LIMIT: tl.constexpr):
    """How often a counter of `size` values wraps within `steps` < LIMIT steps from `at`: (at + steps) // size.

    In 32 bits whatever the size: a counter of LIMIT values or more wraps at most once.
    """
    short = tl.minimum(size, LIMIT).to(tl.uint32)
    return (short - tl.minimum(size - at, LIMIT).to(tl.uint32) + steps) // short


@triton.jit
def walk(places_ptr, tensor, place, steps, LIMIT: tl.constexpr):
    """The places `steps` (uint32, less than LIMIT) local weights on; past the tensor's end, anything."""
    row = places_ptr + ROW * tensor
    index, i1, i2, i3 = place
    f1, f2, f3 = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    l1, l2, l3 = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
    wraps3 = wraps_of(i3, l3, steps, LIMIT)
    wraps2 = wraps_of(i2, l2, wraps3, LIMIT)
    wraps1 = wraps_of(i1, l1, wraps2, LIMIT)
    steps, wraps3, wraps2, wraps1 = steps.to(tl.int64), wraps3.to(tl.int64), wraps2.to(tl.int64), wraps1.to(tl.int64)
    index += steps + wraps3 * (f3 - l3) + wraps2 * (f3 * (f2 - l2)) + wraps1 * (f3 * f2 * (f1 - l1))
    return index, i1 + wraps2 - wraps1 * l1, i2 + wraps3 - wraps2 * l2, i3 + steps - wraps3 * l3


@triton.jit
def run_index(origin, first, BLOCK_SIZE: tl.constexpr):
    """Global indices, int64 [BLOCK_SIZE], of the local weights from `first` on of a run from `origin`."""
    return (origin + first) + tl.arange(0, BLOCK_SIZE)


@triton.jit
def walk_block(places_ptr, tensor, place):
    """Global indices, int64 [TAIL], from a place on, and the place after them."""
    index = walk(places_ptr, tensor, place, tl.arange(0, TAIL).to(tl.uint32), 2 * TAIL)[0]
    return index, walk(places_ptr, tensor, place, tl.full([], TAIL, tl.uint32), 2 * TAIL)


@triton.jit
def local_rank(places_ptr, tensor, index):
    """How many local weights of a tensor have a global index below `index`: the first ones, local order is global."""
    row = places_ptr + ROW * tensor
    rest = tl.maximum(index - tl.load(row), 0)
    full = tl.load(row + 2) * tl.load(row + 3) * tl.load(row + 4)
    local = tl.load(row + 6) * tl.load(row + 7) * tl.load(row + 8)
    rank = tl.full([], 0, tl.int64)
    inside = tl.full([], 1, tl.int64)
    for i in tl.static_range(4):
        at = rest // full - tl.load(row + 9 + i)
        n = tl.load(row + 5 + i)
        rank += inside * tl.minimum(tl.maximum(at, 0), n) * local
        inside = tl.where((at >= 0) & (at < n), inside, 0)
        rest = rest % full
        if i < 3:
            full = full // tl.load(row + 2 + i)
            local = local // tl.load(row + 6 + i)
    return rank
