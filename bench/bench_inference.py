"""`pins-ext bench-inference`: a pruned model in every runtime that is here, in one process, taking turns."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pins_ext.runs.errors import EXIT_OK, UsageError
from pins_ext.sparse.inference import candidates

from . import inference_curves as curves
from .inference_contest import Contest, key, random_inputs
from .inference_peers import LEAST_SPARSITY as LEAST_PRUNED
from .machine import describe

ROUNDS = {"cpu": 20, "cuda": 100}
TOKENS = ("1", "16", "128", "8x128")
LEAST_SPARSITY = curves.SPARSITIES[0]


def run(given: dict[str, Any]) -> int:
    """Measure what was asked for; the exit code."""
    threads, device = given.get("threads", 1), _device(given)
    if given.get("curves"):
        return _curves(given, threads, device)
    shapes = [_shape("--tokens", text) for text in given.get("tokens", TOKENS)]
    models = _models(given, device)
    _refuse_long(next(iter(models.values())), shapes)
    torch.set_num_threads(threads)
    cases = []
    try:
        with torch.inference_mode():
            for shape in shapes:
                case = _case(models, shape, threads, given)
                print(table(case), flush=True)
                cases.append(case)
    finally:  # also what an interrupted run has found
        if cases and "output" in given:
            _write(Path(given["output"]), {"machine": describe(device), "threads": threads, "cases": cases})
    return EXIT_OK


def _device(given: dict[str, Any]) -> torch.device:
    device = torch.device(given.get("device", "cpu"))
    if device.type == "cuda":
        if "threads" in given:
            raise UsageError("--threads is for the CPU: leave it out with --device cuda")
        if not torch.cuda.is_available():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
            raise UsageError(f"--device cuda: torch sees no GPU here (it is {torch.__version__}, {built})")
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _curves(given: dict[str, Any], threads: int, device: torch.device) -> int:
    """A curve over sparsity at each of --at, and one over tokens."""
    if "checkpoint" in given:
        raise UsageError("--curves is for the random BERT, whose sparsity can be chosen: leave the checkpoint out")
    sparsities = sorted(given.get("sparsity", curves.SPARSITIES))
    fixed = [_shape("--at", text) for text in given.get("at", curves.AT)]
    shapes = sorted((_shape("--tokens", text) for text in given.get("tokens", curves.TOKENS)), key=math.prod)
    if not all(0 < s < 1 for s in sparsities):
        raise UsageError("--sparsity must lie between 0 and 1")
    if len(sparsities) < 2 or len(shapes) < 2:
        raise UsageError("--curves needs at least two places for each of --sparsity and --tokens, or none for its own")
    torch.set_num_threads(threads)
    places = {shape: set(sparsities) for shape in fixed}
    places |= {shape: places.get(shape, set()) | {curves.SPARSITY} for shape in shapes}
    found: dict[tuple[tuple[int, int], float], dict[str, float]] = {}
    count, begun = sum(map(len, places.values())), time.monotonic()
    with torch.inference_mode():
        for shape, along in places.items():
            for sparsity, times in _along(shape, sorted(along), threads, given, device):
                found[shape, sparsity] = times
                place = f"{shape[0]} x {shape[1]} tokens, {sparsity:.1%} zeros"
                print(f"{len(found)}/{count}: {place}, {time.monotonic() - begun:.0f} s so far", flush=True)
    drawn = [
        curves.summary("sparsity", f"{b} x {n} tokens", [curves.Point(s, found[(b, n), s]) for s in sparsities])
        for b, n in fixed
    ]
    at = [curves.Point(b * n, found[(b, n), curves.SPARSITY]) for b, n in shapes]
    drawn.append(curves.summary("tokens", f"{100 * curves.SPARSITY:.0f} % zeros", at))
    print("\n".join(line for curve in drawn for line in curves.lines(curve)))
    if "output" in given:
        file = Path(given["output"])
        results = {"machine": describe(device), "threads": threads, "curves": drawn}
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        _plot(file, lambda figure: curves.draw(drawn, figure), len(drawn), 4)
    return EXIT_OK


def _along(
    shape: tuple[int, int], sparsities: list[float], threads: int, given: dict[str, Any], device: torch.device
) -> Iterator[tuple[float, dict[str, float]]]:
    """(sparsity, milliseconds by runtime), one after another.

    Dense runtimes take as long whatever is zero: they are built once, and measured again beside each of ours.
    """
    layers = given.get("layers", 12)
    first = _random_bert(sparsities[0], layers, device)
    with ExitStack() as stack:
        dense = Contest(random_inputs(first, shape), threads)
        dense.add_dense(first, stack)
        for name, reason in dense.absent.items():
            print(f"  {name}: absent: {reason}", flush=True)
        for sparsity in sparsities:
            contest = dense.beside()
            contest.add_ours(_random_bert(sparsity, layers, device))
            rows = contest.rows(given.get("rounds", ROUNDS[device.type]), given.get("seconds", curves.SECONDS))
            yield sparsity, {name: row[key(threads, device.type)] for name, row in rows.items()}


def _shape(flag: str, text: str) -> tuple[int, int]:
    parts = text.split("x")
    try:
        batch, length = (1, int(parts[0])) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError) as error:
        raise UsageError(f"{flag} {text}: a number of tokens, or sequences x tokens as in 8x128") from error
    if len(parts) > 2 or batch < 1 or length < 1:
        raise UsageError(f"{flag} {text}: a number of tokens, or sequences x tokens as in 8x128")
    return batch, length


def _models(given: dict[str, Any], device: torch.device) -> dict[str, nn.Module]:
    """The models by what they are called in the table, e.g. "90 %"."""
    if "checkpoint" in given:
        from pins_ext.cli.export import load_or_refuse

        model, _ = load_or_refuse(Path(given["checkpoint"]))
        # A cache of keys and values is of no use to one call, and torch.onnx can't export it.
        model.config.use_cache = False
        if not candidates(model, LEAST_PRUNED)[0]:
            raise UsageError(
                f"{given['checkpoint']} has no linear layer with {LEAST_PRUNED:.0%} zeros: prune it first, or leave "
                f"the checkpoint out"
            )
        return {Path(given["checkpoint"]).name: model.float().to(device)}
    sparsities = given.get("sparsity", [0.8, 0.9, 0.95])
    if not all(LEAST_SPARSITY <= s < 1 for s in sparsities):
        raise UsageError(f"--sparsity must be at least {LEAST_SPARSITY}, where the curves begin, and below 1")
    return {f"{s:.1%}".replace(".0%", "%"): _random_bert(s, given.get("layers", 12), device) for s in sparsities}


def _refuse_long(model: nn.Module, shapes: Sequence[tuple[int, int]]) -> None:
    most, longest = getattr(model.config, "max_position_embeddings", None), max(length for _, length in shapes)
    if isinstance(most, int) and 0 < most < longest:
        raise UsageError(f"--tokens {longest}: {type(model).__name__} reads {most} at most; 4x{most} is four sequences")


def _random_bert(sparsity: float, layers: int, device: torch.device) -> nn.Module:
    """BERT-base with random weights, those of its layers pruned at random."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model: nn.Module = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()
    for name, p in model.named_parameters():
        if ".layer." in name and p.dim() == 2:
            p.data[torch.rand(p.shape) < sparsity] = 0
    return model.to(device)


