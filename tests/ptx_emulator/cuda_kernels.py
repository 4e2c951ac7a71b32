"""csrc/cuda from nvcc's PTX: its operators on CPU tensors, launched as their host code does."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import module
from .launch import BUILD, built
from .session import SESSION, Ranges, extent

ROOT = Path(__file__).parents[2]
CRITERIA = ("pins", "pins-signed", "pins-update", "platon", "movement", "precomputed")
NAMES = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
KINDS = [*NAMES, torch.uint8, torch.int8]  # csrc/cuda/update_coded.cuh Kind
THREADS = 128
GROUPED_THREADS = 512  # csrc/cuda/grouped.cu kThreads
GROUPED_BLOCKS = 2
CANDIDATES = 16384  # csrc/cuda/boundary.cuh kCandidates
ADDRESSES = 500  # csrc/cuda/pointers.cuh Addresses::kCount

Key = tuple[str, ...]
"""A kernel and its template arguments: "update_kernel", "AdamWStep", "float", "BFloat16"."""


@cache
def compiled(capability: int) -> dict[Key, module.Entry]:
    """The kernels of update.cu, boundary.cu, norm.cu and grouped.cu."""
    nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is missing: csrc/cuda cannot be compiled")
    include = Path(torch.__file__).parent / "include"
    # As setup.py compiles it.
    flags = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler", "-fvisibility=hidden", f"-arch=compute_{capability}"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{include}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [p for p in (ROOT / "csrc").rglob("*.*") if "cpu" not in p.parts]
    entries: dict[str, module.Entry] = {}
    stems = ["update", "boundary", "norm", "grouped"]
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579":
        stems.reverse()  # each of two processes compiles what the other has not begun
    for stem in stems:
        ptx = built(f"{stem}-{capability}.ptx", sources, [nvcc, *flags, "-ptx", f"csrc/cuda/{stem}.cu"], ROOT)
        entries |= module.entries(ptx.read_text())
    names = subprocess.run(["c++filt"], input="\n".join(entries), capture_output=True, text=True, check=True).stdout
    return {_key(name): entry for entry, name in zip(entries.values(), names.split("\n"), strict=False)}


def _key(demangled: str) -> Key:
    m = re.search(r"(\w+_kernel)(?:<(.*?)>)?\(", demangled)
    assert m, demangled
    return (m[1], *(t.split("::")[-1].strip() for t in (m[2] or "").split(",") if t))


class CudaKernels:
    """The operators of csrc/cuda on an architecture, for CPU tensors.

    The checks of the host code are not made here.
    """

    def __init__(self, capability: int) -> None:
        self.entries = compiled(capability)

    def register(self, library: torch.library.Library) -> None:
        """Make them the CPU's."""
        operators = (
            "masked_adamw_",
            "masked_sgd_",
            "boundary_adamw_",
            "boundary_sgd_",
            "apply_mask_",
            "sum_of_squares",
            "grouped_linear",
            "grouped_expand",
        )
        for op in operators:
            library.impl(op, getattr(self, op), "CPU", allow_override=True)

    def _launch(
        self, key: Key, parameters: bytes, blocks: int, threads: int, ranges: Ranges, shared: int = 0,
        free: Sequence[tuple[int, int]] = (),
    ) -> None:  # fmt: skip
        SESSION.run(
            " ".join(key), (), self.entries[key], parameters, (blocks, 1, 1), threads, shared, ranges, free=free
        )

    def _table(self, n: int, lists: list[list[Tensor]], pointers: Tensor | None) -> Tensor:
        """pointers.cuh pointer_table: the kernel that writes it runs, too."""
        if pointers is not None:
            assert pointers.shape == (len(lists), n)
            return pointers
        addresses = [a for tensors in lists for a in ([x.data_ptr() for x in tensors] or [0] * n)]
        table = torch.empty(len(lists), n, dtype=torch.int64)
        for first in range(0, len(addresses), ADDRESSES):
            part = addresses[first : first + ADDRESSES]
            blob = struct.pack(f"<{ADDRESSES}q", *part, *[0] * (ADDRESSES - len(part)))
            blob += struct.pack("<Qi", table.data_ptr() + 8 * first, len(part))
            self._launch(("write_addresses_kernel",), blob, 1, 256, [extent(table)])
        return table

    def _arguments(
        self, lists: list[list[Tensor]], *call: Any, pointers: Tensor | None
    ) -> tuple[bytes, Ranges, Tensor]:
        """update.cuh UpdateArguments, the memory that it leads to, and the table, which must outlive the launch."""
        places, chunks, hyper, accepted, rng, criterion, clear_state, grad_scale, clip, found_inf = call
        table = self._table(len(places), lists, pointers)
        scalars = [hyper, accepted, rng, grad_scale, clip, found_inf]
        blob = struct.pack("<QqQQ", table.data_ptr(), len(places), places.data_ptr(), chunks.data_ptr())
        blob += struct.pack("<6Q", *(0 if x is None else x.data_ptr() for x in scalars))
        given = sum(bool(tensors) << k for k, tensors in enumerate(lists))
        blob += struct.pack("<Ii?7x", given, CRITERIA.index(criterion), clear_state)
        ranges = [extent(x) for x in (table, places, chunks, *scalars) if x is not None]
        return blob, ranges + [extent(x) for tensors in lists for x in tensors], table

    def _update(self, step: str, lists: list[list[Tensor]], *call: Any, pointers: Tensor | None) -> None:
        chunks, params, ipt = call[1], lists[0], lists[-4]
        if not len(chunks):
            return
        blob, ranges, _table = self._arguments(lists, *call, pointers=pointers)
        state = "BFloat16" if ipt and ipt[0].dtype == torch.bfloat16 else "float"
        moments = lists[1][0].dtype if lists[1] else params[0].dtype
        stored = [params[0].dtype, ipt[0].dtype if ipt else torch.float32, moments]
        stored.append(torch.uint8 if moments == torch.int8 else moments)
        if not {torch.uint8, torch.int8}.isdisjoint(stored):
            blob += struct.pack("<4i", *map(KINDS.index, stored))  # update_coded.cuh Stored
            self._launch(("coded_update_kernel", step), blob, len(chunks), THREADS, ranges)
            return
        key = ("update_kernel", step, NAMES[params[0].dtype], state, NAMES[moments])
        self._launch(key, blob, len(chunks), THREADS, ranges)

    def masked_adamw_(
        self, params: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], ipt: list[Tensor],
        shadow: list[Tensor], grads: list[Tensor], masks: list[Tensor], places: Tensor, chunks: Tensor, hyper: Tensor,
        accepted: Tensor, rng: Tensor, criterion: str, clear_state: bool = False, *, grad_scale: Tensor | None = None,
        clip: Tensor | None = None, found_inf: Tensor | None = None, pointers: Tensor | None = None,
    ) -> None:  # fmt: skip
        lists = [params, exp_avg, exp_avg_sq, ipt, shadow, grads, masks]
        scalars = (hyper, accepted, rng, criterion, clear_state, grad_scale, clip, found_inf)
        self._update("AdamWStep", lists, places, chunks, *scalars, pointers=pointers)

    def masked_sgd_(
        self, params: list[Tensor], momentum_buffer: list[Tensor], ipt: list[Tensor], shadow: list[Tensor],
        grads: list[Tensor], masks: list[Tensor], places: Tensor, chunks: Tensor, hyper: Tensor, accepted: Tensor,
        rng: Tensor, criterion: str, clear_state: bool = False, *, grad_scale: Tensor | None = None,
        clip: Tensor | None = None, found_inf: Tensor | None = None, pointers: Tensor | None = None,
    ) -> None:  # fmt: skip
        lists = [params, momentum_buffer, ipt, shadow, grads, masks]
        scalars = (hyper, accepted, rng, criterion, clear_state, grad_scale, clip, found_inf)
        self._update("SgdStep", lists, places, chunks, *scalars, pointers=pointers)

    def _boundary(
        self, step: str, lists: list[list[Tensor]], *call: Any, around: Tensor | None, stats: Tensor | None,
        threshold: Tensor | None, fold_rng: Tensor | None, beta1: float, beta2: float, bracket: Tensor | None,
        counts: Tensor | None, pointers: Tensor | None,
    ) -> None:  # fmt: skip
        chunks, clear_state = call[1], call[6]
        blob, ranges, _table = self._arguments(lists, *call, pointers=pointers)
        # What is on the device already need not be zero.
        candidates = None if around is None else torch.full((1 + 4 * CANDIDATES,), -1)
        for written, count in ((candidates, 1), (stats, None), (counts, None)):
            if written is not None:
                written.view(-1)[:count] = 0
        given = (around, stats, threshold, candidates, fold_rng)
        blob += struct.pack("<5Q", *(0 if x is None else x.data_ptr() for x in given))
        blob += struct.pack("<4f", beta1, 1 - beta1, beta2, 1 - beta2)
        blob += struct.pack("<2Q", *(0 if x is None else x.data_ptr() for x in (bracket, counts)))
        # Blocks append to the candidates as they come.
        free = [] if candidates is None else [extent(candidates[1:])]
        others = (around, stats, threshold, fold_rng, bracket, counts, None if candidates is None else candidates[:1])
        ranges += [*free, *(extent(x) for x in others if x is not None)]
        params, first = lists[0], lists[1]
        moments = first[0].dtype if first else params[0].dtype if params else torch.float32
        if len(chunks):
            state = NAMES[lists[-2][0].dtype]
            key = ("boundary_kernel", step, NAMES[params[0].dtype], state, NAMES[moments])
            self._launch(key, blob, len(chunks), THREADS, ranges, free=free)
        if around is not None:
            cleared = (len(lists) - 7) if clear_state and first else 0
            sizes = (params[0].element_size() if params else 4, moments.itemsize, cleared)
            blob += struct.pack("<4i", *sizes, len(lists) - 3)  # boundary.cuh Elements, place of the masks
            self._launch(("settle_kernel",), blob, CANDIDATES // THREADS, THREADS, ranges)

    def boundary_adamw_(
        self, params: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], ipt: list[Tensor],
        shadow: list[Tensor], masks: list[Tensor], exp_avg_ipt: list[Tensor], exp_avg_unc: list[Tensor],
        grads: list[Tensor], places: Tensor, chunks: Tensor, hyper: Tensor, accepted: Tensor, rng: Tensor,
        criterion: str, clear_state: bool = False, *, clip: Tensor | None = None, around: Tensor | None = None,
        stats: Tensor | None = None, threshold: Tensor | None = None, fold_rng: Tensor | None = None,
        beta1: float = 0.0, beta2: float = 0.0, bracket: Tensor | None = None, counts: Tensor | None = None,
        pointers: Tensor | None = None,
    ) -> None:  # fmt: skip
        lists = [params, exp_avg, exp_avg_sq, ipt, shadow, grads, masks, exp_avg_ipt, exp_avg_unc]
        self._boundary(
            "AdamWStep", lists, places, chunks, hyper, accepted, rng, criterion, clear_state, None, clip, None,
            around=around, stats=stats, threshold=threshold, fold_rng=fold_rng, beta1=beta1, beta2=beta2,
            bracket=bracket, counts=counts, pointers=pointers,
        )  # fmt: skip

    def boundary_sgd_(
        self, params: list[Tensor], momentum_buffer: list[Tensor], ipt: list[Tensor], shadow: list[Tensor],
        masks: list[Tensor], exp_avg_ipt: list[Tensor], exp_avg_unc: list[Tensor], grads: list[Tensor], places: Tensor,
        chunks: Tensor, hyper: Tensor, accepted: Tensor, rng: Tensor, criterion: str, clear_state: bool = False, *,
        clip: Tensor | None = None, around: Tensor | None = None, stats: Tensor | None = None,
        threshold: Tensor | None = None, fold_rng: Tensor | None = None, beta1: float = 0.0, beta2: float = 0.0,
        bracket: Tensor | None = None, counts: Tensor | None = None, pointers: Tensor | None = None,
    ) -> None:  # fmt: skip
        lists = [params, momentum_buffer, ipt, shadow, grads, masks, exp_avg_ipt, exp_avg_unc]
        self._boundary(
            "SgdStep", lists, places, chunks, hyper, accepted, rng, criterion, clear_state, None, clip, None,
            around=around, stats=stats, threshold=threshold, fold_rng=fold_rng, beta1=beta1, beta2=beta2,
            bracket=bracket, counts=counts, pointers=pointers,
        )  # fmt: skip

    def apply_mask_(
        self, params: list[Tensor], masks: list[Tensor], places: Tensor, chunks: Tensor, *,
        pointers: Tensor | None = None,
    ) -> None:  # fmt: skip
        if not len(chunks):
            return
        table = self._table(len(places), [params, masks], pointers)
        blob = struct.pack("<QqQQ", table.data_ptr(), len(params), places.data_ptr(), chunks.data_ptr())
        ranges = [extent(x) for x in (table, places, chunks, *params, *masks)]
        kind = "float" if params[0].dtype == torch.float32 else "BFloat16"
        self._launch(("apply_mask_kernel", kind), blob, len(chunks), THREADS, ranges)

    def sum_of_squares(
        self, tensors: list[Tensor], places: Tensor, chunks: Tensor, *, pointers: Tensor | None = None
    ) -> Tensor:
        sums = torch.empty(len(chunks), dtype=torch.float64)
        total = torch.empty(1, dtype=torch.float64)
        if len(chunks):
            table = self._table(len(places), [tensors], pointers)
            blob = struct.pack("<QqQQ", table.data_ptr(), len(tensors), places.data_ptr(), chunks.data_ptr())
            ranges = [extent(x) for x in (table, places, chunks, *tensors, sums)]
            key = ("chunk_squares_kernel", NAMES[tensors[0].dtype])
            self._launch(key, blob + struct.pack("<Q", sums.data_ptr()), len(chunks), 128, ranges)
        blob = struct.pack("<QqQ", sums.data_ptr(), len(chunks), total.data_ptr())
        self._launch(("total_kernel",), blob, 1, 256, [extent(sums), extent(total)])
        return total

    def grouped_linear(
        self, x: Tensor, values: Tensor, columns: Tensor, bases: Tensor, starts: Tensor, bias: Tensor | None
    ) -> Tensor:
        rows, in_features = len(starts) - 1, x.shape[-1]
        y = x.new_empty(*x.shape[:-1], rows)
        packed = [values, columns, bases, starts]
        matrix = struct.pack("<4Qqq", *(t.data_ptr() for t in packed), rows, in_features)
        ranges = [extent(t) for t in (x, y, *packed, *([] if bias is None else [bias]))]
        for first in range(0, y.numel() // rows if rows else 0, 4):
            count = min(4, y.numel() // rows - first)
            width = 4 if count > 2 else count
            at = x.data_ptr() + first * in_features * x.element_size()
            to = y.data_ptr() + first * rows * x.element_size()
            tokens = struct.pack("<QQi4xq", at, to, list(NAMES).index(x.dtype), count)
            blob = matrix + tokens + struct.pack("<Q", 0 if bias is None else bias.data_ptr())
            blob += struct.pack("<4I", *(4 * width << 8 * i for i in range(4)))
            # Fewer blocks than rows need, so that warps go on to further rows.
            blocks = min(-(-rows // (GROUPED_THREADS // 32)), GROUPED_BLOCKS)
            key = ("grouped_linear_kernel", NAMES[values.dtype], str(width))
            self._launch(key, blob, blocks, GROUPED_THREADS, ranges, 4 * width * (in_features + 1))
        return y

    def grouped_expand(
        self, values: Tensor, columns: Tensor, bases: Tensor, starts: Tensor, in_features: int
    ) -> Tensor:
        rows = len(starts) - 1
        weight = values.new_empty(rows, in_features)
        packed = [values, columns, bases, starts]
        blob = struct.pack("<4QqqQ", *(t.data_ptr() for t in packed), rows, in_features, weight.data_ptr())
        key = ("grouped_expand_kernel", "unsigned int" if values.dtype == torch.float32 else "unsigned short")
        if weight.numel():
            ranges = [extent(t) for t in (weight, *packed)]
            self._launch(key, blob, -(-rows // (GROUPED_THREADS // 32)), GROUPED_THREADS, ranges)
        return weight
