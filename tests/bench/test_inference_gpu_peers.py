"""GPU peers of `bench-inference`: their arithmetic on the CPU, which ones are asked, what is refused, and on a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from pins_ext.bench import bench_grouped, bench_inference, gpu_check, inference_contest, inference_peers
from pins_ext.bench import inference_gpu_peers as gpu_peers
from pins_ext.bench.graphs import captured
from pins_ext.bench.inference_contest import Contest, first_output, random_inputs
from pins_ext.bench.inference_gpu_peers import LAYERS, Fp8Linear, Int4Linear, int4_codes, two_of_four
from pins_ext.bench.inference_peers import AbsentError
from pins_ext.cli.main import main


def small_bert(width: int = 96) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=width)
    model = BertModel(config, add_pooling_layer=False).eval()
    for name, p in model.named_parameters():
        if ".layer." in name and p.dim() == 2:
            p.data[torch.rand(p.shape) < 0.9] = 0
    return model


def weights() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 96, generator=generator).bfloat16()
    return (
        weight,
        torch.randn(48, generator=generator).bfloat16(),
        torch.randn(2, 3, 96, generator=generator).bfloat16(),
    )


def test_four_bits_are_the_rounded_weights() -> None:
    weight, bias, x = weights()
    codes, scales = int4_codes(weight, 32)
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 15
    step, middle = scales.float().transpose(0, 1).unsqueeze(-1).unbind(2)
    rounded = ((codes.unflatten(1, (-1, 32)) - 8) * step + middle).flatten(1)
    # Half a step, and what the middle loses as a bfloat16 of at most eight steps.
    bound = (step * (0.5 + 8 / 256)).expand(-1, -1, 32).flatten(1) * 1.02
    assert ((rounded - weight.float()).abs() <= bound + 1e-6).all()
    y = Int4Linear(weight, bias)(x)
    assert y.shape == (2, 3, 48)
    torch.testing.assert_close(y.float(), F.linear(x.float(), rounded, bias.float()), rtol=2e-2, atol=5e-2)
    assert Int4Linear(weight.new_zeros(48, 96), None)(x).count_nonzero() == 0


rowwise = pytest.mark.skipif(torch.__version__ < "2.13", reason="this torch's CPU takes one scale, not one a row")


@rowwise
def test_eight_bits_are_the_rounded_weights() -> None:
    weight, bias, x = weights()
    y = Fp8Linear(weight, bias)(x)
    expected = F.linear(x.float(), weight.float(), bias.float())
    # Three bits of fraction for each of 96 factors: errors average out.
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.05 * expected.norm()
    assert (y.float() - expected).abs().max() > 0
    assert Fp8Linear(weight.new_zeros(48, 96), None)(x).count_nonzero() == 0


def test_torch_takes_the_operands_on_a_gpu() -> None:
    """By the checks of torch's own meta kernels, which stand for CUDA: sizes, dtypes and strides."""
    weight, bias, x = (t.to("meta") for t in weights())
    layer: Any = Fp8Linear(weight, bias)
    y = layer(x)
    assert (y.shape, y.dtype) == ((2, 3, 48), torch.bfloat16)
    assert (layer.weight.shape, layer.weight.dtype) == ((48, 96), torch.bfloat16)
    # Eight outputs, tiles of 16 inputs by twos, 32 lanes; four tiles at once where the inputs allow it.
    assert Int4Linear(weight, bias).packed.shape == (6, 3, 32, 1)
    assert Int4Linear(torch.empty(8, 192, device="meta"), None).packed.shape == (1, 3, 32, 2)
    assert Int4Linear(torch.empty(8, 256, device="meta"), None).packed.shape == (1, 2, 32, 4)


def test_two_of_four_keeps_the_larger_two() -> None:
    weight = torch.tensor([[1.0, -5.0, 3.0, 0.0, 0.0, 0.0, 2.0, 0.0]])
    assert two_of_four(weight).tolist() == [[0.0, -5.0, 3.0, 0.0, 0.0, 0.0, 2.0, 0.0]]
    kept = two_of_four(torch.randn(16, 64))
    assert torch.equal((kept != 0).view(16, 16, 4).sum(-1), torch.full((16, 16), 2))


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (Int4Linear, (20, 96), "takes outputs of 16 and inputs of 32, not 20 x 96"),
        (Int4Linear, (32, 40), "takes outputs of 16 and inputs of 32, not 32 x 40"),
        (Fp8Linear, (30, 32), "takes multiples of 16, not 30 x 32"),
        (gpu_peers.two_of_four_linear, (30, 33), "2:4 takes inputs of 4, not 30 x 33"),
    ],
)
def test_shapes_that_torch_has_no_kernels_for(
    make: Callable[[Tensor, None], nn.Module], shape: tuple[int, int], reason: str
) -> None:
    with pytest.raises(AbsentError, match=reason):
        make(torch.randn(shape).bfloat16(), None)


