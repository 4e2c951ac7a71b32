"""Models made sparse for inference answer as before, in every way that people run them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import characters, decoder_config, encoder_folder
from helpers.sparse_models import assert_close, pruned, sparse
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from pins_ext import contention
from pins_ext.files.atomic import SaveError
from pins_ext.sparse.calibration import Calibration, Trial
from pins_ext.sparse.format import load_sparse, save_sparse
from pins_ext.sparse.inference import sparsify_for_inference
from pins_ext.sparse.linear import SparseLinear


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return pruned(BertForSequenceClassification(BertConfig(**sizes, intermediate_size=130, num_labels=3)), seed=seed)


def sparse_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def test_a_bert_answers_as_before_for_one_to_many_tokens() -> None:
    model = bert()
    fast = sparse(model)
    assert len(sparse_layers(fast)) == 14
    for shape in [(1, 1), (1, 2), (1, 17), (3, 40)]:
        ids = torch.randint(0, 40, shape)
        with torch.inference_mode():
            assert_close(fast(ids).logits, model(ids).logits)
        with torch.no_grad():
            assert_close(fast(ids).logits, model(ids).logits)
    # Outside of either too: nothing learns there, and nothing fails.
    assert_close(fast(ids).logits.detach(), model(ids).logits.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_keep_their_dtype(dtype: torch.dtype) -> None:
    model = bert().to(dtype)
    fast = sparse(model)
    ids = torch.randint(0, 40, (2, 9))
    with torch.inference_mode():
        logits = fast(ids).logits
        exact = bert()
        exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        assert logits.dtype == dtype
        # No further from the float32 model of these weights than the dense 16-bit model is, give or take its rounding.
        error = (logits.float() - exact(ids).logits).abs().max()
        dense = (model(ids).logits.float() - exact(ids).logits).abs().max()
        assert error <= dense + 4 * torch.finfo(dtype).eps * exact(ids).logits.abs().max()


def test_generation_with_a_cache_gives_the_same_tokens() -> None:
    """Conv1D layers, whose weight is transposed, and one token at a time after the prompt."""
    torch.manual_seed(0)
    config = decoder_config()
    config.n_embd, config.n_layer = 64, 2
    model = pruned(GPT2LMHeadModel(config), 0.8)
    fast = sparse(model)
    assert len(sparse_layers(fast)) == 8 + ("lm_head" in sparse_layers(fast))
    ids = torch.randint(1, 257, (2, 7))
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(fast.generate(ids, attention_mask=torch.ones_like(ids), **options), expected)
    beams = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, **options)
    assert torch.equal(fast.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, **options), beams)


def test_a_model_that_asks_its_layers_for_a_dtype() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = pruned(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)))
    fast = sparse(model)
    assert "decoder.block.0.layer.2.DenseReluDense.wo" in sparse_layers(fast)
    ids = torch.randint(1, 40, (2, 5))
    with torch.inference_mode():
        assert_close(
            fast(input_ids=ids, decoder_input_ids=ids).logits, model(input_ids=ids, decoder_input_ids=ids).logits
        )


def test_pipelines_run(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(tmp_path / "encoder"))
    config = BertConfig.from_pretrained(tmp_path / "encoder")
    model = pruned(BertForSequenceClassification(config))
    texts = ["a cab", "a bad cab in a bag", "x"]
    dense = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts, batch_size=2)
    fast = pipeline("text-classification", model=sparse(model), tokenizer=tokenizer)(texts, batch_size=2)
    assert [a["label"] for a in dense] == [b["label"] for b in fast]
    assert [a["score"] for a in dense] == pytest.approx([b["score"] for b in fast], abs=1e-6)
    torch.manual_seed(0)
    decoder = pruned(GPT2LMHeadModel(decoder_config()))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    dense = pipeline("text-generation", model=decoder, tokenizer=characters())("a cab", **options)
    assert pipeline("text-generation", model=sparse(decoder), tokenizer=characters())("a cab", **options) == dense


def test_from_a_sparse_checkpoint_to_a_sparse_model(tmp_path: Path) -> None:
    model = bert()
    save_sparse(model, tmp_path / "sparse")
    fast = sparse(load_sparse(tmp_path / "sparse"))
    ids = torch.randint(0, 40, (2, 9))
    assert_close(fast(ids).logits, model(ids).logits)


def test_two_models_in_two_threads_at_once() -> None:
    models = [bert(0), bert(1)]
    fast = [sparse(model) for model in models]
    inputs = [torch.randint(0, 40, (2, n)) for n in (9, 30)]
    expected = [[model(x).logits for x in inputs] for model in fast]
    right: list[bool] = []

    def work(i: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                right.extend(torch.equal(fast[i](x).logits, e) for x, e in zip(inputs, expected[i], strict=True))

    jobs = [threading.Thread(target=work, args=(i,)) for i in (0, 1, 0, 1)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert right == [True] * 160


def test_gradients_are_refused_not_wrong() -> None:
    """Answers are the same where autograd records, without a warning; what asks for gradients is told."""
    dense = bert()
    fast, ids = sparse(dense), torch.randint(0, 40, (2, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = fast(ids).logits
    with torch.inference_mode():
        assert torch.equal(logits, fast(ids).logits)
    with pytest.raises(RuntimeError, match="a model made for inference has no gradients"):
        logits.sum().backward()


@pytest.mark.parametrize("theirs", [0.0, 1.2])
def test_a_disturbed_measurement_says_so(
    theirs: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wall = iter(range(1, 3))
    monkeypatch.setattr(contention, "_now", lambda: ((now := next(wall)), now * theirs, 0.0))
    model = copy.deepcopy(bert())
    model = sparsify_for_inference(model, min_sparsity=0.5, save_to=tmp_path / "measured.json")
    share = theirs / (os.cpu_count() or 1) if theirs else None
    assert model.pins_calibration.others == share
    assert json.loads((tmp_path / "measured.json").read_text())["others"] == share
    assert ("other processes used" in capsys.readouterr().out) == bool(theirs)


def test_torch_compile_is_tolerated() -> None:
    model = sparse(bert())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for n in (5, 7):
        ids = torch.randint(0, 40, (1, n))
        with torch.inference_mode():
            assert_close(compiled(ids).logits, model(ids).logits)


def test_what_packed_weights_can_not_do_is_refused_politely(tmp_path: Path) -> None:
    model = sparse(bert())
    for attempt in (
        lambda: pickle.dumps(model),
        lambda: torch.save(model, tmp_path / "model.pt"),
        lambda: model.state_dict(),
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: model.load_state_dict({}),
        lambda: save_sparse(model, tmp_path / "sparse"),
        lambda: sparse(bert()).to("meta"),
        lambda: setattr(model.bert.encoder.layer[0].output.dense, "weight", nn.Parameter(torch.ones(2))),
    ):
        with pytest.raises((TypeError, RuntimeError), match=r"save the model with pins_ext\.save_sparse before"):
            attempt()
    assert model.to("cpu") is model
    ids = torch.randint(0, 40, (1, 5))
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    assert "sparsity=0.9" in repr(model)


def test_a_cast_of_the_model_changes_activations_only() -> None:
    fast = sparse(bert())
    ids = torch.randint(0, 40, (1, 5))
    exact = fast(ids).logits
    half = fast.to(torch.bfloat16)(ids).logits
    assert half.dtype == torch.bfloat16
    assert fast.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


def test_layers_that_others_read_stay_dense() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Sequential(nn.Linear(32, 32))
            self.encoder = nn.TransformerEncoderLayer(32, 2, batch_first=True)
            self.hooked = nn.Linear(32, 32)
            self.patched = nn.Linear(32, 32)
            self.unused = nn.Linear(32, 0)
            self.half_full = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.half_full(self.patched(self.hooked(self.encoder(self.own(x)))))

    model = pruned(Two())
    model.half_full.weight.data.fill_(1)
    model.hooked.register_forward_hook(lambda *_: None)
    model.patched.forward = lambda x: 2 * nn.Linear.forward(model.patched, x)
    fast = sparse(model)
    assert sparse_layers(fast) == ["own.0"]
    assert set(fast.pins_calibration.dense.values()) == {
        "TransformerEncoderLayer reads its weight directly",
        "it is a NonDynamicallyQuantizableLinear, which may compute something else",
        "it has hooks",
        "its forward was replaced",
        "it has no weights",
        "less than 70% zeros",
    }
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        assert_close(fast(x), model(x))


def test_calibration_measures_prints_and_saves(tmp_path: Path) -> None:
    model = bert()
    said: list[str] = []
    fast = sparsify_for_inference(model, tokens=(1, 40), say=said.append, save_to=tmp_path / "calibration.json")
    calibration = fast.pins_calibration
    assert isinstance(calibration, Calibration)
    tried = [name for trial in calibration.trials for name in trial.layers]
    assert len(tried) == len(set(tried)) == 14
    for trial in calibration.trials:
        for name in trial.layers:
            assert isinstance(fast.get_submodule(name), SparseLinear if trial.chosen == "sparse" else nn.Linear)
    assert said == [calibration.table()]
    saved = json.loads((tmp_path / "calibration.json").read_text())
    assert [t["shape"] for t in saved["trials"]] == [list(t.shape) for t in calibration.trials]
    assert {t["chosen"] for t in saved["trials"]} <= {"sparse", "dense"}


def test_what_is_faster_dense_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the geometric mean over the numbers of tokens."""
    faster = Trial((4, 4), 0.9, (1, 128), (10.0, 10.0), (20.0, 4.0), ("a",))
    slower = Trial((4, 4), 0.9, (1, 128), (10.0, 10.0), (20.0, 6.0), ("a",))
    assert (faster.chosen, slower.chosen) == ("sparse", "dense")
    monkeypatch.setattr("pins_ext.sparse.inference.measure", lambda *_: ((1.0, 1.0), (2.0, 2.0)))
    model = sparsify_for_inference(bert(), say=None)
    assert sparse_layers(model) == []
    assert "dense (0.5 x)" in model.pins_calibration.table()


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_smaller_values_are_close_and_keep_their_zeros(values: str) -> None:
    model = bert()
    fast = sparse(model, values=values)
    layers = [(model.get_submodule(name), fast.get_submodule(name)) for name in sparse_layers(fast)]
    assert {layer.kind for _, layer in layers} == {values}
    for dense, layer in layers:
        assert layer.bytes < 0.75 * SparseLinear(dense.weight, dense.bias).bytes
        # A token that names one column reads that column of the weight: what was zero is zero.
        read = layer(torch.eye(dense.in_features)).t() - (0 if dense.bias is None else dense.bias[:, None])
        assert (read[dense.weight == 0].abs() <= 1e-6).all()
        step = dense.weight.abs().amax(dim=1, keepdim=True) / (254 if values == "int8" else 256)
        assert ((read - dense.weight).abs() <= step * 1.01 + 1e-6).all()
    ids = torch.randint(0, 40, (3, 9))
    with torch.inference_mode():
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=0.1, atol=0.02)


