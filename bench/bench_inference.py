"""`pins-ext bench-inference`: a pruned model in every CPU runtime that is here, in one process, taking turns."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.runs.errors import EXIT_OK, UsageError

from . import inference_curves as curves
from . import inference_peers as peers
from .inference_peers import AbsentError, Call
from .machine import describe


def run(given: dict[str, Any], threads: int, rounds: int) -> int:
    """Measure what was asked for; the exit code."""
    if given.get("curves"):
        return _curves(given, threads, rounds)
    shapes = [_shape(text) for text in given.get("tokens", ["1", "16", "128"])]
    models = _models(given)
    torch.set_num_threads(threads)
    cases = []
    with torch.inference_mode():
        for shape in shapes:
            case = _case(models, shape, threads, rounds)
            print(table(case), flush=True)
            cases.append(case)
    if "output" in given:
        _write(Path(given["output"]), {"machine": describe(torch.device("cpu")), "threads": threads, "cases": cases})
    return EXIT_OK


def _curves(given: dict[str, Any], threads: int, rounds: int) -> int:
    """Two curves over sparsity and one over tokens."""
    if "checkpoint" in given:
        raise UsageError("--curves is for the random BERT, whose sparsity can be chosen: leave the checkpoint out")
    sparsities = sorted(given.get("sparsity", curves.SPARSITIES))
    shapes = sorted((_shape(text) for text in given.get("tokens", curves.TOKENS)), key=lambda s: s[0] * s[1])
    if not all(0 < s < 1 for s in sparsities):
        raise UsageError("--sparsity must lie between 0 and 1")
    if len(sparsities) < 2 or len(shapes) < 2:
        raise UsageError("--curves needs at least two places for each of --sparsity and --tokens, or none for its own")
    torch.set_num_threads(threads)
    fixed = [(1, 1), (1, 128)]
    plan = [(shape, s) for shape in fixed for s in sparsities] + [(shape, 0.9) for shape in shapes]
    found: dict[tuple[tuple[int, int], float], dict[str, float]] = {}
    with torch.inference_mode():
        for i, (shape, sparsity) in enumerate(plan):
            if (shape, sparsity) in found:
                continue
            print(f"{i + 1}/{len(plan)}: {shape[0]} x {shape[1]} tokens, {sparsity:.1%} zeros", flush=True)
            model = _random_bert(sparsity, given.get("layers", 12))
            rows = _case({"": model}, shape, threads, rounds, csr=False)["rows"]
            key = "processor_ms" if threads == 1 else "least_ms"
            found[shape, sparsity] = {name.strip(): row[key] for name, row in rows.items()}
    drawn = [
        curves.summary("sparsity", f"{b} x {n} tokens", [curves.Point(s, found[(b, n), s]) for s in sparsities])
        for b, n in fixed
    ]
    drawn.append(curves.summary("tokens", "90 % zeros", [curves.Point(b * n, found[(b, n), 0.9]) for b, n in shapes]))
    print("\n".join(line for curve in drawn for line in curves.lines(curve)))
    if "output" in given:
        file = Path(given["output"])
        results = {"machine": describe(torch.device("cpu")), "threads": threads, "curves": drawn}
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        figure = _figure(len(drawn), 4)
        curves.draw(drawn, figure)
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    return EXIT_OK


def _shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    try:
        batch, length = (1, int(parts[0])) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError) as error:
        raise UsageError(f"--tokens {text}: a number of tokens, or sequences x tokens as in 8x128") from error
    if len(parts) > 2 or batch < 1 or length < 1:
        raise UsageError(f"--tokens {text}: a number of tokens, or sequences x tokens as in 8x128")
    return batch, length


def _models(given: dict[str, Any]) -> dict[str, nn.Module]:
    """The models by what they are called in the table, e.g. "90 %"."""
    if "checkpoint" in given:
        from pins_ext.cli.export import load_or_refuse

        model, _ = load_or_refuse(Path(given["checkpoint"]))
        return {Path(given["checkpoint"]).name: model.float()}
    sparsities = given.get("sparsity", [0.8, 0.9, 0.95])
    if not all(0.7 <= s < 1 for s in sparsities):
        raise UsageError("--sparsity must lie between 0.7 and 1: below, layers stay dense")
    return {f"{s:.1%}".replace(".0%", "%"): _random_bert(s, given.get("layers", 12)) for s in sparsities}


def _random_bert(sparsity: float, layers: int) -> nn.Module:
    """BERT-base with random weights, those of its layers pruned at random."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model: nn.Module = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()
    for name, p in model.named_parameters():
        if ".layer." in name and p.dim() == 2:
            p.data[torch.rand(p.shape) < sparsity] = 0
    return model