@pytest.mark.parametrize("name", ["torch int4", pytest.param("torch fp8", marks=rowwise)])
def test_a_model_of_fewer_bits_answers_nearly_as_before(name: str) -> None:
    model = small_bert()
    inputs = random_inputs(model, (2, 9))
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        call = gpu_peers.with_layers(model, inputs, name)
        error = (first_output(call()) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.2
    # The caller's model is as it was, and what is dense stays dense.
    assert all(p.dtype == torch.float32 for p in model.parameters())
    odd = small_bert(width=70)
    with pytest.raises(AbsentError, match=r"not (64 x 70|70 x 64)"):
        gpu_peers.with_layers(odd, inputs, name)


def test_a_layer_of_two_names_stays_one() -> None:
    model: Any = small_bert()
    model.encoder.layer[1] = model.encoder.layer[0]
    made: list[nn.Module] = []
    original = LAYERS["torch int4"]

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        made.append(original[1](weight, bias))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(LAYERS, "torch int4", (original[0], make))
        gpu_peers.with_layers(model, random_inputs(model, (1, 4)), "torch int4")
    assert len(made) == 6


def test_what_torch_refuses_is_absent_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU has no 2:4 kernels; and a GPU may be too old for what it is asked."""
    model = small_bert()
    inputs = random_inputs(model, (1, 4))
    with pytest.raises(AbsentError, match=rf"torch {torch.__version__.split('+')[0]}.*torch says: "):
        gpu_peers.with_layers(model, inputs, "torch 2:4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A40")
    reason = "NVIDIA A40 has compute capability 8.6, 8.9 is needed"
    with pytest.raises(AbsentError, match=reason), gpu_peers.kernels_for("torch fp8", torch.device("cuda", 0)):
        pytest.fail("was tried")
    with gpu_peers.kernels_for("torch int4", torch.device("cuda", 0)):
        pass
    with (
        pytest.raises(AbsentError, match="no attribute 'gone'"),
        gpu_peers.kernels_for("torch int4", torch.device("cpu")),
    ):
        torch.ops.aten.gone  # noqa: B018


def test_who_is_asked_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and order, without a GPU: nobody runs."""
    model = small_bert()
    contest = Contest(random_inputs(model, (1, 4)), 1)
    monkeypatch.setattr(contest, "device", torch.device("cuda", 0))
    asked: list[str] = []
    monkeypatch.setattr(contest, "_add", lambda name, *_: asked.append(name))
    with ExitStack() as stack, torch.inference_mode():
        contest.add_dense(model, stack)
        contest.add_csr(model, "90%")
        contest.add_ours(model, "90%")
    assert asked == [
        "cuBLAS float32", "cuBLAS bfloat16", "torch int4", "torch fp8", "torch 2:4",
        "torch CSR 90%", "pins_ext float32 90%", "pins_ext bfloat16 90%", "pins_ext float16 90%",
    ]  # fmt: skip


def test_a_call_that_no_graph_holds_is_measured_with_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(call: Callable[[], object], _: torch.device) -> Callable[[], object]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    def exported(*_: object) -> None:
        raise AbsentError("left out: it takes seconds")

    monkeypatch.setattr(inference_contest, "captured", captured)
    monkeypatch.setattr(inference_peers, "exported", exported)
    with torch.inference_mode():
        case = bench_inference._case({"90%": small_bert()}, (1, 4), 1, {"rounds": 1})
    assert "torch float32" in case["rows"]
    said = bench_inference.table(case)
    assert "torch float32" in case["launched"]
    assert "without a CUDA graph, launches included: operation not permitted when stream is capturing" in said


def test_a_gpus_table_is_against_cublas() -> None:
    row = {"p50_ms": 2.0, "p95_ms": 3.0, "least_ms": 1.0, "processor_ms": 9.0, "tokens_per_second": 1.0,
           "resident_mb": 1.0, "error": 0.0}  # fmt: skip
    rows = {
        "cuBLAS float32": row | {"least_ms": 4.0},
        "cuBLAS bfloat16": row,
        "pins_ext bfloat16 90%": row | {"least_ms": 0.5},
    }
    case = {
        "shape": [1, 4],
        "threads": 1,
        "device": "cuda",
        "rows": rows,
        "absent": {"torch fp8": "too old"},
        "launched": {},
    }
    head, _, *lines, absent = bench_inference.table(case).splitlines()
    assert head == "1 x 4 tokens, GPU; ratio to cuBLAS bfloat16"
    assert [line.split()[-3] for line in lines] == ["0.25", "1.00", "2.00"]
    assert absent.endswith("absent: too old")


def test_flags_of_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, message in [
        (["--device", "cuda", "--threads", "2"], "--threads is for the CPU: leave it out with --device cuda"),
        (["--device", "gpu"], "--device"),
    ]:
        assert main(["bench-inference", *argv]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench-inference", "--device", "cuda"]) == 2
    assert f"torch sees no GPU here (it is {torch.__version__}, " in capsys.readouterr().err


def test_where_the_output_goes_is_looked_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, message in [
        (tmp_path / "none" / "a.json", "there is no folder"),
        (tmp_path, "is a folder: name a file"),
        (tmp_path / "a.svg", "the name must end in .json"),
    ]:
        assert main(["bench-inference", "--layers", "1", "--output", str(file)]) == 2
        assert message in capsys.readouterr().err


def test_without_matplotlib_the_figures_are_written_and_the_plot_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bench_inference._write(tmp_path / "a.json", {"cases": []})
    assert json.loads((tmp_path / "a.json").read_text()) == {"cases": []}
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "a.svg").exists()


def test_the_check_measures_the_kernel_first_and_names_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [stage.name for stage in gpu_check.stages("9.0", tmp_path)]
    assert names[:3] == ["build", "tests: test_cuda_grouped", "bench: decode"]
    assert "tests: test_inference_gpu_peers" in names
    stage = gpu_check.inference_stage(tmp_path)
    assert stage.command[2:6] == ["pins_ext", "bench-inference", "--device", "cuda"]
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda _: None)
    result, _ = gpu_check.run(gpu_check.inference_stage(tmp_path), 30)
    assert result.outcome == "could not start"
    assert result.remark == "transformers is not installed: pip install transformers"


