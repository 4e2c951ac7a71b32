"""Where a chunk's weights lie: chunk table, pointer table, global indices, and 16-byte access to them.

A program takes chunks in turn and walks each in blocks. The compiler assumes nothing about a pointer read from a table,
so each chunk tests the alignment of all its streams: if all are at 16 bytes, its whole blocks take the VECTOR path,
which promises that alignment. What is left of it, and misaligned chunks, take the masked path in blocks of TAIL.
"""

import triton
import triton.language as tl

from .criterion import (
    NAN_CODE,
    abs_of,
    bf16_above,
    bits_of,
    code_of,
    float_of,
    float_of_bf16,
    float_of_code,
    float_of_fp16,
    float_of_signed_code,
)

CHUNK = tl.constexpr(16384)
ROW = tl.constexpr(14)

TAIL = tl.constexpr(512)
"""Block of the masked path: four weights a thread, so that it needs no more registers than the VECTOR path."""

GROUP = tl.constexpr(32)
GROUP_BYTES = tl.constexpr(34)
"""Of 8-bit storage: a byte for each of 32 weights of a row, and a bfloat16 scale."""

GROUPS = tl.constexpr(16)
"""Groups of a tile, where 8-bit storage is written: as many weights as in a block of TAIL."""


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
    """Elements first .. first + BLOCK_SIZE - 1 of a stream; on the masked path 0 from the `left`-th on.

    Without BLOCK_SIZE those of a tile of groups: `first` and `left` are what `tile_of` says.
    """
    if BLOCK_SIZE is None:
        return tl.load(address.to(tl.pointer_type(ELEMENT)) + first[0], mask=left, other=0)
    else:
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
def load_float(address, first, left, columns, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """float32 of the elements that `load` loads; `columns`: weights of a row, read for 8-bit storage alone."""
    if DTYPE == "uint8" or DTYPE == "int8":
        return load_codes(address, first, left, columns, DTYPE, BLOCK_SIZE, VECTOR)
    else:
        ELEMENT: tl.constexpr = tl.float32 if DTYPE == "float32" else tl.uint16
        return float_from(load(address, first, left, ELEMENT, BLOCK_SIZE, VECTOR), DTYPE)


# ---- 8-bit storage -------------------------------------------------------------------------------


@triton.jit
def columns_of(places_ptr, tensor):
    """Weights of a row of the local tensor, int64."""
    return tl.load(places_ptr + ROW * tensor + 13)


@triton.jit
def decoded(address, group, lane, valid, DTYPE: tl.constexpr):
    """float32 of weights, each by the first byte of its group and its place in it."""
    bytes_ptr = address.to(tl.pointer_type(tl.uint8)) + group
    code = tl.load(bytes_ptr + lane, mask=valid, other=0)
    low = tl.load(bytes_ptr + GROUP, mask=valid, other=0).to(tl.uint32)
    high = tl.load(bytes_ptr + (GROUP + 1), mask=valid, other=0).to(tl.uint32)
    scale = float_of((low << 16) | (high << 24))
    if DTYPE == "int8":
        return float_of_signed_code(code.to(tl.int8, bitcast=True).to(tl.int32), scale)
    else:
        return float_of_code(code.to(tl.int32), scale)


@triton.jit
def load_codes(address, first, left, columns, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """float32 of weights stored in 8 bits: those that `load` would load."""
    if BLOCK_SIZE is None:
        return decoded(address, first[1] + tl.zeros(left.shape, tl.int64), tl.arange(0, GROUP)[None, :], left, DTYPE)
    else:
        row, column = first // columns, first % columns
        steps = tl.arange(0, BLOCK_SIZE).to(tl.uint32)
        wraps = wraps_of(column, columns, steps, 2 * BLOCK_SIZE).to(tl.int64)
        column += steps.to(tl.int64) - wraps * columns
        group = (row + wraps) * ((columns + (GROUP - 1)) // GROUP) + (column >> 5)
        valid = tl.full([BLOCK_SIZE], True, tl.int1) if VECTOR else tl.arange(0, BLOCK_SIZE) < left
        return decoded(address, group * GROUP_BYTES, column & (GROUP - 1), valid, DTYPE)


@triton.jit
def groups_before(columns, i):
    """How many groups of a tensor begin before its local weight i, int64."""
    return i // columns * ((columns + (GROUP - 1)) // GROUP) + (i % columns + (GROUP - 1)) // GROUP


@triton.jit
def tile_of(columns, group, end):
    """The groups group .. group + GROUPS - 1 of a tensor, those before `end`: their weights, and which are there.

    Weights as (local index [GROUPS, 32], first byte of the group [GROUPS, 1], whether the group is there [GROUPS, 1]).
    """
    of_row = (columns + (GROUP - 1)) // GROUP
    row, at = group // of_row, group % of_row
    steps = tl.arange(0, GROUPS)
    wraps = wraps_of(at, of_row, steps.to(tl.uint32), 2 * GROUPS).to(tl.int64)
    column = (at + steps - wraps * of_row) * GROUP
    lane = tl.arange(0, GROUP)
    there = (group + steps < end)[:, None]
    weights = ((row + wraps) * columns + column)[:, None] + lane[None, :]
    first = weights, (group + steps)[:, None] * GROUP_BYTES, there
    return first, (lane[None, :] < (columns - column)[:, None]) & there


@triton.jit
def store_codes(address, first, valid, x, part, VANISHES: tl.constexpr):
    """Store a tile of values in 8 bits without sign; what they are then, float32 [GROUPS, 32]. See code_of."""
    odd = ((bits_of(x) & 0x7FFFFFFF) >= 0x7F800000) | (x < 0.0)
    root = tl.sqrt_rn(abs_of(tl.where(odd, 0.0, x)))
    # Of numbers that are not negative the bits have their order.
    largest = tl.max(tl.where(valid, bits_of(root), 0).to(tl.int32, bitcast=True), 1)
    stored = bf16_above(float_of(largest.to(tl.uint32, bitcast=True)))[:, None]
    scale = float_of(stored << 16)
    code = tl.where(odd, NAN_CODE, code_of(x, root, scale, part, VANISHES))
    bytes_ptr = address.to(tl.pointer_type(tl.uint8)) + first[1]
    tl.store(bytes_ptr + tl.arange(0, GROUP)[None, :], code.to(tl.uint8), mask=valid)
    half = tl.arange(0, 2)[None, :]
    byte = ((stored >> (8 * half).to(tl.uint32)) & 0xFF).to(tl.uint8)
    tl.store(bytes_ptr + (half + GROUP), byte, mask=first[2])
    return float_of_code(code, scale)


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