def _case(
    models: dict[str, nn.Module], shape: tuple[int, int], threads: int, rounds: int, csr: bool = True
) -> dict[str, Any]:
    first = next(iter(models.values()))
    vocabulary = int(getattr(first.config, "vocab_size", 100))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    memory: dict[str, int] = {}

    def add(name: str, build: Callable[[], Call]) -> None:
        gc.collect()
        before = _resident()
        try:
            call = build()
            call()
        except AbsentError as error:
            absent[name] = str(error)
            return
        calls[name] = call
        memory[name] = _resident() - before

    with ExitStack() as stack:
        add("torch float32", partial(peers.torch_dense, first, inputs, torch.float32))
        add("torch bfloat16", partial(peers.torch_dense, first, inputs, torch.bfloat16))
        try:
            file = stack.enter_context(peers.exported(first, inputs))
        except AbsentError as error:
            absent["onnxruntime, OpenVINO"] = str(error)
        else:
            add("onnxruntime float32", partial(peers.onnxruntime, file, inputs, threads))
            add("OpenVINO float32", partial(peers.openvino, file, inputs, threads, "f32"))
            add("OpenVINO bfloat16", partial(peers.openvino, file, inputs, threads, "bf16"))
            add("OpenVINO int8", partial(peers.openvino_int8, file, inputs, threads))
        for name, model in models.items():
            if csr:
                add(f"torch CSR {name}", partial(peers.torch_csr, model, inputs))
            for values in ("float32", "bfloat16", "int8"):
                add(f"pins_ext {values} {name}", partial(peers.ours, model, inputs, values))
        samples = measure(calls, rounds)
    rows = {name: _summary(*samples[name], memory[name], shape) for name in calls}
    return {"shape": list(shape), "threads": threads, "rows": rows, "absent": absent}


def measure(calls: dict[str, Call], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each call in every round: (wall, processor)."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            call()
            found[name][1].append(time.process_time() - processor)
            found[name][0].append(time.perf_counter() - wall)
    return found


def _summary(wall: list[float], processor: list[float], memory: int, shape: tuple[int, int]) -> dict[str, float]:
    ordered = sorted(wall)
    p50 = statistics.median(ordered)
    return {
        "p50_ms": p50 * 1e3,
        "p95_ms": ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))] * 1e3,
        "least_ms": ordered[0] * 1e3,
        "processor_ms": min(processor) * 1e3,
        "tokens_per_second": shape[0] * shape[1] / p50,
        "resident_mb": memory / 1e6,
    }


def table(case: dict[str, Any]) -> str:
    """A case for people: against onnxruntime, or torch where that is absent."""
    rows = case["rows"]
    key = "processor_ms" if case["threads"] == 1 else "least_ms"
    anchor = next(name for name in ("onnxruntime float32", "torch float32") if name in rows)
    head = f"{case['shape'][0]} x {case['shape'][1]} tokens, {case['threads']} thread(s); ratio to {anchor}"
    lines = [head, f"  {'':<28}{'p50 ms':>9}{'p95 ms':>9}{'cpu ms':>9}{'tokens/s':>11}{'ratio':>8}"]
    lines += [
        f"  {name:<28}{row['p50_ms']:>9.1f}{row['p95_ms']:>9.1f}{row['processor_ms']:>9.1f}"
        f"{row['tokens_per_second']:>11,.0f}{rows[anchor][key] / row[key]:>8.2f}"
        for name, row in rows.items()
    ]
    return "\n".join(lines + [f"  {name:<28}absent: {reason}" for name, reason in case["absent"].items()])


def _resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def _figure(rows: int, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height * rows), layout="constrained")


def _write(file: Path, results: dict[str, Any]) -> None:
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    cases = results["cases"]
    figure = _figure(len(cases), 3.5)
    for case, axes in zip(cases, figure.subplots(len(cases), 1, squeeze=False)[:, 0], strict=True):
        key = "processor_ms" if case["threads"] == 1 else "least_ms"
        names = list(case["rows"])[::-1]
        colours = ["tab:green" if name.startswith("pins_ext") else "tab:gray" for name in names]
        axes.barh(names, [case["rows"][name][key] for name in names], color=colours)
        axes.set_title(f"{case['shape'][0]} x {case['shape'][1]} tokens, {case['threads']} thread(s)")
        axes.set_xlabel("ms")
    figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
