"""Every Triton kernel compiled for sm_80 and sm_90, with no GPU, and what its PTX and machine code must look like."""

# ruff: noqa: N803  (compile-time arguments of kernels are written in capitals)

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled or interpreted, by process", allow_module_level=True)

import triton
import triton.language as tl
from operator_calls import CALLS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pins_ext import triton_kernels
from pins_ext.triton_kernels import bracket, count, eligible, grouped, importance, pack, regions, select, table

THREADS = 32 * table.OPTIONS["num_warps"]
SIXTEEN_BITS = ("bfloat16", "float16")
TYPES = {"beta1": "fp32", "one_minus_beta1": "fp32", "beta2": "fp32", "one_minus_beta2": "fp32", "total": "i64"}
FLOAT_POINTERS = ("lr_ptr", "accepted_ptr", "grad_scale_ptr", "clip_ptr", "found_inf_ptr", "factors_ptr")
POINTERS = {
    **dict.fromkeys(FLOAT_POINTERS, "*fp32"),
    **dict.fromkeys(("x_ptr", "y_ptr", "bias_ptr", "values_ptr"), "*fp32"),
    "columns_ptr": "*u8",
    "bases_ptr": "*i16",
}
PLAIN = {"grad_scale_ptr": None, "clip_ptr": None}
UNCOUNTED = {"bracket_ptr": None, "counts_ptr": None}


@dataclass(frozen=True)
class Variant:
    """A kernel, its compile-time arguments, and the streams of its hot loop as dtypes; none if it has no hot loop."""

    kernel: Any
    constants: dict[str, Any]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def accumulate(dtype: str, state: str, criterion: str = "pins", **given: None) -> Variant:
    constants = {"CRITERION": criterion, "DTYPE": dtype, "STATE": state, "BLOCK_SIZE": importance.BLOCK_SIZE, **given}
    grads_and_params = (dtype,) if criterion == "precomputed" else (dtype, dtype)
    return Variant(importance._accumulate_kernel, constants, (*grads_and_params, state), (state,))


def fold(state: str, unc: bool = True, **given: None) -> Variant:
    constants = {"STATE": state, "UNC": unc, "DTYPE": None, "MOMENT": None, "factors_ptr": None, **given}
    constants["BLOCK_SIZE"] = importance.BLOCK_SIZE
    averages = (state, state) if unc else (state,)
    return Variant(importance._fold_kernel, constants, (*averages, state), averages)


def fold_moments(dtype: str, state: str, moment: str | None = None, **given: None) -> Variant:
    constants = {
        "STATE": state,
        "UNC": True,
        "DTYPE": dtype,
        "MOMENT": moment or dtype,
        "BLOCK_SIZE": importance.BLOCK_SIZE,
    }
    return Variant(importance._fold_kernel, {**constants, **given}, (state, state, *[dtype] * 3), (state, state))


def scored(
    kernel: Any, a: str, b: str | None = None, score: str = "product", block: int = select.BLOCK_SIZE
) -> Variant:
    constants = {"SCORE": score, "A": a, "B": b, "BLOCK_SIZE": block}
    if score != "fisher":
        constants["factors_ptr"] = None
    return Variant(kernel, constants, (a,) if b is None else (a, b))


def cold(variant: Variant) -> Variant:
    return Variant(variant.kernel, variant.constants)


def coded(variant: Variant) -> Variant:
    """No 16-byte accesses: a group of 8-bit storage is 34 bytes."""
    block = min(variant.constants["BLOCK_SIZE"], table.CODED_BLOCK_SIZE)
    return Variant(variant.kernel, variant.constants | {"BLOCK_SIZE": block})


