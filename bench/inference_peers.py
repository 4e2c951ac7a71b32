"""Who runs the model in `bench_inference`: each peer builds a call without arguments, or says why it is absent."""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], object]

LEAST_SPARSITY = 0.4
"""Layers with as many zeros become sparse: the curves begin at half."""


class AbsentError(RuntimeError):
    """A peer that can't take part here."""


def torch_dense(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> Call:
    """The model as it is, in eager torch."""
    own = copy.deepcopy(model).to(dtype)
    return lambda: own(**inputs)


def torch_csr(model: nn.Module, inputs: dict[str, Tensor]) -> Call:
    """Linear layers by torch's CSR matrices: y = (W x^T)^T."""
    own = copy.deepcopy(model)
    for module in list(own.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and layer.weight.count_nonzero() < 0.7 * layer.weight.numel():
                setattr(module, name, _Csr(layer))
    return lambda: own(**inputs)


class _Csr(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.matrix = layer.weight.detach().to_sparse_csr()
        self.bias = layer.bias
        # Models ask for its dtype.
        self.weight = torch.empty_like(layer.weight, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.mm(self.matrix, flat.t()).t()
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], -1)


def ours(model: nn.Module, inputs: dict[str, Tensor], values: str) -> Call:
    """Every pruned layer sparse, faster or not. On a GPU the whole model has the dtype of the values."""
    from pins_ext.sparse.inference import sparsify_for_inference

    own = copy.deepcopy(model)
    if inputs["input_ids"].is_cuda:
        own.to(getattr(torch, values))
    sparsify_for_inference(own, LEAST_SPARSITY, values=values, calibrate=False, say=None)
    return lambda: own(**inputs)


@contextmanager
def exported(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[Path]:
    """The dense checkpoint as ONNX, by torch.onnx; zeros are numbers like any other there.

    Raises:
        AbsentError: torch's exporter lacks its packages, or can't export this model.
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise AbsentError("onnxscript is not installed: pip install onnx onnxscript") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        # It names torchvision's operators that it won't know, and what of torch's own it should no longer call.
        exporter = logging.getLogger("torch.onnx")
        level = exporter.level
        exporter.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(model, (), file, kwargs=inputs, dynamo=True, external_data=False, verbose=False)
        except Exception as error:
            reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
            raise AbsentError(f"torch.onnx can't export {type(model).__name__}: {reason}") from error
        finally:
            exporter.setLevel(level)
        yield file


def onnxruntime(file: Path, inputs: dict[str, Tensor], threads: int) -> Call:
    """onnxruntime's CPU provider, float32."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise AbsentError("onnxruntime is not installed: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed: dict[str, Any] = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: session.run(None, feed)


def openvino(file: Path, inputs: dict[str, Tensor], threads: int, precision: str) -> Call:
    """OpenVINO on the CPU, in "f32" or "bf16"."""
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise AbsentError("openvino is not installed: pip install openvino") from error
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(str(file), "CPU", hints).create_infer_request()
    feed: dict[str, Any] = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: request.infer(feed)


def openvino_int8(file: Path, inputs: dict[str, Tensor], threads: int) -> Call:
    """OpenVINO with weights and activations quantized by nncf, calibrated on the input itself."""
    try:
        # What it says and its progress are none of the table's.
        with redirect_stdout(sys.stderr):
            import nncf
        import openvino
    except ModuleNotFoundError as error:
        raise AbsentError("nncf is not installed: pip install openvino nncf") from error
    feed: dict[str, Any] = {name: tensor.numpy() for name, tensor in inputs.items()}
    core = openvino.Core()
    with redirect_stdout(sys.stderr):
        model = nncf.quantize(core.read_model(str(file)), nncf.Dataset([feed]), model_type=nncf.ModelType.TRANSFORMER)
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    return lambda: request.infer(feed)
