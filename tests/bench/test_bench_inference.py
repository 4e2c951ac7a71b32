"""`pins-ext bench-inference`: a small run of everything that is installed, and what is not is named."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.small_models import characters, decoder_config
from torch import Tensor
from transformers import BertConfig, BertModel, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from pins_ext.bench import bench_inference, inference_peers
from pins_ext.bench.inference_contest import Contest, first_output, measure, random_inputs
from pins_ext.bench.inference_curves import Point, crossing, lines, summary
from pins_ext.cli.main import main


def test_every_runtime_that_is_here_takes_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    argv = ["--layers", "1", "--sparsity", "0.9", "--tokens", "2x5", "--rounds", "2", "--output", str(file)]
    assert main(["bench-inference", *argv]) == 0
    said = capsys.readouterr().out
    assert "2 x 5 tokens, 1 thread(s)" in said
    assert all(line.startswith(("  ", "2 x 5 tokens")) for line in said.splitlines())
    cases = json.loads(file.read_text())["cases"]
    assert [case["shape"] for case in cases] == [[2, 5]]
    for case in cases:
        names = {"torch float32", "torch bfloat16", "torch CSR 90%"}
        names |= {f"pins_ext {values} 90%" for values in ("float32", "bfloat16", "int8")}
        assert names <= case["rows"].keys()
        for row in case["rows"].values():
            assert 0 < row["least_ms"] <= row["p50_ms"] <= row["p95_ms"]
        rows = case["rows"]
        for values, most in (("float32", 1e-5), ("bfloat16", 1e-2), ("int8", 5e-2)):
            assert 0 < rows[f"pins_ext {values} 90%"]["error"] < most
        assert rows["torch float32"]["error"] == 0
        # The embeddings of both, and nine tenths of a layer's 28 MB less, but for what libraries load on the way.
        assert 90 < rows["pins_ext float32 90%"]["resident_mb"] < rows["torch float32"]["resident_mb"] - 10
        assert "MB    error" in said
        for name, reason in case["absent"].items():
            assert name in said
            assert "pip install" in reason
    assert file.with_suffix(".svg").is_file()


def checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(decoder_config())
    for name, p in model.named_parameters():
        if ".h." in name and p.dim() == 2:
            p.data[torch.rand(p.shape) < 0.9] = 0
    model.save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder


def test_a_checkpoint_without_zeros_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT2LMHeadModel(decoder_config()).save_pretrained(tmp_path / "dense")
    assert main(["bench-inference", str(tmp_path / "dense")]) == 2
    said = capsys.readouterr()
    assert "has no linear layer with 40% zeros: prune it first" in said.err
    assert "tokens" not in said.out


def test_an_encoder_and_decoder_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def exported(*_: object) -> None:
        raise inference_peers.AbsentError("left out: it takes seconds")

    monkeypatch.setattr(inference_peers, "exported", exported)
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    for p in model.parameters():
        p.data[torch.rand(p.shape) < 0.9] = 0
    with torch.inference_mode():
        case = bench_inference._case({"90%": model}, (2, 3), 1, {"rounds": 1})
    assert case["rows"]["pins_ext float32 90%"]["error"] < 1e-5


@pytest.mark.slow
def test_a_checkpoint_that_torch_can_t_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")

    def export(*_: object, **__: object) -> None:
        raise RuntimeError("step 1/3") from ValueError("an operator is missing\nmore of it")

    monkeypatch.setattr(torch.onnx, "export", export)
    folder = checkpoint(tmp_path / "a-checkpoint-with-a-name-that-is-long")
    assert main(["bench-inference", str(folder), "--tokens", "5", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("1 x 5 tokens"))
    table = [line for line in lines[begin + 1 :] if line.startswith("  ")]
    *rows, absent = table
    assert len({len(line) for line in rows}) == 1
    assert sum(folder.name in line for line in rows) == 4
    assert absent.endswith("absent: torch.onnx can't export GPT2LMHeadModel: an operator is missing")


@pytest.mark.slow
def test_a_checkpoint_that_generates_takes_part(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    argv = [
        str(checkpoint(tmp_path / "gpt2")),
        "--tokens",
        "2x5",
        "--rounds",
        "1",
        "--output",
        str(tmp_path / "a.json"),
    ]
    assert main(["bench-inference", *argv]) == 0
    (case,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert case["rows"]["onnxruntime float32"]["error"] < 1e-5
    assert case["rows"]["pins_ext float32 gpt2"]["error"] < 1e-5


def test_tokens_are_a_length_or_sequences_of_one() -> None:
    assert [bench_inference._shape("--tokens", text) for text in ("16", "2x5")] == [(1, 16), (2, 5)]


def test_bad_requests_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in [
        (["--tokens", "8y"], "--tokens 8y: a number of tokens, or sequences x tokens as in 8x128"),
        (["--tokens", "1x2x3"], "sequences x tokens as in 8x128"),
        (["--sparsity", "0.2"], "--sparsity must be at least 0.5"),
        (["--threads", "0"], "--threads must be between 1 and 1024, got 0"),
        (["--threads", "100000"], "--threads must be between 1 and 1024, got 100000"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--layers", "1", "--tokens", "8", "2x513"], "--tokens 513: BertModel reads 512 at most"),
        (["--layers", "0"], "--layers must be at least 1"),
        (["none", "--sparsity", "0.9"], "leave them out with a checkpoint"),
        (["none"], "none is no folder"),
        (["none", "--curves"], "leave the checkpoint out"),
        (["--curves", "--at", "3y"], "--at 3y: a number of tokens, or sequences x tokens as in 8x128"),
        (["--at", "1x128"], "--at is for --curves"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--curves", "--sparsity", "0.5"], "at least two places"),
        (["--curves", "--sparsity", "0.5", "1.5"], "--sparsity must lie between 0 and 1"),
    ]:
        assert main(["bench-inference", *argv]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_curves_cover_sparsity_and_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = []

    def exported(_: object, inputs: dict[str, Tensor]) -> None:
        exports.append(tuple(inputs["input_ids"].shape))
        raise inference_peers.AbsentError("left out: an export for each shape would take a minute")

    monkeypatch.setattr(inference_peers, "exported", exported)
    file = tmp_path / "curves.json"
    argv = ["--curves", "--layers", "1", "--sparsity", "0.5", "0.98", "--tokens", "2x3", "1", "--rounds", "1"]
    assert main(["bench-inference", *argv, "--at", "1", "3x4", "--output", str(file)]) == 0
    said = capsys.readouterr().out
    assert "1/6: 1 x 1 tokens, 50.0% zeros, " in said
    assert "6/6: 2 x 3 tokens, 90.0% zeros, " in said
    assert "onnxruntime, OpenVINO: absent: left out" in said
    assert "pins_ext float32 is faster than: torch float32 " in said
    # What is dense is built once for a shape.
    assert exports == [(1, 1), (3, 4), (2, 3)]
    found = json.loads(file.read_text())["curves"]
    assert [(c["over"], c["where"], c["x"]) for c in found] == [
        ("sparsity", "1 x 1 tokens", [0.5, 0.98]),
        ("sparsity", "3 x 4 tokens", [0.5, 0.98]),
        ("tokens", "90 % zeros", [1, 6]),
    ]
    for curve in found:
        assert {"torch float32", "pins_ext float32", "pins_ext int8"} <= curve["series"].keys()
        assert all(len(times) == 2 and min(times) > 0 for times in curve["series"].values())
    assert file.with_suffix(".svg").is_file()


def test_runtimes_take_turns_until_the_time_is_over() -> None:
    said: list[str] = []
    calls = {name: partial(said.append, name) for name in ("a", "b", "c")}
    found = measure(calls, 5)
    assert said == ["a", "b", "c"] * 5
    assert all(len(wall) == len(processor) == 5 for wall, processor in found.values())
    assert {len(wall) for wall, _ in measure(calls, 50, seconds=0.0).values()} == {3}


@pytest.mark.slow
def test_every_runtime_gives_the_models_answer() -> None:
    """Those that are installed: float32 within rounding, the others near it."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
    model = BertModel(config, add_pooling_layer=False).eval()
    for name, p in model.named_parameters():
        if ".layer." in name and p.dim() == 2:
            p.data[torch.rand(p.shape) < 0.9] = 0
    with torch.inference_mode(), ExitStack() as stack:
        contest = Contest(random_inputs(model, (2, 9)), 1)
        contest.add_dense(model, stack)
        contest.add_csr(model, "90%")
        contest.add_ours(model, "90%")
        expected = model(**contest.inputs).last_hidden_state
        for name, call in contest.calls.items():
            found = first_output(call())
            wide = next((gap for kind, gap in (("bfloat16", 0.1), ("int8", 0.3)) if kind in name), 2e-5)
            assert found.shape == expected.shape, name
            assert (found - expected).abs().max() < wide, name
    assert {"torch float32", "torch CSR 90%", "pins_ext int8 90%"} <= contest.calls.keys()
    assert contest.calls.keys().isdisjoint(contest.absent)


@pytest.mark.parametrize(
    ("ours", "word", "place"),
    [
        ([1.0, 1.0, 1.0], "everywhere", None),
        ([4.0, 5.0, 6.0], "nowhere", None),
        ([8.0, 8.0, 0.5], "from", 0.7),  # log ratios -2, -2, 2: half way
        ([1.0, 4.0, 4.0], "up to", 0.4),  # 1, -1
        ([1.0, 4.0, 1.0], "on and off", None),
    ],
)
def test_crossings(ours: list[float], word: str, place: float | None) -> None:
    points = [Point(x, {"pins_ext a": ms, "b": 2.0}) for x, ms in zip((0.3, 0.5, 0.9), ours, strict=True)]
    found = crossing(points, "pins_ext a", "b")
    assert found == (word, None if place is None else pytest.approx(place))
    assert word in "\n".join(lines(summary("sparsity", "here", points)))
