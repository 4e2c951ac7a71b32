"""Runtimes that take turns with one model at one shape: `pins-ext bench-inference`."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import inference_gpu_peers as gpu_peers
from . import inference_peers as peers
from .graphs import captured
from .inference_peers import AbsentError, Call

LEAST_ROUNDS = 3


class Contest:
    """Calls by name, each runs its model once; and who can't take part, with the reason.

    Args:
        inputs: what every model gets, on the device that all run on.
        threads: threads of every runtime on the CPU.
    """

    def __init__(self, inputs: dict[str, Tensor], threads: int) -> None:
        self.inputs = inputs
        self.device = inputs["input_ids"].device
        self.threads = threads
        self.calls: dict[str, Call] = {}
        self.absent: dict[str, str] = {}
        self.launched: dict[str, str] = {}
        self.memory: dict[str, int] = {}
        self.errors: dict[str, float] = {}

    def add_dense(self, model: nn.Module, stack: ExitStack) -> None:
        """Runtimes that don't know zeros; their files are deleted with `stack`."""
        inputs, threads, expected = self.inputs, self.threads, self._expected(model)
        torch_is = "torch" if self.device.type == "cpu" else "cuBLAS"
        self._add(f"{torch_is} float32", partial(peers.torch_dense, model, inputs, torch.float32), expected)
        self._add(f"{torch_is} bfloat16", partial(peers.torch_dense, model, inputs, torch.bfloat16), expected)
        if self.device.type != "cpu":
            for name in gpu_peers.LAYERS:
                self._add(name, partial(gpu_peers.with_layers, model, inputs, name), expected)
            return
        try:
            file = stack.enter_context(peers.exported(model, inputs))
        except AbsentError as error:
            self.absent["onnxruntime, OpenVINO"] = str(error)
            return
        self._add("onnxruntime float32", partial(peers.onnxruntime, file, inputs, threads), expected)
        self._add("OpenVINO float32", partial(peers.openvino, file, inputs, threads, "f32"), expected)
        self._add("OpenVINO bfloat16", partial(peers.openvino, file, inputs, threads, "bf16"), expected)
        self._add("OpenVINO int8", partial(peers.openvino_int8, file, inputs, threads), expected)

    def add_csr(self, model: nn.Module, name: str) -> None:
        """torch's CSR matrices. `name`: the model's, e.g. "90%"."""
        self._add(f"torch CSR {name}", partial(peers.torch_csr, model, self.inputs), self._expected(model))

    def add_ours(self, model: nn.Module, name: str = "") -> None:
        """This package's sparse layers, with each kind of values. `name`: the model's, e.g. "90%"."""
        expected = self._expected(model)
        for values in ("float32", "bfloat16", "int8" if self.device.type == "cpu" else "float16"):
            self._add(f"pins_ext {values} {name}".rstrip(), partial(peers.ours, model, self.inputs, values), expected)

    def _expected(self, model: nn.Module) -> Tensor:
        return first_output(model(**self.inputs))

    def _add(self, name: str, build: Callable[[], Call], expected: Tensor) -> None:
        before = _held(self.device)
        try:
            call = build()
            found = first_output(call())
        except AbsentError as error:
            self.absent[name] = str(error)
            return
        self.errors[name] = float((found - expected).norm() / expected.norm())
        del found
        self.memory[name] = _held(self.device) - before
        try:
            self.calls[name] = captured(call, self.device)
        except RuntimeError as error:
            self.calls[name] = call
            self.launched[name] = f"without a CUDA graph, launches included: {' '.join(str(error).split())[:100]}"

    def beside(self) -> Contest:
        """A contest with the same calls, to which more can be added."""
        other = Contest(self.inputs, self.threads)
        other.calls, other.absent = dict(self.calls), dict(self.absent)
        other.memory, other.errors, other.launched = dict(self.memory), dict(self.errors), dict(self.launched)
        return other

    def rows(self, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
        """Measure: a row of numbers for each runtime.

        Args:
            rounds: measurements of each.
            seconds: measuring ends after that time, though not before three rounds.
        """
        batch, length = self.inputs["input_ids"].shape
        pause = 0.002 if self.threads > 1 else 0.0
        found = measure(self.calls, rounds, seconds, pause, partial(wait, self.device))
        return {
            name: _summary(*samples, batch * length)
            | {"resident_mb": self.memory[name] / 1e6, "error": self.errors[name]}
            for name, samples in found.items()
        }


def measure(
    calls: dict[str, Call],
    rounds: int,
    seconds: float = float("inf"),
    pause: float = 0.0,
    finish: Callable[[], None] = lambda: None,
) -> dict[str, tuple[list[float], list[float]]]:
    """Time calls in turns.

    Args:
        calls: by name.
        rounds: how often each is called.
        seconds: no further round begins after that time, once there are three.
        pause: seconds before each call, in which the threads of the last one stop spinning.
        finish: called after each, within its time: returns when a GPU has done what it was told.

    Returns:
        Seconds of each call in every round: (wall, processor).
    """
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.monotonic() > end:
            break
        for name, call in calls.items():
            time.sleep(pause)
            wall, processor = time.perf_counter(), time.process_time()
            call()
            finish()
            found[name][1].append(time.process_time() - processor)
            found[name][0].append(time.perf_counter() - wall)
    return found


def _summary(wall: list[float], processor: list[float], tokens: int) -> dict[str, float]:
    ordered = sorted(wall)
    p50 = statistics.median(ordered)
    return {
        "p50_ms": p50 * 1e3,
        "p95_ms": ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))] * 1e3,
        "least_ms": ordered[0] * 1e3,
        "processor_ms": min(processor) * 1e3,
        "rounds": len(wall),
        "tokens_per_second": tokens / p50,
    }


def key(threads: int, device: str = "cpu") -> str:
    """What runtimes are compared by: on a machine that others use, processor time of one thread is the steadier."""
    return "processor_ms" if threads == 1 and device == "cpu" else "least_ms"


def random_inputs(model: nn.Module, shape: tuple[int, int]) -> dict[str, Any]:
    """Random tokens without padding, int64 [sequences, tokens], on the model's device."""
    vocabulary = int(getattr(model.config, "vocab_size", 100))
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(model.parameters()).device)
    inputs = {"input_ids": ids}
    if ids.device.type == "cpu":
        # On a GPU models would look at its values on the host, which no CUDA graph holds; none means the same.
        inputs["attention_mask"] = torch.ones_like(ids)
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_output(answer: Any) -> Tensor:
    """The first thing that a runtime answers, float32: a transformers model, onnxruntime's list, OpenVINO's mapping."""
    values = answer if isinstance(answer, (Tensor, list, tuple)) else list(answer.values())
    return torch.as_tensor(values if isinstance(values, Tensor) else values[0], dtype=torch.float32)


def _held(device: torch.device) -> int:
    """Bytes of tensors on a GPU; on the CPU of this process in memory, without those that it has freed."""
    gc.collect()
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