def _case(models: dict[str, nn.Module], shape: tuple[int, int], threads: int, given: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(models.values()))
    with ExitStack() as stack:
        contest = Contest(random_inputs(first, shape), threads)
        contest.add_dense(first, stack)
        for name, model in models.items():
            contest.add_csr(model, name)
            contest.add_ours(model, name)
        device = contest.device.type
        rows = contest.rows(given.get("rounds", ROUNDS[device]), given.get("seconds", math.inf))
    return {"shape": list(shape), "threads": threads, "device": device, "rows": rows, "absent": contest.absent,
            "launched": contest.launched}  # fmt: skip


def table(case: dict[str, Any]) -> str:
    """A case for people: against onnxruntime, or torch where that is absent; on a GPU against cuBLAS."""
    rows = case["rows"]
    time = key(case["threads"], case["device"])
    anchor = next(name for name in ("onnxruntime float32", "cuBLAS bfloat16", "torch float32") if name in rows)
    head = f"{_title(case)}; ratio to {anchor}"
    titles = f"{'p50 ms':>9}{'p95 ms':>9}{'cpu ms':>9}{'tokens/s':>11}{'ratio':>8}{'MB':>7}{'error':>9}"
    names = max(28, *(len(name) + 1 for name in rows))
    lines = [head, f"  {'':<{names}}{titles}"]
    lines += [
        f"  {name:<{names}}{row['p50_ms']:>9.1f}{row['p95_ms']:>9.1f}{row['processor_ms']:>9.1f}"
        f"{row['tokens_per_second']:>11,.0f}{rows[anchor][time] / row[time]:>8.2f}"
        f"{row['resident_mb']:>7,.0f}{row['error']:>9.0e}"
        for name, row in rows.items()
    ]
    lines += [f"  {name:<{names}}{reason}" for name, reason in case["launched"].items()]
    return "\n".join(lines + [f"  {name:<{names}}absent: {reason}" for name, reason in case["absent"].items()])


def _title(case: dict[str, Any]) -> str:
    where = f"{case['threads']} thread(s)" if case["device"] == "cpu" else "GPU"
    return f"{case['shape'][0]} x {case['shape'][1]} tokens, {where}"


def _plot(file: Path, draw: Callable[[Any], None], rows: int, height: float) -> None:
    """A picture beside the JSON; without matplotlib the figures are not lost."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f"no plot beside {file}: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(9, height * rows), layout="constrained")
    draw(figure)
    figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})


def _write(file: Path, results: dict[str, Any]) -> None:
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _plot(file, partial(_draw, results["cases"]), len(results["cases"]), 3.5)


def _draw(cases: Sequence[dict[str, Any]], figure: Any) -> None:
    for case, axes in zip(cases, figure.subplots(len(cases), 1, squeeze=False)[:, 0], strict=True):
        time = key(case["threads"], case["device"])
        names = list(case["rows"])[::-1]
        colours = ["tab:green" if name.startswith("pins_ext") else "tab:gray" for name in names]
        axes.barh(names, [case["rows"][name][time] for name in names], color=colours)
        axes.set_title(_title(case))
        axes.set_xlabel("ms")
