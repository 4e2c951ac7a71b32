"""Importance: the mean instant score of a window and its running averages, one launch each for a whole model."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..criteria import INSTANT as CRITERIA
from .count import BINS, add_units, commit, count_block, load_bracket, no_tally
from .criterion import (
    bf16_of,
    instant_score,
    next_ipt,
    order_key,
    random_bits,
    score_moments,
    score_of,
    smooth_ipt,
    smooth_unc,
)
from .layout import (
    GROUPS,
    TAIL,
    address_of,
    chunk_of,
    columns_of,
    float_from,
    groups_before,
    load,
    load_float,
    place_of,
    run_index,
    run_of,
    store,
    store_codes,
    tile_of,
    vector_end,
    walk_block,
)
from .table import (
    FIRST_MOMENTS,
    FLOATS,
    SECOND_MOMENTS,
    STATES,
    check_like,
    check_list,
    check_option,
    check_outputs,
    check_scalar,
    check_shape,
    check_tables,
    launch_chunks,
    pointer_table,
)

BLOCK_SIZE = 1024
"""Weights of the VECTOR path at a time: two 16-byte loads per thread and float32 stream. Twice that needs more than the
registers allowed."""


# ---- accumulate ----------------------------------------------------------------------------------


@triton.jit
def _accumulate_block(
    addresses, first, left, index, scalars, grad_scale, clip,
    CRITERION: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    ipt, params, grads = addresses
    n, lr, key0, key1, columns = scalars
    g = load_float(grads, first, left, columns, DTYPE, BLOCK_SIZE, VECTOR)
    if grad_scale is not None:
        g = tl.div_rn(g, grad_scale)
    if clip is not None:
        g = g * clip
    p = g
    if CRITERION != "precomputed":
        p = load_float(params, first, left, columns, DTYPE, BLOCK_SIZE, VECTOR)
    c = instant_score(p, p, g, lr, CRITERION)
    new = next_ipt(load_float(ipt, first, left, columns, STATE, BLOCK_SIZE, VECTOR), c, n, CRITERION)
    if STATE == "uint8":
        store_codes(ipt, first, left, new, 0.5, False)
    else:
        if STATE == "bfloat16":
            new = bf16_of(new, random_bits(index, key0, key1))
        store(ipt, first, left, new, BLOCK_SIZE, VECTOR)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def _accumulate_kernel(
    pointers_ptr, places_ptr, chunks_ptr, lr_ptr, accepted_ptr, rng_ptr, grad_scale_ptr, clip_ptr, found_inf_ptr,
    n_tensors, n_chunks,
    CRITERION: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """ipt = next_ipt(ipt, instant_score(p, p, g / grad_scale clip, lr), accepted). Ren & Zhu 2023.

    Rows of the pointer table: ipt, params, grads.
    """
    end = n_chunks
    if found_inf_ptr is not None:
        end = tl.where(tl.load(found_inf_ptr) != 0, 0, n_chunks)
    n = tl.load(accepted_ptr)
    key0, key1 = tl.load(rng_ptr).to(tl.uint32), tl.load(rng_ptr + 1).to(tl.uint32)
    grad_scale = None if grad_scale_ptr is None else tl.load(grad_scale_ptr)
    clip = None if clip_ptr is None else tl.load(clip_ptr)
    for chunk in range(tl.program_id(0), end, tl.num_programs(0)):
        tensor, offset, length = chunk_of(chunks_ptr, places_ptr, chunk)
        ipt = address_of(pointers_ptr, n_tensors, 0, tensor)
        params = address_of(pointers_ptr, n_tensors, 1, tensor)
        grads = address_of(pointers_ptr, n_tensors, 2, tensor)
        addresses = ipt, params, grads
        columns = columns_of(places_ptr, tensor)
        scalars = n, tl.load(lr_ptr + tensor), key0, key1, columns
        if STATE == "uint8":
            last = groups_before(columns, offset + length)
            for group in range(groups_before(columns, offset), last, GROUPS):
                weights, valid = tile_of(columns, group, last)
                _accumulate_block(
                    addresses, weights, valid, None, scalars, grad_scale, clip, CRITERION, DTYPE, STATE, None, False
                )
        else:
            vectors = vector_end(ipt | params | grads, length, BLOCK_SIZE)
            if STATE == "bfloat16":
                origin = run_of(places_ptr, tensor)
                vectors = tl.where(origin >= 0, vectors, 0)
            for start in range(0, vectors, BLOCK_SIZE):
                index = run_index(origin, offset + start, BLOCK_SIZE) if STATE == "bfloat16" else None
                _accumulate_block(
                    addresses, offset + start, length - start, index, scalars, grad_scale, clip,
                    CRITERION, DTYPE, STATE, BLOCK_SIZE, True,
                )  # fmt: skip
            if STATE == "bfloat16":
                place = place_of(places_ptr, tensor, origin, offset + vectors)
            for start in range(vectors, length, TAIL):
                index = None
                if STATE == "bfloat16":
                    index, place = walk_block(places_ptr, tensor, place)
                _accumulate_block(
                    addresses, offset + start, length - start, index, scalars, grad_scale, clip,
                    CRITERION, DTYPE, STATE, TAIL, False,
                )  # fmt: skip


def accumulate(
    ipt: list[Tensor],
    params: list[Tensor],
    grads: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    lr: Tensor,
    accepted: Tensor,
    rng: Tensor,
    criterion: str,
    *,
    grad_scale: Tensor | None = None,
    clip: Tensor | None = None,
    found_inf: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`pins_ext::accumulate_`: take the gradients of one step into the window's mean score."""
    check_tables(places, chunks)
    check_option("criterion", criterion, CRITERIA)
    state = check_list("ipt", ipt, STATES, places)
    dtype = check_list("grads", grads, FLOATS, places)
    if params:
        check_list("params", params, FLOATS, places)
    elif len(places) and criterion != "precomputed":
        raise RuntimeError(f"params may be empty only for the criterion 'precomputed', got '{criterion}'")
    check_like("grads", grads, "params", params)
    check_like("grads", grads, "ipt", ipt, dtype=False)
    check_shape("lr", lr, torch.float32, (len(places),), places)
    check_shape("rng", rng, torch.int64, (2,), places)
    for name, x in (("accepted", accepted), ("grad_scale", grad_scale), ("clip", clip), ("found_inf", found_inf)):
        check_scalar(name, x, places)
    scalars = {"lr": lr, "accepted": accepted, "rng": rng, "grad_scale": grad_scale, "clip": clip}
    check_outputs({"places": places, "chunks": chunks, **scalars, "found_inf": found_inf}, {"ipt": ipt})
    table = pointer_table(pointers, places, ipt, params, grads)
    launch_chunks(
        _accumulate_kernel, places, chunks, table, places, chunks, lr, accepted, rng, grad_scale, clip, found_inf,
        CRITERION=criterion, DTYPE=dtype, STATE=state, BLOCK_SIZE=BLOCK_SIZE,
    )  # fmt: skip