VARIANTS = {
    "accumulate-float32": accumulate("float32", "float32", **PLAIN),
    "accumulate-bfloat16": accumulate("bfloat16", "bfloat16"),
    "accumulate-bfloat16-float32": accumulate("bfloat16", "float32", **PLAIN),
    "accumulate-float16-float32": accumulate("float16", "float32"),
    "accumulate-movement": accumulate("float32", "float32", "movement", **PLAIN),
    "fold-float32": fold("float32", **UNCOUNTED),
    "fold-float32-count": fold("float32"),
    "fold-bfloat16": fold("bfloat16", **UNCOUNTED),
    "fold-bfloat16-count": fold("bfloat16"),
    "fold-identity-count": fold("float32", unc=False),
    "fold-moments-float32": fold_moments("float32", "float32", **UNCOUNTED),
    "fold-moments-bfloat16-count": fold_moments("bfloat16", "bfloat16"),
    "count-fisher": scored(select._count_kernel, "float32", "float32", "fisher"),
    "pack-fisher": scored(pack._pack_kernel, "float32", "float32", "fisher", block=pack.BLOCK_SIZE),
    "pack-fisher-bfloat16": scored(pack._pack_kernel, "bfloat16", "bfloat16", "fisher", block=pack.BLOCK_SIZE),
    "pack-fisher-float16": scored(pack._pack_kernel, "float16", "float16", "fisher", block=pack.BLOCK_SIZE),
    "sample": cold(scored(select._sample_kernel, "float32", "float32", block=select.SAMPLE_BLOCK)),
    "count-float32": scored(select._count_kernel, "float32", "float32"),
    "count-bfloat16": scored(select._count_kernel, "bfloat16", "bfloat16"),
    "count-deviation": scored(select._count_kernel, "float32", "float32", "deviation"),
    "count-magnitude-float16": scored(select._count_kernel, "float16", None, "magnitude"),
    "collect-float32": scored(select._collect_kernel, "float32", "float32"),
    "collect-bfloat16": scored(select._collect_kernel, "bfloat16", "bfloat16"),
    "count-regions-float32": scored(regions._count_regions_kernel, "float32", "float32"),
    "count-regions-bfloat16": scored(regions._count_regions_kernel, "bfloat16", "bfloat16"),
    "tie-count-float32": scored(select._tie_count_kernel, "float32", "float32"),
    "tie-count-bfloat16": scored(select._tie_count_kernel, "bfloat16", "bfloat16"),
    "tie-locate": cold(scored(select._tie_locate_kernel, "float32", "float32")),
    "bracket-of": Variant(bracket._bracket_of_kernel, {}),
    "narrow": Variant(bracket._narrow_kernel, {}),
    "settle": Variant(bracket._settle_kernel, {}),
    "cutoff": Variant(bracket._cutoff_kernel, {"EXACT": True}),
    "eligible-float32": cold(scored(eligible._eligible_kernel, "float32", "float32", block=eligible.BLOCK_SIZE)),
    "eligible-bfloat16": cold(scored(eligible._eligible_kernel, "bfloat16", "bfloat16", block=eligible.BLOCK_SIZE)),
    "eligible-fisher": cold(
        scored(eligible._eligible_kernel, "float16", "float32", "fisher", block=eligible.BLOCK_SIZE)
    ),
    "pack-float32": scored(pack._pack_kernel, "float32", "float32", block=pack.BLOCK_SIZE),
    "pack-bfloat16": scored(pack._pack_kernel, "bfloat16", "bfloat16", block=pack.BLOCK_SIZE),
    "accumulate-uint8": coded(accumulate("bfloat16", "uint8")),
    "fold-uint8": coded(fold("uint8", **UNCOUNTED)),
    "fold-uint8-count": coded(fold("uint8")),
    "fold-uint8-identity-count": coded(fold("uint8", unc=False)),
    "fold-moments-uint8-count": coded(fold_moments("bfloat16", "uint8", moment="int8")),
    "fold-moments-int8-count": coded(fold_moments("bfloat16", "bfloat16", moment="int8")),
    "fold-moments-int8-float32": coded(fold_moments("float32", "float32", moment="int8", **UNCOUNTED)),
    "sample-uint8": coded(scored(select._sample_kernel, "uint8", "uint8", block=select.SAMPLE_BLOCK)),
    "count-uint8": coded(scored(select._count_kernel, "uint8", "uint8")),
    "count-fisher-uint8": coded(scored(select._count_kernel, "bfloat16", "uint8", "fisher")),
    "collect-uint8": coded(scored(select._collect_kernel, "uint8", "uint8")),
    "tie-count-uint8": coded(scored(select._tie_count_kernel, "uint8", "uint8")),
    "tie-locate-uint8": coded(scored(select._tie_locate_kernel, "uint8", "uint8")),
    "count-regions-uint8": coded(scored(regions._count_regions_kernel, "uint8", "uint8")),
    "eligible-uint8": coded(scored(eligible._eligible_kernel, "uint8", "uint8", block=eligible.BLOCK_SIZE)),
    "pack-uint8": coded(scored(pack._pack_kernel, "uint8", "uint8", block=pack.BLOCK_SIZE)),
    "pack-fisher-uint8": coded(scored(pack._pack_kernel, "bfloat16", "uint8", "fisher", block=pack.BLOCK_SIZE)),
    "grouped-linear": Variant(
        grouped._grouped_linear_kernel, {"VALUES": "float32", "TOKENS": 4, "BLOCK_SIZE": grouped.BLOCK_SIZE}
    ),
}
HOT = [name for name, variant in VARIANTS.items() if variant.reads]

