"""Beneath Triton: `kernel[grid](...)` on CPU tensors is specialised and compiled for a CUDA target, then emulated."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver as runtime_driver

from . import module
from .launch import BUILD, LaunchError
from .session import SESSION, Ranges

PACK = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
PACK |= {"u64": "Q", "fp32": "f", "fp64": "d"}
MOST_SHARED = {80: 163 << 10, 90: 227 << 10}


class Variant:
    """One compiled variant of a kernel: what CompiledKernel calls in place of the launcher that it would compile."""

    def __init__(self, compiled: CompiledKernel) -> None:
        self.metadata = compiled.metadata
        self.entry = module.entries(compiled.asm["ptx"])[compiled.metadata.name]
        self.signature = dict(compiled.src.signature)
        names, constants = compiled.src.fn.arg_names, compiled.src.constants
        settings = tuple(sorted((names[k[0]], str(v)) for k, v in constants.items()))
        self.key = (self.entry.target, settings, str(compiled.src.attrs), tuple(self.signature.values()))

    def __call__(
        self,
        gx: int,
        gy: int,
        gz: int,
        stream: Any,
        function: Any,
        metadata: Any,
        launch: Any,
        enter: Any,
        leave: Any,
        *args: Any,
    ) -> None:
        values: list[bytes] = []
        ranges: Ranges = []
        for kind, value in zip(self.signature.values(), args, strict=True):
            if kind.startswith("*"):
                if hasattr(value, "data_ptr"):
                    ranges += SESSION.reachable(value)
                values.append(struct.pack("<Q", value.data_ptr() if hasattr(value, "data_ptr") else int(value or 0)))
            elif kind != "constexpr":
                values.append(struct.pack("<" + PACK[kind], value))
        if getattr(self.metadata, "global_scratch_size", 0):
            raise LaunchError(f"{self.entry.name}: scratch memory is not implemented")
        # What Triton adds behind the arguments: scratch memory, of which there is none.
        values += [struct.pack("<Q", 0)] * (len(self.entry.parameters) - len(values))
        blob = bytearray(self.entry.parameter_bytes)
        for p, v in zip(self.entry.parameters, values, strict=True):
            if len(v) != p.size:
                raise LaunchError(f"{self.entry.name}: {p.name} has {p.size} bytes, the launcher gives {len(v)}")
            blob[p.offset : p.offset + p.size] = v
        threads = 32 * self.metadata.num_warps
        shape = (bytes(blob), (gx, gy, gz), threads, self.metadata.shared, ranges)
        SESSION.run(self.entry.name, self.key, self.entry, *shape)


class Driver:
    """The parts of Triton's driver that a launch asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _init_handles(self: CompiledKernel) -> None:
    if self.module is not None:
        return
    self.module = self
    self.function = self.n_regs = self.n_spills = 0
    self.n_max_threads = 1024
    limit = MOST_SHARED[runtime_driver.active.capability]
    if self.metadata.shared > limit:
        raise LaunchError(f"{self.metadata.name}: {self.metadata.shared} bytes of shared memory, there are {limit}")
    self._run = Variant(self)


def install(capability: int) -> None:
    """Make the emulator Triton's GPU in this process: 80 or 90."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: kernels are interpreted or compiled, by process")
    runtime_driver.set_active(Driver(capability))
    CompiledKernel._init_handles = _init_handles
    # The machine code is not run: the PTX is. What is cached is then no program, and is kept apart.
    CUDABackend.make_cubin = lambda self, source, metadata, options, capability: b"\0"
    triton.knobs.cache.dir = str(BUILD / "triton")


def follow_pointer_tables() -> None:
    """Let launches touch what the pointer tables of pins_ext.triton_kernels point to, whoever built them."""
    table = import_module("pins_ext.triton_kernels.table")
    original = table.pointer_table

    def pointer_table(pointers: Any, places: torch.Tensor, *lists: list[torch.Tensor]) -> torch.Tensor:
        made = original(pointers, places, *lists)
        SESSION.remember(made, [x for row in lists for x in row])
        return made

    launchers = import_module("pins_ext.triton_kernels").LAUNCHERS
    for name in {"table", *launchers.values()}:
        module = import_module(f"pins_ext.triton_kernels.{name}")
        if hasattr(module, "pointer_table"):
            module.pointer_table = pointer_table


@contextmanager
def programs(n: int) -> Iterator[None]:
    """Launch at most `n` programs where a GPU would get as many as fit it."""
    table = import_module("pins_ext.triton_kernels.table")
    before, table.INTERPRETED_PROGRAMS = table.INTERPRETED_PROGRAMS, n
    try:
        yield
    finally:
        table.INTERPRETED_PROGRAMS = before
