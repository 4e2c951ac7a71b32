"""The line of the documentation that exports the dense checkpoint to ONNX."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_models import encoder_folder
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

ROOT = Path(__file__).parents[2]


def test_the_documented_lines_export_what_onnxruntime_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    encoder_folder(tmp_path / "encoder")
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig.from_pretrained(tmp_path / "encoder")).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[torch.rand(module.weight.shape) < 0.9] = 0
    model.save_pretrained(tmp_path / "encoder")
    page = (ROOT / "docs" / "how_to" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page[page.index("## ONNX") :], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("runs/rte", "encoder"), "export.md", "exec"), {})
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = torch.randint(0, 40, (2, 16))
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 16), dtype=np.int64)}
    np.testing.assert_allclose(session.run(None, feed)[0], expected, rtol=1e-4, atol=1e-5)
