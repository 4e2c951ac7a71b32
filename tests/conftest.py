"""Which tests can run here: interpreter tests in a process of their own, GPU tests with a GPU."""

from __future__ import annotations

import os

import pytest

# Threads that spin for work stall one another for seconds when a test run shares its cores. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what this process or machine cannot run."""
    for item in items:
        if item.get_closest_marker("interpret") and not INTERPRET:
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter is chosen per process: TRITON_INTERPRET=1"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