each_variant = pytest.mark.parametrize("name", VARIANTS)
each_hot_variant = pytest.mark.parametrize("name", HOT)
each_target = pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])


@dataclass(frozen=True)
class Compiled:
    """PTX; machine code, a line per instruction; resources as cuobjdump counts them."""

    ptx: str
    sass: str
    resources: dict[str, int]


def source_of(kernel: Any, constants: dict[str, Any]) -> ASTSource:
    """What a launch compiles: pointer arguments are at 16 bytes, which torch's allocator sees to."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*i64")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = TYPES.get(name, "i32")
    return ASTSource(kernel, signature, constants, attributes)


def compiled(kernel: Any, constants: dict[str, Any], capability: int, **options: Any) -> Compiled:
    source = source_of(kernel, constants)
    binary = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={**table.options_of(constants), **options}
    ).asm
    usage = disassembled("cuobjdump", "--dump-resource-usage", binary["cubin"])
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(binary["ptx"], disassembled("nvdisasm", "-c", binary["cubin"]), resources)


def disassembled(tool: str, option: str, cubin: bytes) -> str:
    """What one of the tools that come with Triton says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = getattr(triton.knobs.nvidia, tool).path
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


@cache
def variant(name: str, capability: int) -> Compiled:
    return compiled(VARIANTS[name].kernel, VARIANTS[name].constants, capability)