# ---- on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_layer_is_nearly_the_dense_one(name: str) -> None:
    weight = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(256, device="cuda", dtype=torch.bfloat16)
    if name == "torch 2:4":
        weight = two_of_four(weight)
    for tokens in (1, 4, 128):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        with torch.inference_mode(), gpu_peers.kernels_for(name, x.device):
            y = LAYERS[name][1](weight, bias)(x)
        expected = F.linear(x.float(), weight.float(), bias.float())
        most = {"torch int4": 0.15, "torch fp8": 0.06, "torch 2:4": 0.01}[name]
        assert (y.float() - expected).norm() < most * expected.norm()


@pytest.mark.gpu
def test_four_bits_on_a_gpu_are_those_of_the_cpu() -> None:
    weight, bias, x = weights()
    codes, scales = int4_codes(weight, 32)
    step, middle = scales.float().transpose(0, 1).unsqueeze(-1).unbind(2)
    rounded = ((codes.unflatten(1, (-1, 32)) - 8) * step + middle).flatten(1)
    y = Int4Linear(weight.cuda(), bias.cuda())(x.cuda()).float().cpu()
    torch.testing.assert_close(y, F.linear(x.float(), rounded, bias.float()), rtol=2e-2, atol=5e-2)


@pytest.mark.gpu
def test_every_runtime_on_a_gpu_gives_the_models_answer() -> None:
    model = small_bert().cuda()
    with torch.inference_mode(), ExitStack() as stack:
        contest = Contest(random_inputs(model, (2, 9)), 1)
        contest.add_dense(model, stack)
        contest.add_csr(model, "90%")
        contest.add_ours(model, "90%")
        rows = contest.rows(3, 5.0)
    assert {"cuBLAS float32", "cuBLAS bfloat16", "pins_ext float32 90%", "pins_ext bfloat16 90%"} <= rows.keys()
    for name, error in contest.errors.items():
        # 2:4 drops weights of groups that hold three.
        assert error < (0.5 if name in LAYERS else 1e-4 if "float32" in name or "CSR" in name else 0.05), name
    assert not contest.launched.keys() - {"torch CSR 90%"}


@pytest.mark.gpu
def test_a_captured_call_follows_its_inputs() -> None:
    x, y = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    replay = captured(lambda: y.copy_(x * 2), x.device)
    x.fill_(3)
    replay()
    torch.cuda.synchronize()
    assert y.tolist() == [6.0] * 8


@pytest.mark.gpu
def test_the_decode_benchmark_names_every_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_grouped.main(["--shrink", "8", "--rounds", "2"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in LAYERS)
