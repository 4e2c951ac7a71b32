"""`pins-ext doctor`: every operator is listed with what runs it, and what is missing is said."""

from __future__ import annotations

import pytest
import torch

from pins_ext import ops  # noqa: F401  (registers the operators)
from pins_ext.cli import doctor
from pins_ext.cli.main import main


def registered() -> set[str]:
    """The operators on tensors that the compiled module and the package have registered."""
    names = {
        schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas() if "pins_ext::" in schema.name
    }
    return names - {"cpu_capability"}


def test_the_list_is_that_of_the_registered_operators(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(doctor.OPERATORS) == registered()
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kernels = [line for line in lines if line.split()[1:2] == ["kernels"]]
    assert len(kernels) <= 10
    for name in registered():
        (line,) = [line for line in kernels if name in line.rstrip(")").rpartition("(")[2].split(", ")]
        assert ("CPU C++; GPU " in line) == (name not in ("select", *doctor.FALLBACK))


def test_a_build_without_cuda_kernels_decodes_by_triton_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.topic: finding for finding in doctor._kernels(False)}
    in_cuda = doctor._has_kernel("masked_adamw_", "CUDA")
    assert ("GPU CUDA" in found["grouped_linear"].text) == in_cuda
    monkeypatch.setattr(doctor, "_has_kernel", lambda name, device: device == "CPU" or name in doctor.FALLBACK)
    found = {finding.topic: finding for finding in doctor._kernels(False)}
    assert "GPU Triton: this build has no CUDA C++" in found["grouped_linear"].text
    assert "GPU torch's own operators: this build has no CUDA C++" in found["grouped_expand"].text
    monkeypatch.setattr(doctor, "_triton_problem", lambda: "no module named triton")
    found = {finding.topic: finding for finding in doctor._kernels(True)}
    assert found["grouped_linear"].verdict == "broken"
    assert found["grouped_expand"].verdict == "ok"


@pytest.mark.parametrize("gpu", [True, False])
def test_a_build_without_cuda_kernels_is_no_good_on_a_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = {name for name, kind in doctor.OPERATORS.items() if kind == doctor.COMPILED} - set(doctor.FALLBACK)
    assert {"masked_adamw_", "masked_sgd_", "apply_mask_"} <= compiled
    monkeypatch.setattr(doctor, "_has_kernel", lambda name, device: device == "CPU" or name not in compiled)
    found = {finding.topic: finding for finding in doctor._kernels(gpu)}
    for name in compiled:
        assert found[name].verdict == ("broken" if gpu else "note")
        assert "rebuild with nvcc and PINS_EXT_CUDA=1" in found[name].text
    assert found["accumulate_"].verdict == "ok"
    if gpu:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
        (line,) = doctor._gpu(available=True)
        assert line.verdict == "broken"
        assert "masked_adamw_" in line.text


def test_missing_triton_is_said_per_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_triton_problem", lambda: "No module named 'triton'")
    found = {finding.topic: finding for finding in doctor._kernels(gpu=True)}
    assert found["pack_"].verdict == "broken"
    assert "CUDA tensors are refused: No module named 'triton'" in found["pack_"].text