def test_bfloat16_weights_stay_so_exactly() -> None:
    fast = sparse(bert().to(torch.bfloat16))
    assert {fast.get_submodule(name).kind for name in sparse_layers(fast)} == {"bfloat16"}


@pytest.mark.parametrize("values", ["float32", "int8"])
def test_activations_of_another_width_are_refused(values: str) -> None:
    """Within a block of 256 columns the packed weights would multiply them."""
    layer = SparseLinear(torch.randn(48, 64), values=values)
    for shape in [(2, 63), (2, 65), (63,), ()]:
        with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 64\], as the weight's inputs; got \("):
            layer(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_answer_has_the_dtype_of_the_dense_one(dtype: torch.dtype) -> None:
    model = bert()
    fast = sparse(model)
    ids, x = torch.randint(0, 40, (2, 9)), torch.randn(3, 64)
    layer = fast.bert.encoder.layer[0].attention.self.query
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
        assert layer(x).dtype == dtype
        assert fast(ids).logits.dtype == model(ids).logits.dtype
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(8, 8), r"the model: it is the model itself, and can't be replaced in it: wrap it in nn\.Sequential"),
        (nn.Sequential(nn.Linear(8, 8)).double(), r"0: its weight is torch\.float64"),
        (nn.ModuleList([nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)]), "0: it is a NonDynamically"),
    ],
)
def test_nothing_to_replace_says_what_was_in_the_way(module: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=f"prune the model further, or lower min_sparsity; left as they are: {reason}"):
        sparse(pruned(module))