# ---- fold ----------------------------------------------------------------------------------------


@triton.jit
def _load_average(address, first, left, columns, STATE: tl.constexpr, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """An average as it is stored; of 8-bit storage, float32."""
    if STATE == "uint8":
        return load_float(address, first, left, columns, STATE, BLOCK_SIZE, VECTOR)
    else:
        ELEMENT: tl.constexpr = tl.uint16 if STATE == "bfloat16" else tl.float32
        return load(address, first, left, ELEMENT, BLOCK_SIZE, VECTOR)


@triton.jit
def _plain(x, STATE: tl.constexpr):
    """float32 of what `_load_average` loaded."""
    return x if STATE == "uint8" else float_from(x, STATE)


@triton.jit
def _store_average(
    address, first, left, x, old, bits, accepted,
    STATE: tl.constexpr, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Store an average, unless no gradients were accepted; float32 of what is there then."""
    if STATE == "uint8":
        # The interpreter keeps a scalar comparison as a float, which it can't combine by `&`.
        there = tl.where(accepted, first[2], False)
        part = (bits & 0xFFFF).to(tl.int32).to(tl.float32) * (1.0 / 65536.0)
        new = store_codes(address, (first[0], first[1], there), tl.where(accepted, left, False), x, part, True)
        return tl.where(accepted, new, old)
    else:
        new = bf16_of(x, bits) if STATE == "bfloat16" else x
        if not VECTOR:
            new = tl.where(accepted, new, old)
        store(address, first, left, new, BLOCK_SIZE, VECTOR)
        return float_from(new, STATE)


@triton.jit
def _fold_block(
    addresses, first, left, index, scalars, factors,
    STATE: tl.constexpr, UNC: tl.constexpr, DTYPE: tl.constexpr, MOMENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Fold one block; the order keys of what it stored. The VECTOR path takes it that gradients were accepted."""
    exp_avg_ipt, exp_avg_unc, ipt, exp_avg, exp_avg_sq = addresses
    accepted, beta1, one_minus_beta1, beta2, one_minus_beta2, key0, key1, columns = scalars
    if MOMENT is None:
        x = load_float(ipt, first, left, columns, STATE, BLOCK_SIZE, VECTOR)
    else:
        SECOND: tl.constexpr = "uint8" if MOMENT == "int8" else MOMENT
        p = load_float(ipt, first, left, columns, DTYPE, BLOCK_SIZE, VECTOR)
        mean = load_float(exp_avg, first, left, columns, MOMENT, BLOCK_SIZE, VECTOR)
        square = load_float(exp_avg_sq, first, left, columns, SECOND, BLOCK_SIZE, VECTOR)
        lr, factor, factor_sq = factors
        x = score_moments(p, mean, square, lr, factor, factor_sq)
    # In 8 bits those of all weights: their order stays, and a decay below a step of codes is not lost.
    bits = random_bits(index, key0, key1) if STATE == "bfloat16" else key0
    old = _load_average(exp_avg_ipt, first, left, columns, STATE, BLOCK_SIZE, VECTOR)
    if UNC:
        old_unc = _load_average(exp_avg_unc, first, left, columns, STATE, BLOCK_SIZE, VECTOR)
    mean = smooth_ipt(_plain(old, STATE), x, beta1, one_minus_beta1)
    a = _store_average(exp_avg_ipt, first, left, mean, old, bits, accepted, STATE, BLOCK_SIZE, VECTOR)
    if UNC:
        unc = smooth_unc(_plain(old_unc, STATE), x, mean, beta2, one_minus_beta2)
        bits = bits >> 16
        b = _store_average(exp_avg_unc, first, left, unc, old_unc, bits, accepted, STATE, BLOCK_SIZE, VECTOR)
        return order_key(score_of(a, b, None, "product"))
    else:
        return order_key(score_of(a, x, None, "identity"))


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def _fold_kernel(
    pointers_ptr, places_ptr, chunks_ptr, accepted_ptr, rng_ptr, factors_ptr, bracket_ptr, counts_ptr,
    beta1, one_minus_beta1, beta2, one_minus_beta2, n_tensors, n_chunks,
    STATE: tl.constexpr, UNC: tl.constexpr, DTYPE: tl.constexpr, MOMENT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """exp_avg_ipt = b1 exp_avg_ipt + (1 - b1) ipt; exp_avg_unc = b2 exp_avg_unc + (1 - b2) |ipt - exp_avg_ipt|.

    PLATON (Zhang et al. 2022). With a bracket, counts the order keys of the stored product in the same pass. Rows of
    the pointer table: exp_avg_ipt, exp_avg_unc, ipt; or, with the moments' dtype, params, exp_avg and exp_avg_sq in
    place of ipt, which is then computed from them.
    """
    accepted = tl.load(accepted_ptr) != 0
    key0, key1 = tl.load(rng_ptr).to(tl.uint32), tl.load(rng_ptr + 1).to(tl.uint32)
    end = n_chunks
    if bracket_ptr is None:
        end = tl.where(accepted, n_chunks, 0)
    else:
        bracket = load_bracket(bracket_ptr)
        tally = no_tally()
    for chunk in range(tl.program_id(0), end, tl.num_programs(0)):
        tensor, offset, length = chunk_of(chunks_ptr, places_ptr, chunk)
        exp_avg_ipt = address_of(pointers_ptr, n_tensors, 0, tensor)
        exp_avg_unc = address_of(pointers_ptr, n_tensors, 1, tensor)
        ipt = address_of(pointers_ptr, n_tensors, 2, tensor)
        streams = exp_avg_ipt | exp_avg_unc | ipt
        exp_avg, exp_avg_sq, factors = ipt, ipt, None
        if MOMENT is not None:
            exp_avg = address_of(pointers_ptr, n_tensors, 3, tensor)
            exp_avg_sq = address_of(pointers_ptr, n_tensors, 4, tensor)
            streams = streams | exp_avg | exp_avg_sq
            row = factors_ptr + 3 * tensor
            factors = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        addresses = exp_avg_ipt, exp_avg_unc, ipt, exp_avg, exp_avg_sq
        columns = columns_of(places_ptr, tensor)
        scalars = accepted, beta1, one_minus_beta1, beta2, one_minus_beta2, key0, key1, columns
        if STATE == "uint8":
            last = groups_before(columns, offset + length)
            for group in range(groups_before(columns, offset), last, GROUPS):
                weights, valid = tile_of(columns, group, last)
                key = _fold_block(
                    addresses, weights, valid, None, scalars, factors, STATE, UNC, DTYPE, MOMENT, None, False
                )
                if bracket_ptr is not None:
                    tally = add_units(tally, count_block(key, valid, bracket, counts_ptr, None, None))
        else:
            vectors = tl.where(accepted, vector_end(streams, length, BLOCK_SIZE), 0)
            if STATE == "bfloat16":
                origin = run_of(places_ptr, tensor)
                vectors = tl.where(origin >= 0, vectors, 0)
            units = tl.zeros([BLOCK_SIZE], tl.int32)
            for start in range(0, vectors, BLOCK_SIZE):
                index = run_index(origin, offset + start, BLOCK_SIZE) if STATE == "bfloat16" else None
                key = _fold_block(
                    addresses, offset + start, length - start, index, scalars, factors,
                    STATE, UNC, DTYPE, MOMENT, BLOCK_SIZE, True,
                )  # fmt: skip
                if bracket_ptr is not None:
                    units += count_block(key, length - start, bracket, counts_ptr, BLOCK_SIZE, STATE)
            if bracket_ptr is not None:
                tally = add_units(tally, units)
            if STATE == "bfloat16":
                place = place_of(places_ptr, tensor, origin, offset + vectors)
            for start in range(vectors, length, TAIL):
                index = None
                if STATE == "bfloat16":
                    index, place = walk_block(places_ptr, tensor, place)
                key = _fold_block(
                    addresses, offset + start, length - start, index, scalars, factors,
                    STATE, UNC, DTYPE, MOMENT, TAIL, False,
                )  # fmt: skip
                if bracket_ptr is not None:
                    tally = add_units(tally, count_block(key, length - start, bracket, counts_ptr, TAIL, None))
    if bracket_ptr is not None:
        commit(tally, bracket, counts_ptr)


def fold(
    exp_avg_ipt: list[Tensor],
    exp_avg_unc: list[Tensor],
    ipt: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    accepted: Tensor,
    rng: Tensor,
    beta1: float,
    beta2: float,
    *,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`pins_ext::fold_`: end a window, and count the new scores if a bracket says where."""
    state = _check_fold(exp_avg_ipt, exp_avg_unc, places, chunks, accepted, rng, None, bracket, counts)
    check_list("ipt", ipt, STATES, places)
    check_like("ipt", ipt, "exp_avg_ipt", exp_avg_ipt)
    table = pointer_table(pointers, places, exp_avg_ipt, exp_avg_unc, ipt)
    if bracket is not None and counts is not None:
        counts.mul_(bracket[4])
    launch_chunks(
        _fold_kernel, places, chunks, table, places, chunks, accepted, rng, None, bracket, counts,
        beta1, 1 - beta1, beta2, 1 - beta2,
        STATE=state, UNC=bool(exp_avg_unc), DTYPE=None, MOMENT=None, BLOCK_SIZE=BLOCK_SIZE,
    )  # fmt: skip


def fold_moments(
    exp_avg_ipt: list[Tensor],
    exp_avg_unc: list[Tensor],
    params: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    factors: Tensor,
    accepted: Tensor,
    rng: Tensor,
    beta1: float,
    beta2: float,
    *,
    bracket: Tensor | None = None,
    counts: Tensor | None = None,
    pointers: Tensor | None = None,
) -> None:
    """`pins_ext::fold_moments_`: the same with the score of the optimizer's moments in place of ipt."""
    state = _check_fold(exp_avg_ipt, exp_avg_unc, places, chunks, accepted, rng, factors, bracket, counts)
    dtype = check_list("params", params, FLOATS, places)
    moment = check_list("exp_avg", exp_avg, FIRST_MOMENTS, places)
    second = check_list("exp_avg_sq", exp_avg_sq, SECOND_MOMENTS, places)
    if second != {"int8": "uint8"}.get(moment, moment):
        needs = " needs uint8" if moment == "int8" else ""
        raise RuntimeError(f"exp_avg_sq must have the dtype of exp_avg ({moment}{needs}), got {second}")
    check_like("params", params, "exp_avg_ipt", exp_avg_ipt, dtype=False)
    check_like("exp_avg", exp_avg, "params", params, dtype=False)
    check_like("exp_avg_sq", exp_avg_sq, "params", params, dtype=False)
    check_shape("factors", factors, torch.float32, (len(places), 3), places)
    table = pointer_table(pointers, places, exp_avg_ipt, exp_avg_unc, params, exp_avg, exp_avg_sq)
    if bracket is not None and counts is not None:
        counts.mul_(bracket[4])
    launch_chunks(
        _fold_kernel, places, chunks, table, places, chunks, accepted, rng, factors, bracket, counts,
        beta1, 1 - beta1, beta2, 1 - beta2,
        STATE=state, UNC=bool(exp_avg_unc), DTYPE=dtype, MOMENT=moment, BLOCK_SIZE=BLOCK_SIZE,
    )  # fmt: skip


def _check_fold(
    exp_avg_ipt: list[Tensor],
    exp_avg_unc: list[Tensor],
    places: Tensor,
    chunks: Tensor,
    accepted: Tensor,
    rng: Tensor,
    factors: Tensor | None,
    bracket: Tensor | None,
    counts: Tensor | None,
) -> str:
    """Check what the two have in common; the dtype of the states."""
    check_tables(places, chunks)
    state = check_list("exp_avg_ipt", exp_avg_ipt, STATES, places)
    if exp_avg_unc:
        check_list("exp_avg_unc", exp_avg_unc, STATES, places)
    check_like("exp_avg_unc", exp_avg_unc, "exp_avg_ipt", exp_avg_ipt)
    check_scalar("accepted", accepted, places)
    check_shape("rng", rng, torch.int64, (2,), places)
    check_shape("bracket", bracket, torch.int64, (5,), places)
    check_shape("counts", counts, torch.int64, (1 + BINS,), places)
    if (bracket is None) != (counts is None):
        raise RuntimeError("bracket and counts come together or not at all")
    tables = {"places": places, "chunks": chunks, "accepted": accepted, "rng": rng}
    check_outputs(
        {**tables, "factors": factors, "bracket": bracket},
        {"exp_avg_ipt": exp_avg_ipt, "exp_avg_unc": exp_avg_unc, **({} if counts is None else {"counts": counts})},
    )
    return state