def test_every_kernel_is_compiled_here() -> None:
    modules = [import_module(f"pins_ext.triton_kernels.{name}") for name in set(triton_kernels.LAUNCHERS.values())]
    kernels = {value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    assert kernels == {variant.kernel for variant in VARIANTS.values()}


class NoDevice:
    """What Triton asks a driver before it compiles a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("op", triton_kernels.LAUNCHERS)
def test_launches_compile_what_is_tested_here(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launcher, as far as the compiler: types, alignments and options of its launches are those of this file."""
    launched = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", NoDevice())
    args, kwargs = CALLS[op]()
    triton_kernels.launcher(op)(*args, **kwargs)
    assert launched
    for launch in launched:
        kernel, types = launch.src.fn, launch.src.signature
        constants = {name: None for name, kind in types.items() if kind == "constexpr"}
        expected = source_of(kernel, constants)
        # As wide as it needs to be: a small model's is 32 bits.
        assert {**types, "total": "i64"} == {**expected.signature, "total": "i64"}
        assert {place: kind for place, kind in launch.src.attrs.items() if kind} == expected.attrs
        assert {name: getattr(launch.metadata, name) for name in table.OPTIONS} == table.OPTIONS


# ---- arithmetic -------------------------------------------------------------------------------------

# What may be done with a float: one rounding per operation, to nearest, denormals kept. Moves and selections aside.
EXACT = re.compile(
    r"(add|sub|mul|div)\.rn\.f32|(abs|neg)\.(f32|f16|f16x2)|setp\.\w+\.(f32|f16)|selp\.f32|cvt\.f32\.f16|mov\.\w+"
)


def inexact(ptx: str) -> set[str]:
    """The floating-point instructions of other kinds."""
    instructions = set(re.findall(r"^\s*(?:@!?%\w+ )?([a-z][\w.]*\.(?:f16|f32|f64|bf16)\w*)", ptx, re.MULTILINE))
    return {name for name in instructions if not EXACT.fullmatch(name)}


@each_target
@each_variant
def test_rounds_every_operation_once(name: str, capability: int) -> None:
    found = inexact(variant(name, capability).ptx)
    if name == "bracket-of":
        # A place in a sample of at most 16384 keys, cut to a whole number: the bracket may begin or end one key further
        # out, and what is counted in it is exact whatever its ends.
        found -= {"sqrt.rn.f32", "max.f32", "cvt.rn.f32", "cvt.rzi.s32.f32"}
    if "int8" in name:
        found -= {"sqrt.rn.f32", "cvt.rn.f32", "cvt.rzi.s32.f32"}  # a level is cut to a whole number
    assert found == set()


@each_target
@each_hot_variant
def test_machine_code_fuses_nothing(name: str, capability: int) -> None:
    """ptxas expands a correctly rounded division into fused operations; elsewhere there must be none."""
    code = variant(name, capability)
    if "div.rn.f32" not in code.ptx:
        assert not re.search(r"\bFFMA\b", code.sass)


def test_the_criterion_keeps_the_sign_of_zero() -> None:
    """Triton's unary minus is a subtraction from zero; ours, and the absolute value, are none."""
    assert "sub.rn.f32" not in variant("accumulate-movement", 90).ptx


# ---- resources --------------------------------------------------------------------------------------


@each_target
@each_variant
def test_registers_and_spills(name: str, capability: int) -> None:
    """At 80 registers six programs of 128 threads share the 65536 of a multiprocessor, which the grid reckons with.

    In 8 bits there are fewer, with more registers. Outside of hot loops Triton 3.7 spills 8 bytes of one kernel, 3.9 up
    to 48 of some.
    """
    code = variant(name, capability)
    registers, programs = table.shares_of(VARIANTS[name].constants)
    assert 0 < code.resources["REG"] <= registers
    assert programs * THREADS * registers <= 65536
    assert code.resources["LOCAL"] == 0
    assert not [op for op in hot_loop(code.sass) if op.startswith(("LDL", "STL"))]
    assert code.resources["STACK"] <= (8 if count.REORDERS.value else 48)


# ---- memory -----------------------------------------------------------------------------------------


def hot_loop(sass: str) -> list[str]:
    """Opcodes of the smallest loop that loads 16 bytes at a time."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\S+)(.*)", line):
            opcodes.append(instruction[1])
            target = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            if target and instruction[1].startswith("BRA") and target[1] in labels:
                loops.append(opcodes[labels[target[1]] :])
    return min((loop for loop in loops if any(wide_load(op) for op in loop)), key=len, default=[])


def wide_load(opcode: str) -> bool:
    return opcode.startswith("LDG") and ".128" in opcode


def accesses(streams: tuple[str, ...], block: int) -> int:
    """16-byte accesses a thread needs for a block of each stream."""
    return sum(block * (2 if dtype in SIXTEEN_BITS else 4) // (16 * THREADS) for dtype in streams)


@each_target
@each_hot_variant
def test_hot_loop_moves_16_bytes_at_a_time(name: str, capability: int) -> None:
    streams, code = VARIANTS[name], variant(name, capability)
    reads, writes = (accesses(s, streams.constants["BLOCK_SIZE"]) for s in (streams.reads, streams.writes))
    assert len(re.findall(r"ld\.global\.v4\.b32", code.ptx)) == reads
    assert len(re.findall(r"st\.global\.v4\.b32", code.ptx)) == writes
    loop = hot_loop(code.sass)
    rounds, rest = divmod(sum(wide_load(op) for op in loop), reads)
    assert rounds >= 1
    assert rest == 0
    # The packed mask is a thirty-second of a float32 stream: a word or two per thread and block.
    words = rounds * name.startswith("pack")
    assert sum(op.startswith("LDG") and not wide_load(op) for op in loop) <= 2 * words
    assert sum(op.startswith("STG") and ".128" not in op for op in loop) == words


@each_target
@each_hot_variant
def test_hot_loop_does_not_go_through_shared_memory(name: str, capability: int) -> None:
    """But for mixed widths, whose 16-byte loads and stores hold other weights, and for the words of a mask."""
    streams = VARIANTS[name]
    mixed = len({dtype in SIXTEEN_BITS for dtype in streams.reads + streams.writes}) > 1
    if not mixed and not name.startswith("pack"):
        assert not [op for op in hot_loop(variant(name, capability).sass) if op.startswith(("BAR", "STS", "LDS"))]


@each_target
@each_hot_variant
def test_misaligned_chunks_have_a_path_of_their_own(name: str, capability: int) -> None:
    """Narrow accesses under a predicate, as many as the masked path needs: 512 weights of each stream."""
    streams, code = VARIANTS[name], variant(name, capability)
    for width, dtypes in (("b32", ("float32",)), ("b16", SIXTEEN_BITS)):
        expected = sum(dtype in dtypes for dtype in streams.reads) * 512 // THREADS
        narrow = re.findall(rf"@%p\d+ ld\.global\.{width}", code.ptx)
        assert len(narrow) >= expected


@each_target
@each_variant
def test_atomics_order_nothing(name: str, capability: int) -> None:
    ptx = variant(name, capability).ptx
    assert all(".relaxed." in line for line in re.findall(r"\b(?:atom|red)\.\S+", ptx))
    assert "fence" not in ptx
    assert "membar" not in ptx


# ---- each of these checks can fail --------------------------------------------------------------------


@triton.jit
def _careless_kernel(addresses_ptr, in_ptr, beta1, BLOCK_SIZE: tl.constexpr):
    """Divides and fuses as it likes, and trusts no alignment."""
    pointer = tl.load(addresses_ptr).to(tl.pointer_type(tl.float32)) + tl.arange(0, BLOCK_SIZE)
    for _ in range(tl.load(in_ptr)):
        x = tl.load(pointer)
        tl.store(pointer, tl.sqrt(x * beta1 + x) / beta1)
        tl.atomic_add(addresses_ptr, 1)


@triton.jit
def _greedy_kernel(in_ptr, BLOCK_SIZE: tl.constexpr):
    """Holds more at a time than fits in the registers."""
    x = tl.load(in_ptr + tl.arange(0, BLOCK_SIZE))
    for _ in range(tl.load(in_ptr)):
        x = tl.cumsum(x) * x
    tl.store(in_ptr + tl.arange(0, BLOCK_SIZE), x)


@each_target
def test_the_checks_catch_a_careless_kernel(capability: int) -> None:
    code = compiled(_careless_kernel, {"BLOCK_SIZE": 1024}, capability, enable_fp_fusion=True)
    found = " ".join(inexact(code.ptx))
    assert "fma" in found
    assert "div.full" in found
    assert "sqrt.approx" in found
    assert re.search(r"\bFFMA\b", code.sass)
    assert hot_loop(code.sass) == []
    assert "ld.global.v4.b32" not in code.ptx
    assert not all(".relaxed." in line for line in re.findall(r"\b(?:atom|red)\.\S+", code.ptx))


@each_target
def test_the_checks_catch_a_spill(capability: int) -> None:
    code = compiled(_greedy_kernel, {"BLOCK_SIZE": 16384}, capability)
    assert code.resources["STACK"] > 0
    assert re.search(r"\b(LDL|STL)\b", code.sass)