def test_sparse_tensors_as_weights_stay_what_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        layer.weight.data[1:] = 0
    model[0].weight = nn.Parameter(model[0].weight.data.to_sparse_csr(), requires_grad=False)
    fast = sparsify_for_inference(model, calibrate=False, say=None)
    assert fast.pins_calibration.dense == {"0": "its weight is torch.sparse_csr"}
    assert sparse_layers(fast) == ["1"]


def test_a_refusal_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = bert().train()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r'layer\.1\.output\.dense has infinite or NaN weights.*use values="float32"'):
        sparsify_for_inference(model, values="int8", calibrate=False, say=None)
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match=r"3\.4e\+38, which are infinite in torch.bfloat16: keep their own dtype"):
        sparsify_for_inference(model, values="bfloat16", calibrate=False, say=None)
    with pytest.raises(SaveError, match="there is no folder"):
        sparsify_for_inference(model, calibrate=False, say=None, save_to=tmp_path / "none" / "a.json")
    assert sparse_layers(model) == []
    assert model.training
    assert "pins_calibration" not in model.__dict__


def test_what_is_tried_follows_whether_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    for layer, sparsity in zip(model, (0.25, 0.5, 0.75), strict=True):
        layer.weight.data = pruned(nn.Linear(64, 64), sparsity).weight.data
    monkeypatch.setattr("pins_ext.sparse.inference.measure", lambda *_: ((2.0, 2.0), (1.0, 1.0)))
    measured, unmeasured = (sparsify_for_inference(copy.deepcopy(model), calibrate=c, say=None) for c in (True, False))
    assert (sparse_layers(measured), sparse_layers(unmeasured)) == (["1", "2"], ["2"])
    assert measured.pins_calibration.dense == {"0": "less than 30% zeros"}
    with pytest.raises(ValueError, match=r"1 layers of the model are sparse already, and no other has 70% zeros"):
        sparsify_for_inference(unmeasured, calibrate=False, say=None)


def test_bad_requests_say_what_to_do() -> None:
    for tokens in ((1.5,), 4, (True,), (1, "a")):
        with pytest.raises(ValueError, match=r"tokens must be positive numbers of tokens, such as \(1, 128\); got"):
            sparsify_for_inference(bert(), tokens=tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_sparsity must be between 0 and 1, got 90"):
        sparsify_for_inference(bert(), 90)
    with pytest.raises(ValueError, match=r"tokens must be positive numbers of tokens, such as \(1, 128\); got \(0,\)"):
        sparsify_for_inference(bert(), tokens=(0,))
    with pytest.raises(ValueError, match="values must be one of float32, bfloat16, int8; got 'int4'"):
        sparsify_for_inference(bert(), values="int4")
    with pytest.raises(ValueError, match="prune the model further, or lower min_sparsity"):
        sparsify_for_inference(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"this one is on meta: move it, for example with model\.to"):
        sparsify_for_inference(nn.Linear(3, 3, device="meta"))
